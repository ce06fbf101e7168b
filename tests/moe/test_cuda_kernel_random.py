"""Kernels of ranks that come when they like, until one of them stops for good at some place of a step."""

from __future__ import annotations

import random
import time

import pytest
import torch
from moe_kernel_crew import Crew, Gpu, add_up, give, send, take
from moe_kernel_steps import check_arrived, draw, expert, frame_for, same_sums
from moe_programs import even

from raynixl.moe import reference
from raynixl.moe.reference import Setting

pytestmark = pytest.mark.pure
WORLD, STEPS, HIDDEN, TOPK = 4, 8, 24, 3


class Stopped(Exception):
    """A rank has stopped."""


def settings(seed):
    """The steps, each with its layout."""
    rng = random.Random(seed)
    found = []
    for _ in range(STEPS):
        layout, weights_at = rng.choice(["tokens", "experts", "slots"]), rng.choice(["holder", "source"])
        found.append(Setting(WORLD, even(WORLD, 8), 8, layout, rng.choice([1, 4]), weights_at))
    return found


def without(setting, lost):
    """The same, without a rank."""
    return Setting(WORLD, setting.holders, 8, setting.layout, setting.alignment, setting.weights_at, frozenset(lost))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_whenever_a_rank_stops_the_others_end_their_steps_and_agree(seed, at_once):
    rng = random.Random(seed)
    steps, dead, last = settings(seed), rng.randrange(WORLD), rng.randrange(4 * (STEPS - 3))
    tokens = [draw(one, [rng.randrange(9) for _ in range(WORLD)], HIDDEN, TOPK, seed=n) for n, one in enumerate(steps)]
    crew = Crew(frame_for(steps[0], HIDDEN, TOPK), deadline=0.5, grid=5, threads=32, at_once=at_once)

    def work(gpu: Gpu):
        mine, launches, outs = random.Random(seed * 100 + gpu.me), 0, []

        def begin() -> None:
            nonlocal launches
            if gpu.me == dead and launches > last:
                raise Stopped
            launches += 1
            time.sleep(mine.random() * 4e-3)

        try:
            for setting, given in zip(steps, tokens, strict=True):
                waits = mine.random() < 0.5
                begin()
                held = send(gpu, setting, given[gpu.me])
                begin()
                take(gpu, setting, given[gpu.me], held, waits=waits and setting.layout == "slots")
                y = reference.run_experts(setting, gpu.me, held, expert, torch.bfloat16)
                begin()
                give(gpu, y, held)
                begin()
                outs.append((held, add_up(gpu, y, held, waits=waits)[0]))
        except Stopped:
            pass
        return outs

    played = crew.each(work)
    for number, (whole, given) in enumerate(zip(steps, tokens, strict=True)):
        if 4 * number + 4 <= last:
            check(crew, whole, given, played, number, range(WORLD))
    survivors = [rank for rank in range(WORLD) if rank != dead]
    for rank in survivors:
        assert crew.gpus[rank].layer.mask == crew.gpus[rank].page.lost == 1 << dead
        assert crew.gpus[rank].page.masked == 0
        assert list(crew.gpus[rank].page.turns) == [STEPS, STEPS]
    check(crew, without(steps[-1], [dead]), tokens[-1], played, STEPS - 1, survivors)


def check(crew, setting, given, played, number, ranks):
    """Hold one step against the reference."""
    arrived = reference.dispatch(setting, given)
    ys = [reference.run_experts(setting, r, one, expert, torch.bfloat16) for r, one in enumerate(arrived)]
    outs = reference.combine(setting, given, ys)
    for rank in ranks:
        held, out = played[rank][number]
        check_arrived(setting, crew.gpus[rank], held, arrived[rank])
        same_sums(out, outs[rank], f"step {number} at {rank}")

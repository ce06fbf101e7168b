"""Seconds that ranks are waited for on GPUs: added by the kernels, for those who come, however many CTAs wait."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import OPTIONS, GpuCrew, agree, gpu_crew, tokens
from moe_kernel_crew import Crew, Gpu, add_up, give, send, take
from moe_kernel_steps import draw, expert, frame_for
from moe_programs import even

from raynixl.errors import ConfigError
from raynixl.moe import reference
from raynixl.moe.cuda_layer import GpuLayer
from raynixl.moe.reference import Setting

LATE = 0.3
WORLD = 3


def tells(attempt, is_told):
    """Fail unless it is told who is late by so much, or, where a busy machine has kept others for as long, by more."""
    for late in (LATE, 10 * LATE):
        found = attempt(late)
        if is_told(found, late):
            return
    raise AssertionError(found)


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(WORLD) as made:
        yield made


@pytest.mark.pure
@pytest.mark.parametrize("waits", [False, True], ids=["apart", "itself"])
@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_who_is_late_is_named_and_nobody_else(layout, waits):
    setting = Setting(WORLD, even(WORLD, 8), 8, layout, 2)
    given = draw(setting, (5, 8, 3), 16, 3)

    def work(gpu: Gpu, late):
        of_take, of_sum = torch.ones(WORLD, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        for who in (1, None):
            seconds = late * (gpu.me == who)
            time.sleep(seconds)
            held = send(gpu, setting, given[gpu.me])
            take(gpu, setting, given[gpu.me], held, waits=waits and layout == "slots", waited=of_take)
            y = reference.run_experts(setting, gpu.me, held, expert, torch.bfloat16)
            time.sleep(seconds)
            give(gpu, y, held)
            add_up(gpu, y, held, waits=waits, waited=of_sum)
        assert of_take[gpu.me] == 1
        assert ((of_take >= 1) & (of_take < 20)).all()
        return of_take - 1, of_sum - 1

    def is_told(found, late):
        others_were_there = found[1][0].sum() < late
        takes, sums = [found[rank][0] for rank in (0, 2)], [found[rank][1][1] for rank in (0, 2)]
        return others_were_there and min(sums) > late / 2 and all(
            waited[1] > max(late / 2, waited[0] + waited[2]) for waited in takes
        )  # fmt: skip

    made = Crew(frame_for(setting, 16, 3), grid=4)
    tells(lambda late: made.each(lambda gpu: work(gpu, late)), is_told)
    assert not any(any(gpu.layer.waits) for gpu in made.gpus)


@pytest.mark.pure
def test_who_does_not_come_adds_nothing():
    setting = Setting(WORLD, even(WORLD, 8), 8, "slots", 1)
    given = draw(setting, (5, 8, 3), 16, 3)

    def work(gpu: Gpu):
        waited = torch.zeros(WORLD, dtype=torch.float64)
        held = send(gpu, setting, given[gpu.me])
        take(gpu, setting, given[gpu.me], held, waits=True, waited=waited)
        return waited

    crew = Crew(frame_for(setting, 16, 3), deadline=0.3)
    assert all(waited[2] == 0 for waited in crew.each(work, [0, 1])[:2])


@pytest.mark.parametrize("apart", [False, True], ids=["itself", "apart"])
@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_calls_add_seconds_to_tensors_of_the_caller(crew, layout, apart, monkeypatch):
    monkeypatch.setattr(GpuLayer, "waits_apart", lambda _layer, _nbytes: apart)
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer, layout=layout)

        def run(rank, ep, late):
            waited, stats = torch.zeros(WORLD, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
            time.sleep(late * (rank == 1))
            r = ep.dispatch(*tokens(rank), layout=layout, waited=waited)
            time.sleep(late * (rank == 1))
            ep.combine(r.x, r.handle, stats=stats)
            crew.gpus.settle()
            assert r.handle.call.waited is None
            assert waited[rank] == 0
            return float(waited[1]), float(stats[1])

        tells(
            lambda late: layer.run(lambda rank, ep: run(rank, ep, late)),
            lambda found, late: all(late / 2 < one < 20 for rank in (0, 2) for one in found[rank]),
        )


def test_a_graph_adds_at_every_replay(crew):
    work, kept = crew.gpus.fake.work, []
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)

        def run(rank, ep, late):
            waited, stats = (torch.zeros(WORLD, dtype=torch.float64) for _ in range(2))
            stream = crew.gpus.stream()
            work.begin_capture(stream)
            r = ep.dispatch(*tokens(rank), layout="slots", waited=waited)
            kept.append((r, ep.combine(r.x, r.handle, stats=stats)))
            graph, found = work.end_capture(stream), []
            for _ in range(2):
                time.sleep(late * (rank == 1))
                graph.launch()
                crew.gpus.settle()
                found.append((float(waited[1]), float(stats.sum())))
            assert 0 <= found[0][1] <= found[1][1]
            return found[0][0], found[1][0] - found[0][0]

        tells(
            lambda late: layer.run(lambda rank, ep: run(rank, ep, late)),
            lambda found, late: all(one > late / 2 for rank in (0, 2) for one in found[rank]),
        )


def test_seconds_go_into_float64_alone(crew):
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)
        for wrong in (
            torch.zeros(WORLD), torch.zeros(WORLD, 2, dtype=torch.float64)[:, 0], torch.zeros(99, dtype=torch.float64),
            [0.0] * WORLD,
        ):  # fmt: skip
            errors = layer.errors(
                lambda rank, ep, wrong=wrong: ep.dispatch(*tokens(rank), waited=None if rank else wrong)
            )
            assert [type(error) for error in errors] == [ConfigError] * WORLD
            assert str(errors[0]).startswith("waited "), errors
        agree(layer, 1)

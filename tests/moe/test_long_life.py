"""Layers that live long, come and go: numbers that pass 32 bits, hundreds of layers, nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import mapped_arenas
from moe_programs import Cached, Combine, Dispatch, Program, check, even, play
from moe_tools import Threads

from raynixl.errors import ConfigError, RangeError

STEPS = (
    Dispatch("a", (3, 0, 5)), Combine("a"), Dispatch("b", (1, 2, 3), "slots", weights_at="source"), Cached("c", "a"),
    Combine("c"), Combine("b"), Dispatch("d", (8, 8, 8), "experts", only=(1,)), Combine("d"),
)  # fmt: skip
PROGRAM = Program(3, even(3, 7), 16, 3, STEPS, capacity=4)


@pytest.mark.parametrize(
    "phase", [2**16 - 3, 2**31 - 4, 2**32 - 5, 2**53 + 1, 2**63 - 4], ids=lambda phase: f"{phase:#x}"
)
def test_phases_pass_every_width_of_their_numbers(crew, phase):
    with crew.experts(3, **PROGRAM.options()) as layer:
        for ep in layer.eps:
            ep._session.phase = phase
        for _ in range(3):
            check(PROGRAM, layer.run(lambda rank, ep: play(PROGRAM, rank, ep)))


@pytest.mark.parametrize("backend", ["loopback", "shm"])
def test_a_crew_that_has_come_and_gone_leaves_nothing(nothing_left, backend):
    with Threads(3, backends=(backend,)) as crew, crew.experts(3, **PROGRAM.options()) as layer:
        check(PROGRAM, layer.run(lambda rank, ep: play(PROGRAM, rank, ep)))


@pytest.mark.parametrize("backend", ["loopback", "shm"])
def test_layers_that_come_and_go_give_their_memory_back(backend):
    with Threads(2, backends=(backend,)) as crew:
        sizes = []
        for _ in range(12):
            with crew.experts(2, experts=4, hidden=64, topk=2, max_tokens=64) as layer:
                made = layer.run(lambda rank, ep: ep.dispatch(torch.ones(4, 64), torch.tensor([[0, 3]] * 4)))
                layer.run(lambda rank, ep, made=made: ep.combine(made[rank].x, made[rank].handle))
                del made
            gc.collect()
            sizes.append(mapped_arenas())
        assert sizes[-1] <= sizes[1]


@pytest.mark.parametrize("backend", ["loopback", "shm"])
def test_a_result_outlives_its_layer_and_agents(backend):
    with Threads(2, backends=(backend,)) as crew, crew.experts(2, experts=4, hidden=64, topk=2, max_tokens=64) as layer:
        rows = torch.arange(256.0).reshape(4, 64)
        made = layer.run(lambda rank, ep: ep.dispatch(rows + rank, torch.tensor([[0, 3]] * 4)))
    for each in made:
        assert torch.equal(each.x, torch.cat([rows, rows + 1]))


def test_programs_over_shared_memory_between_agents_of_one_process():
    with Threads(3, backends=("shm",)) as crew, crew.experts(3, **PROGRAM.options()) as layer:
        check(PROGRAM, layer.run(lambda rank, ep: play(PROGRAM, rank, ep)))


def test_a_thousand_small_steps_need_no_more_slots_than_ten(crew):
    x, ids = torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor([[0], [5]])

    def steps(rank, ep, count):
        for _ in range(count):
            made = ep.dispatch(x, ids)
            out = ep.combine(made.x, made.handle)
            assert torch.equal(out, x)
        return len(ep._session.pool)

    with crew.experts(3, experts=6, hidden=16, topk=1, max_tokens=2) as layer:
        ten = layer.run(lambda rank, ep: steps(rank, ep, 10))
        thousand = layer.run(lambda rank, ep: steps(rank, ep, 1000))
        assert all(later <= former + 1 for former, later in zip(ten, thousand, strict=True))


def slots_after(layer, step, rounds):
    """Run a step so often; return how many slots each rank has then."""

    def steps(rank, ep):
        for _ in range(rounds):
            step(rank, ep)
        return len(ep._session.pool)

    return layer.run(steps)


def test_steps_that_pass_the_capacity_use_the_same_slots_again(crew):
    x, ids = torch.ones(8, 16, dtype=torch.bfloat16), torch.tensor([[0], [1]] * 4)

    def step(rank, ep):
        made = ep.dispatch(x[: 8 - rank], ids[: 8 - rank] * (rank % 2))
        assert torch.equal(ep.combine(made.x, made.handle), x[: 8 - rank])

    with crew.experts(4, experts=4, hidden=16, topk=1, max_tokens=8, capacity=1) as layer:
        few = slots_after(layer, step, 20)
        many = slots_after(layer, step, 300)
        assert all(later <= former + 2 for former, later in zip(few, many, strict=True)), (few, many)


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_steps_that_fail_leave_no_slot_in_use(crew, layout):
    x, ids = torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor([[0], [5]])

    def step(rank, ep):
        with pytest.raises(RangeError):
            ep.dispatch(x, ids + (rank == 1) * 6, layout=layout)
        made = ep.dispatch(x, ids, layout=layout)
        with pytest.raises(ConfigError):
            ep.combine(made.x if rank else made.x[:, :1], made.handle)
        assert torch.equal(ep.combine(made.x, made.handle), x)

    with crew.experts(3, experts=6, hidden=16, topk=1, max_tokens=2) as layer:
        slots_after(layer, step, 50)
        gc.collect()  # errors hold the frames that hold results
        for ep in layer.eps:
            used = [slot for slot in ep._session.pool.slots if slot.is_kept or slot.is_leased or slot.writers]
            assert used == [ep._session.landing]

"""Ranks of two stages, in processes of their own with GPUs that are made up, are killed, freeze and come back."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
from agent_tools import eventually
from moe_fault_crews import LONG, SOON, come_back_beside
from moe_faults import COMBINE, DISPATCH, OPTIONS, Where
from moe_kernels_host import library
from moe_tools import Processes
from weights_nursery import Nursery

from raynixl import Masked
from raynixl.host import process_state
from raynixl.moe.grid import Grid

WORLD = 4
EVERYBODY = tuple(range(WORLD))
GRID = Grid(((0, 1), (2, 3)))
OF_ALL = {"name": "layer", "deadline": LONG, "grid": GRID, **OPTIONS}


@pytest.fixture
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Four processes with a layer of two stages, each with a driver that is made up in the place of CUDA's."""
    library()
    with Processes(WORLD, lent=nursery) as made:
        made.call("moe_cuda_far:begin")
        made.call("moe_staged_faults:make", made.names, OF_ALL)
        yield made
        made.call("moe_cuda_far:end")


def harmed(crew: Processes, victim: int, where: Where, number: int, **options: object) -> list[int]:
    """Have a rank come to harm amid a step; the others' next steps lack what is its own, and nothing else."""
    rest = [rank for rank in EVERYBODY if rank != victim]
    crew.call("moe_staged_faults:harm", where, number, ranks=[victim])
    crew.tell(victim, "moe_faults:step", "layer", LONG)
    for rank in rest:
        crew.tell(rank, "moe_faults:step", "layer", keep=True, **options)
    for report in [crew.hear(rank) for rank in rest]:
        assert set(report.lost) <= {victim}
        assert report.seconds < SOON
    for reports in crew.call("moe_faults:steps", "layer", 2, ranks=rest):
        assert set(reports[0].lost) <= {victim}
        assert all(set(report.missing) == set(report.unheard) == {victim} for report in reports)
    assert min(crew.call("moe_faults:held_is_as_it_was", ranks=rest)) > 0
    return rest


@pytest.mark.parametrize(
    ("victim", "where"), [(3, DISPATCH[3]), (0, COMBINE[1]), (0, DISPATCH[0])], ids=str
)  # fmt: skip
def test_a_rank_that_is_killed_is_forwarded_for_and_replaced(crew: Processes, victim: int, where: Where) -> None:
    rest = harmed(crew, victim, where, signal.SIGKILL)
    crew.children[victim].wait_ended()
    crew.restart(victim)
    crew.call("moe_cuda_far:begin", ranks=[victim])
    come_back_beside(crew, victim, rest, "moe_staged_faults:join", crew.names, OF_ALL, EVERYBODY, False)


def test_a_rank_that_is_frozen_is_forwarded_for_and_comes_back(crew: Processes) -> None:
    rest = harmed(crew, 3, DISPATCH[3], signal.SIGSTOP, deadline=1.5)
    eventually(lambda: process_state(crew.children[3].pid) == "T", "the victim stands")
    crew.resume(3)
    with contextlib.suppress(Masked):
        crew.hear(3)
    with pytest.raises(Masked, match="rejoin"):
        crew.call("moe_faults:step", "layer", ranks=[3])
    come_back_beside(crew, 3, rest, "moe_staged_faults:rejoin", "layer")

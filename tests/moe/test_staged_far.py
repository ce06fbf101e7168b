"""Two stages over UCX: a rank is killed, another one is frozen, and both come back."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
from moe_fault_crews import LONG, SOON, come_back_beside
from moe_faults import DISPATCH, OPTIONS
from moe_tools import Processes
from weights_nursery import Nursery

from raynixl import Masked
from raynixl.moe.grid import Grid

pytest.importorskip("ucxx")
WORLD = 4
EVERYBODY = tuple(range(WORLD))
OF_ALL = {"name": "layer", "deadline": LONG, "grid": Grid(((0, 1), (2, 3))), **OPTIONS}


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Four processes that do not map each other."""
    with Processes(WORLD, backends=("ucx",), lent=nursery) as made:
        yield made


def go_on_without(crew: Processes, victim: int, **options: object) -> list[int]:
    """Take a step in which a rank comes to harm, then some more; return the others."""
    rest = [rank for rank in EVERYBODY if rank != victim]
    crew.tell(victim, "moe_faults:step", "layer")
    for rank in rest:
        crew.tell(rank, "moe_faults:steps", "layer", 4, **options)
    for reports in [crew.hear(rank) for rank in rest]:
        assert all(report.seconds < SOON for report in reports)
        assert all(set(report.missing) == set(report.unheard) == {victim} for report in reports)
    return rest


def test_ranks_of_other_hosts_are_killed_and_frozen_and_come_back(crew: Processes) -> None:
    crew.call("moe_staged_faults:make", crew.names, OF_ALL)
    crew.call("moe_staged_faults:harm", DISPATCH[3], signal.SIGKILL, ranks=[3])
    rest = go_on_without(crew, 3)
    crew.children[3].wait_ended()
    crew.restart(3)
    come_back_beside(crew, 3, rest, "moe_staged_faults:join", crew.names, OF_ALL, EVERYBODY, False)
    crew.call("moe_staged_faults:harm", DISPATCH[3], signal.SIGSTOP, ranks=[0])
    rest = go_on_without(crew, 0, deadline=1.5)
    crew.resume(0)
    with contextlib.suppress(Masked):
        crew.hear(0)
    with pytest.raises(Masked):
        crew.call("moe_faults:step", "layer", ranks=[0])
    come_back_beside(crew, 0, rest, "moe_staged_faults:rejoin", "layer")
    crew.call("moe_faults:drop", "layer")

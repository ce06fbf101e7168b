"""A rank is frozen at a chosen place of a step, and wakes up later: the others mask it, and it changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from moe_fault_crews import (
    REST,
    SOON,
    VICTIM,
    WORLD,
    check,
    check_harmed,
    come_back,
    harm,
    hear_masked,
    layer,
    mostly_slow,
)
from moe_faults import COMBINE, DISPATCH, Where
from moe_tools import Processes
from weights_nursery import Nursery

from raynixl.moe import OnLost

DEADLINE = 2.0
RENORMALISED = (DISPATCH[3], DISPATCH[5], COMBINE[2])
PLACES = [(OnLost.DROP, where) for where in (*DISPATCH, *COMBINE)]
PLACES += [(OnLost.RENORMALISE, where) for where in RENORMALISED]


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Four processes."""
    with Processes(WORLD, lent=nursery) as made:
        yield made


@pytest.mark.parametrize(("on_lost", "where"), mostly_slow(PLACES, 3), ids=str)
def test_it_is_masked_wakes_up_changes_nothing_and_comes_back(crew: Processes, on_lost: OnLost, where: Where) -> None:
    with layer(crew, on_lost=on_lost) as ranks:
        for report in harm(ranks, where, signal.SIGSTOP, deadline=DEADLINE):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 6, deadline=DEADLINE, keep=True, ranks=REST), gone=[VICTIM])
        assert any(ranks.call("moe_faults:quarantined", "layer", ranks=REST))
        ranks.resume(VICTIM)
        for rank in REST:
            ranks.tell(rank, "moe_faults:steps", "layer", 6, keep=True)
        hear_masked(ranks, VICTIM)
        check([ranks.hear(rank) for rank in REST], gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0
        assert come_back(ranks, VICTIM) < SOON
        assert ranks.call("moe_faults:quarantined", "layer") == [[]] * WORLD

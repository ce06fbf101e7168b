"""A rank is killed at a chosen place of a step: the others return at once, say so, and lack its terms alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from moe_fault_crews import REST, SOON, VICTIM, WORLD, check, check_harmed, harm, layer, mostly_slow
from moe_faults import COMBINE, DISPATCH, Where
from moe_tools import Processes
from weights_nursery import Nursery

from raynixl.moe import OnLost
from raynixl.moe.rank import EAGER_NBYTES

RENORMALISED = (DISPATCH[3], DISPATCH[5], DISPATCH[-1], COMBINE[2])
PLACES = [(OnLost.DROP, where) for where in (*DISPATCH, *COMBINE)]
PLACES += [(OnLost.RENORMALISE, where) for where in RENORMALISED]


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Four processes; who is killed is replaced."""
    with Processes(WORLD, lent=nursery) as made:
        yield made


def test_rows_lie_apart_where_some_have_heard_its_counts_and_others_could_not_tell_it_theirs(crew: Processes) -> None:
    with layer(crew) as ranks:
        ranks.call("moe_faults:harm", Where("dispatch", "line", 2, "after"), ranks=[0])
        for rank in (0, 1, 3):
            ranks.tell(rank, "moe_faults:step", "layer")
        ranks.children[0].wait_ended()
        ranks.tell(2, "moe_faults:step_late", "layer", 0)
        for rank in (1, 2, 3):
            check_harmed(ranks.hear(rank), DISPATCH[2], [0])
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=[1, 2, 3]), gone=[0])


@pytest.mark.parametrize(("on_lost", "where"), mostly_slow(PLACES, 2), ids=str)
def test_survivors_return_at_once_and_lack_its_terms_alone(crew: Processes, on_lost: OnLost, where: Where) -> None:
    with layer(crew, on_lost=on_lost) as ranks:
        for report in harm(ranks, where, signal.SIGKILL):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 5, ranks=REST), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0
        assert ranks.call("moe_faults:quarantined", "layer", ranks=REST) == [[]] * len(REST)


@pytest.mark.parametrize("where", [DISPATCH[0], DISPATCH[3], DISPATCH[5], COMBINE[1]], ids=str)
def test_who_sends_rows_at_once_is_killed_amid_them(crew: Processes, where: Where) -> None:
    with layer(crew, eager_nbytes=EAGER_NBYTES) as ranks:
        for report in harm(ranks, where, signal.SIGKILL):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 5, ranks=REST), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0
        assert ranks.call("moe_faults:quarantined", "layer", ranks=REST) == [[]] * len(REST)

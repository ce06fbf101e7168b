"""A rank is killed at a chosen place of a step: the others return at once, say so, and lack its terms alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from moe_fault_crews import REST, SOON, VICTIM, WORLD, check, check_harmed, harm, layer
from moe_faults import COMBINE, DISPATCH, Where
from moe_tools import Processes

from raynixl.moe import OnLost

RENORMALISED = (DISPATCH[3], DISPATCH[5], DISPATCH[-1], COMBINE[2])
PLACES = [(OnLost.DROP, where) for where in (*DISPATCH, *COMBINE)]
PLACES += [(OnLost.RENORMALISE, where) for where in RENORMALISED]


@pytest.fixture(scope="module")
def crew() -> Iterator[Processes]:
    """Four processes; who is killed is replaced."""
    with Processes(WORLD) as made:
        yield made


@pytest.mark.parametrize(("on_lost", "where"), PLACES, ids=str)
def test_survivors_return_at_once_and_lack_its_terms_alone(crew: Processes, on_lost: OnLost, where: Where) -> None:
    with layer(crew, on_lost=on_lost) as ranks:
        for report in harm(ranks, where, signal.SIGKILL):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 5, ranks=REST), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0
        assert ranks.call("moe_faults:quarantined", "layer", ranks=REST) == [[]] * len(REST)

"""Ranks that do not map each other come to harm over UCX: killed and frozen at a chosen place of a step."""

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
from moe_faults import COMBINE, DISPATCH, OPTIONS, Where
from moe_tools import Processes
from weights_nursery import Nursery

pytest.importorskip("ucxx")
DEADLINE = 2.5
PLACES = (DISPATCH[1], DISPATCH[3], DISPATCH[5], DISPATCH[-1], COMBINE[1], COMBINE[3], COMBINE[-1])


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Four processes; who is killed is replaced."""
    with Processes(WORLD, backends=("ucx",), lent=nursery) as made:
        yield made


@pytest.mark.parametrize("where", mostly_slow(PLACES, 3), ids=str)
def test_a_killed_rank(crew: Processes, where: Where) -> None:
    with layer(crew) as ranks:
        for report in harm(ranks, where, signal.SIGKILL):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 4, ranks=REST), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0


@pytest.mark.parametrize("where", mostly_slow(PLACES, 3), ids=str)
def test_a_frozen_rank_wakes_up_changes_nothing_and_comes_back(crew: Processes, where: Where) -> None:
    with layer(crew) as ranks:
        for report in harm(ranks, where, signal.SIGSTOP, deadline=DEADLINE):
            assert report.seconds < SOON
            check_harmed(report, where)
        check(ranks.call("moe_faults:steps", "layer", 4, deadline=DEADLINE, keep=True, ranks=REST), gone=[VICTIM])
        ranks.resume(VICTIM)
        hear_masked(ranks, VICTIM)
        check(ranks.call("moe_faults:steps", "layer", 4, keep=True, ranks=REST), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0
        assert come_back(ranks, VICTIM) < SOON


def test_a_rank_is_replaced_under_its_name(crew: Processes) -> None:
    with layer(crew) as ranks:
        ranks.kill(VICTIM)
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=REST), gone=[VICTIM])
        ranks.restart(VICTIM)
        ranks.tell(VICTIM, "moe_faults:join_round", ranks.names, {"name": "layer", **OPTIONS})
        for rank in REST:
            ranks.tell(rank, "moe_faults:one_round", "layer", VICTIM)
        for rank in range(WORLD):
            check([ranks.hear(rank)[-1:]])
        check(ranks.call("moe_faults:steps", "layer", 2))

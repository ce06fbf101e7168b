"""Faults that meet others: two at once, amid a join, behind handles, behind the caller's back, of all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from agent_tools import eventually
from moe_fault_crews import (
    LONG,
    REST,
    SOON,
    VICTIM,
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

WORLD = 5
FOUR, JOINER = [0, 1, 2, 3], 4
DEADLINE = 2.0


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Five processes."""
    with Processes(WORLD, lent=nursery) as made:
        yield made


@pytest.mark.parametrize("where", [DISPATCH[1], DISPATCH[5], COMBINE[3]], ids=str)
def test_two_ranks_are_killed_at_once(crew: Processes, where: Where) -> None:
    with layer(crew) as ranks:
        victims, rest = [VICTIM, 3], [0, 1, 4]
        ranks.call("moe_faults:harm", where, ranks=victims)
        for rank in range(WORLD):
            ranks.tell(rank, "moe_faults:step", "layer")
        for report in [ranks.hear(rank) for rank in rest]:
            assert report.seconds < SOON
            assert set(report.missing) | set(report.unheard) | set(report.lost) <= set(victims)
        for victim in victims:
            ranks.children[victim].wait_ended()
        check(ranks.call("moe_faults:steps", "layer", 4, ranks=rest), gone=victims)


@pytest.mark.parametrize("where", [DISPATCH[0], DISPATCH[1], DISPATCH[5], COMBINE[0], COMBINE[3]], ids=str)
def test_a_rank_is_killed_while_another_joins(crew: Processes, where: Where) -> None:
    with layer(crew, FOUR, max_ranks=8) as ranks:
        options = {"name": "layer", "max_ranks": 8, "deadline": LONG, **OPTIONS}
        ranks.call("moe_faults:expect", "layer", ranks.names, ranks=FOUR)
        ranks.call("moe_faults:harm", where, signal.SIGKILL, True, ranks=[VICTIM])
        ranks.tell(JOINER, "moe_faults:join_round", ranks.names, options)
        found, is_in = [], False
        while not is_in:
            for rank in [*REST, VICTIM]:
                if ranks.children[rank].is_alive:
                    ranks.tell(rank, "moe_faults:one_round", "layer")
            reports = [ranks.hear(rank) for rank in REST]
            found += reports
            if any(each.missing for one in reports for each in one):
                ranks.children[VICTIM].wait_ended()
            elif ranks.children[VICTIM].is_alive:
                ranks.hear(VICTIM)
            is_in = JOINER in reports[0][-1].active
        found.append(ranks.hear(JOINER))
        for report in [report for reports in found for report in reports]:
            assert report.seconds < SOON
            assert set(report.missing) | set(report.lost) <= {VICTIM}
            assert set(report.unheard) <= {VICTIM, JOINER}
        last = ranks.call("moe_faults:steps", "layer", 4, ranks=[*REST, JOINER])
        check(last[:-1], gone=[VICTIM])
        assert {report.missing for report in last[-1]} == {(VICTIM,)}  # it holds no experts: nobody is unheard


def test_a_rank_that_does_not_call_is_masked_and_told(crew: Processes) -> None:
    with layer(crew, FOUR) as ranks:
        for report in ranks.call("moe_faults:step", "layer", DEADLINE, ranks=REST):
            check_harmed(report, DISPATCH[0])
        ranks.tell(VICTIM, "moe_faults:step", "layer")
        hear_masked(ranks, VICTIM)
        assert come_back(ranks, VICTIM) < SOON


def test_a_frozen_rank_whose_next_slot_nobody_knows_costs_the_deadline_only(crew: Processes) -> None:
    """It has kept results, and so announced new memory, which it cannot describe any more."""
    with layer(crew, FOUR) as ranks:
        check(ranks.call("moe_faults:steps", "layer", 3, keep=True, ranks=FOUR))
        ranks.stop(VICTIM)
        for report in ranks.call("moe_faults:step", "layer", DEADLINE, ranks=REST):
            assert report.seconds < 6.0  # and not request_timeout, 8
            check_harmed(report, DISPATCH[0])
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=REST), gone=[VICTIM])
        ranks.resume(VICTIM)
        ranks.tell(VICTIM, "moe_faults:step", "layer")
        hear_masked(ranks, VICTIM)
        assert come_back(ranks, VICTIM) < SOON


def test_ranks_that_are_all_frozen_together_lose_nobody(crew: Processes) -> None:
    """Such as when their container is suspended: the time does not count."""
    with layer(crew, FOUR) as ranks:
        for rank in FOUR:
            ranks.tell(rank, "moe_faults:steps", "layer", 120, deadline=DEADLINE)
        for rank in FOUR:
            ranks.stop(rank)
        until = time.monotonic() + 2 * DEADLINE
        eventually(lambda: time.monotonic() > until, "the deadline has passed")
        for rank in FOUR:
            ranks.resume(rank)
        check([ranks.hear(rank) for rank in FOUR])


@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_a_handle_of_before_lacks_what_was_lost_since(crew: Processes, layout: str) -> None:
    with layer(crew, FOUR) as ranks:
        ranks.call("moe_faults:first_handle", "layer", layout, ranks=FOUR)
        ranks.kill(VICTIM)
        for _ in range(3):
            for report in ranks.call("moe_faults:step_again", "layer", (VICTIM,), ranks=REST):
                assert report.missing == (VICTIM,)
                assert report.seconds < SOON
        check(ranks.call("moe_faults:steps", "layer", 2, ranks=REST), gone=[VICTIM])


WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
WAYS_AND_PLACES = [(way, where) for way in WAYS for where in (DISPATCH[3], COMBINE[2])]


@pytest.mark.parametrize(("way", "where"), mostly_slow(WAYS_AND_PLACES, 3), ids=str)
def test_layouts_lack_the_terms_of_a_frozen_rank_alone(crew: Processes, way: tuple[str, str], where: Where) -> None:
    options = {"layout": way[0], "weights_at": way[1]}
    with layer(crew, FOUR) as ranks:
        for report in harm(ranks, where, signal.SIGSTOP, deadline=DEADLINE, **options):
            check_harmed(report, where)
        check(
            ranks.call("moe_faults:steps", "layer", 3, deadline=DEADLINE, keep=True, ranks=REST, **options),
            gone=[VICTIM],
        )
        ranks.resume(VICTIM)
        hear_masked(ranks, VICTIM)
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=REST, **options), gone=[VICTIM])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=REST)) > 0


@pytest.mark.parametrize("where", [DISPATCH[0], DISPATCH[5], COMBINE[1]], ids=str)
def test_operations_behind_the_callers_back_end_when_a_rank_dies(crew: Processes, where: Where) -> None:
    with layer(crew, FOUR) as ranks:
        ranks.call("moe_faults:harm", where, ranks=[VICTIM])
        for rank in FOUR:
            ranks.tell(rank, "moe_faults:step_behind", "layer")
        for report in [ranks.hear(rank) for rank in REST]:
            assert report.seconds < SOON
            assert set(report.missing) | set(report.unheard) | set(report.lost) <= {VICTIM}
        ranks.children[VICTIM].wait_ended()
        for _ in range(3):
            for report in ranks.call("moe_faults:step_behind", "layer", ranks=REST):
                assert report.missing == (VICTIM,)

"""Ranks of two stages die, freeze, leave and come: all others agree, and what lives reaches all that lives."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

import pytest
from agent_tools import eventually
from moe_fault_crews import LONG, SOON, begun, mostly_slow
from moe_faults import COMBINE, DISPATCH, OPTIONS, Report, Where
from moe_tools import Processes
from weights_nursery import Nursery

from raynixl import Masked
from raynixl.host import process_state
from raynixl.moe import OnLost
from raynixl.moe.grid import Grid

WORLD = 5
GRID = Grid(((0, 1, 2), (3, 4)))  # columns (0, 3), (1, 4), (2, 3)
EVERYBODY = tuple(range(WORLD))
SHORT = 1.5
EVERY = 40
"""Operations of a round, at whose end all ranks stop alike."""


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Five processes; who is killed is replaced."""
    with Processes(WORLD, lent=nursery) as made:
        yield made


def options_of(ranks: Sequence[int], **more: object) -> dict[str, object]:
    """The arguments of a layer of these ranks."""
    grid = GRID if len(ranks) == WORLD else None
    return {"name": "layer", "deadline": LONG, "grid": grid, **OPTIONS, **more}


@contextlib.contextmanager
def layer(crew: Processes, ranks: Sequence[int] = EVERYBODY, **more: object) -> Iterator[Processes]:
    """The crew with a layer that it has used; nothing is left of it afterwards, and who was killed is replaced."""

    def begin() -> None:
        names = [crew.names[rank] for rank in ranks]
        crew.call("moe_staged_faults:make", names, options_of(ranks, **more), ranks=ranks)
        check(crew.call("moe_faults:steps", "layer", 2, ranks=ranks))

    with begun(crew, begin):
        yield crew


def check(found: Sequence[Sequence[Report]], *, gone: Sequence[int] = (), first: Sequence[int] = ()) -> None:
    """Fail unless steps were whole but for the ranks that were gone; `first` may be named by the first step."""
    for reports in found:
        for number, report in enumerate(reports):
            assert set(report.lost) <= (set(first) if number == 0 else set()), report
            assert set(report.missing) == set(gone), report
            assert set(report.unheard) == set(gone), report


def harm(crew: Processes, victim: int, where: Where, number: int, **options: object) -> list[Report]:
    """Have a rank come to harm at a place of a step; return what the others say of that step, which they keep."""
    crew.call("moe_staged_faults:harm", where, number, ranks=[victim])
    crew.tell(victim, "moe_faults:step", "layer", LONG)
    rest = [rank for rank in EVERYBODY if rank != victim]
    for rank in rest:
        crew.tell(rank, "moe_faults:step", "layer", keep=True, **options)
    found = [crew.hear(rank) for rank in rest]
    if number == signal.SIGKILL:
        crew.children[victim].wait_ended()
    else:
        eventually(lambda: process_state(crew.children[victim].pid) == "T", "the victim stands")
    return found


def check_harmed(found: Sequence[Report], victim: int, where: Where) -> None:
    """Fail unless a step in which a rank came to harm lacks what is its own, and all others have agreed on that.

    Where others may have returned before: but for what it had still to forward, rows to its group, sums to its columns.
    """
    rest = [rank for rank in EVERYBODY if rank != victim]
    mates = set(next(group for group in GRID.groups if victim in group))
    peers = {rank for column in GRID.columns_of(victim) for rank in GRID.column(column)}
    is_early = where.operation == "dispatch" and (where.kind, where.number) in (("line", 0), ("put", 0))
    for rank, report in zip(rest, found, strict=True):
        assert set(report.unheard) <= {victim, *(peers if rank in mates and not is_early else ())}
        assert set(report.missing) <= {victim, *(mates if rank in peers and not is_early else ())}
        assert set(report.lost) <= {victim}
        assert set(report.unheard) <= {victim} or report.lost
        if where.operation == "dispatch" or set(report.missing) > {victim}:
            assert report.active == tuple(rest)
            assert victim in report.missing
        assert report.active in (tuple(rest), EVERYBODY)  # who has returned before hears of it in the next step


PLACES = [(victim, where) for victim in (3, 0, 1) for where in (*DISPATCH, *COMBINE) if where.number < 2]


@pytest.mark.parametrize(("victim", "where"), mostly_slow(PLACES, 7), ids=str)
def test_others_forward_for_a_rank_that_is_killed_already_in_that_step(
    crew: Processes, victim: int, where: Where
) -> None:
    rest = [rank for rank in EVERYBODY if rank != victim]
    with layer(crew) as ranks:
        found = harm(ranks, victim, where, signal.SIGKILL)
        assert max(report.seconds for report in found) < SOON
        check_harmed(found, victim, where)
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=rest), gone=[victim], first=[victim])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=rest)) > 0


@pytest.mark.parametrize(("victim", "where"), [(3, DISPATCH[0]), (0, COMBINE[0])], ids=str)
def test_the_rest_makes_up_for_a_rank_that_is_killed(crew: Processes, victim: int, where: Where) -> None:
    """Nobody has returned from that operation, so that its terms are known to be missing."""
    rest = [rank for rank in EVERYBODY if rank != victim]
    with layer(crew, on_lost=OnLost.RENORMALISE) as ranks:
        for report in harm(ranks, victim, where, signal.SIGKILL):
            assert set(report.missing) == {victim}
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=rest), gone=[victim], first=[victim])


def come_back(crew: Processes, rank: int, how: str = "rejoin") -> None:
    """Have a rank rejoin beside others that go on; all steps are whole."""
    rest = [other for other in EVERYBODY if other != rank]
    if how == "rejoin":
        crew.tell(rank, "moe_staged_faults:rejoin", "layer")
    else:
        crew.tell(rank, "moe_staged_faults:join", crew.names, options_of(EVERYBODY), EVERYBODY, False)
    for other in rest:
        crew.tell(other, "moe_staged_faults:steps_until", "layer", EVERYBODY)
    found = [crew.hear(other) for other in rest]
    crew.hear(rank)
    check([each[:-1] for each in found], gone=[rank], first=[rank])
    check([each[-1:] for each in found])
    check(crew.call("moe_faults:steps", "layer", 3))


@pytest.mark.parametrize(
    ("victim", "where"),
    mostly_slow([(3, DISPATCH[0]), (3, DISPATCH[3]), (0, COMBINE[1]), (0, DISPATCH[5]), (3, COMBINE[0])], 3),
    ids=str,
)
def test_a_frozen_rank_is_forwarded_for_and_comes_back(crew: Processes, victim: int, where: Where) -> None:
    rest = [rank for rank in EVERYBODY if rank != victim]
    with layer(crew) as ranks:
        found = harm(ranks, victim, where, signal.SIGSTOP, deadline=SHORT)
        check_harmed(found, victim, where)
        assert max(report.seconds for report in found) < SHORT + SOON
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=rest), gone=[victim], first=[victim])
        ranks.resume(victim)
        with contextlib.suppress(Masked):
            ranks.hear(victim)
        with pytest.raises(Masked, match="rejoin"):
            ranks.call("moe_faults:step", "layer", ranks=[victim])
        check(ranks.call("moe_faults:steps", "layer", 1, ranks=rest), gone=[victim])
        assert min(ranks.call("moe_faults:held_is_as_it_was", ranks=rest)) > 0
        come_back(ranks, victim)


def test_who_holds_a_handle_of_before_lacks_what_was_lost_since(crew: Processes) -> None:
    for layout in ("tokens", "slots", "experts"):
        with layer(crew) as ranks:
            ranks.call("moe_staged_faults:first_handle", "layer", layout)
            ranks.kill(3)
            for _ in range(2):
                for report in ranks.call("moe_staged_faults:step_again", "layer", (3,), ranks=[0, 1, 2, 4]):
                    assert report.missing == (3,)
                    assert report.seconds < SOON
            check(ranks.call("moe_faults:steps", "layer", 2, ranks=[0, 1, 2, 4]), gone=[3])


@pytest.mark.parametrize("victims", mostly_slow([((3, 4),), ((0, 1),), ((1, 2, 4),), ((0, 3),)], 3), ids=str)
def test_several_are_killed_at_once_whole_groups_and_those_who_lead_among_them(
    crew: Processes, victims: tuple[int, ...]
) -> None:
    rest = [rank for rank in EVERYBODY if rank not in victims]
    with layer(crew) as ranks:
        ranks.call("moe_staged_faults:harm", DISPATCH[3], signal.SIGKILL, ranks=victims)
        for rank in EVERYBODY:
            ranks.tell(rank, "moe_faults:steps", "layer", 2)
        for reports in [ranks.hear(rank) for rank in rest]:
            for report in reports:
                assert report.seconds < SOON
        for victim in victims:
            ranks.children[victim].wait_ended()
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=rest), gone=victims)


def test_a_rank_that_is_killed_is_replaced_under_its_name_by_all_whom_it_meets(crew: Processes) -> None:
    with layer(crew) as ranks:
        for victim in (3, 0):
            ranks.kill(victim)
            rest = [rank for rank in EVERYBODY if rank != victim]
            reports = ranks.call("moe_faults:steps", "layer", 2, ranks=rest)
            check(reports, gone=[victim], first=[victim])
            ranks.restart(victim)
            come_back(ranks, victim, "make")


def let_join(crew: Processes, present: Sequence[int], new: Sequence[int]) -> None:
    """Have ranks join beside others that go on, all of whose steps are whole."""
    everybody = tuple(sorted([*present, *new]))
    names = crew.names[: max(everybody) + 1]
    crew.call("moe_faults:expect", "layer", names, ranks=present)
    for rank in new:
        crew.tell(rank, "moe_staged_faults:join", names, options_of(everybody[:1]), everybody)
    for rank in present:
        crew.tell(rank, "moe_staged_faults:steps_until", "layer", everybody, moves=True)
    for rank in everybody:
        assert all(report.lost == () for report in crew.hear(rank))
    check_settled(crew, everybody)


def check_settled(crew: Processes, ranks: Sequence[int]) -> None:
    """Fail unless these ranks hold all experts after a step, and steps are whole."""
    for reports in crew.call("moe_faults:steps", "layer", 4, moves=True, ranks=ranks):
        for report in reports:
            assert (report.active, report.lost) == (tuple(ranks), ())
        assert reports[-1].missing == ()
        assert set(reports[-1].unheard) <= set(EVERYBODY) - set(ranks)


def test_a_plan_of_memberships_under_load(crew: Processes) -> None:
    with layer(crew, [0, 1]):
        check_settled(crew, [0, 1])
        let_join(crew, [0, 1], [2, 3])
        crew.call("moe_faults:leave", "layer", [2], ranks=[0, 1, 2, 3])
        crew.call("moe_faults:steps", "layer", 1, moves=True, ranks=[0, 1, 3])  # it is named in this one
        check_settled(crew, [0, 1, 3])
        crew.call("moe_faults:unmask", "layer", 2, ranks=[0, 1, 3])
        let_join(crew, [0, 1, 3], [2, 4])


def test_a_masked_rank_stays_out_until_it_is_unmasked(crew: Processes) -> None:
    with layer(crew) as ranks:
        rest = [0, 1, 2, 4]
        ranks.call("moe_faults:mask", "layer", 3, ranks=rest)
        check(ranks.call("moe_faults:steps", "layer", 2, ranks=rest), gone=[3], first=[3])
        ranks.tell(3, "moe_staged_faults:rejoin", "layer")
        check(ranks.call("moe_faults:steps", "layer", 10, ranks=rest), gone=[3])
        ranks.call("moe_faults:unmask", "layer", 3, ranks=rest)
        for rank in rest:
            ranks.tell(rank, "moe_staged_faults:steps_until", "layer", EVERYBODY)
        for rank in EVERYBODY:
            ranks.hear(rank)
        check(ranks.call("moe_faults:steps", "layer", 2))


@pytest.mark.parametrize(
    ("victim", "where"),
    mostly_slow([(victim, where) for where in (DISPATCH[3], DISPATCH[0], COMBINE[0]) for victim in (0, 3)], 3),
    ids=str,
)
def test_a_rank_is_killed_while_another_joins(crew: Processes, victim: int, where: Where) -> None:
    first, joiner = [0, 1, 2, 3], 4
    rest = [rank for rank in first if rank != victim]
    with layer(crew, first) as ranks:
        options = options_of(first)
        ranks.call("moe_faults:expect", "layer", ranks.names, ranks=first)
        ranks.call("moe_staged_faults:harm", where, signal.SIGKILL, True, ranks=[victim])
        ranks.tell(joiner, "moe_staged_faults:join_round", ranks.names, options, EVERY)
        found, is_in = [], False
        while not is_in:
            for rank in first:
                if ranks.children[rank].is_alive:
                    ranks.tell(rank, "moe_staged_faults:one_round", "layer", EVERY)
            reports = [ranks.hear(rank) for rank in rest]
            found += reports
            if any(victim in each.missing for one in reports for each in one):
                ranks.children[victim].wait_ended()
            elif ranks.children[victim].is_alive:
                ranks.hear(victim)
            is_in = joiner in reports[0][-1].active
        found.append(ranks.hear(joiner))
        if ranks.children[victim].is_alive:  # who joined came in with the last step of a round: harm is in the next one
            for rank in EVERYBODY:
                ranks.tell(rank, "moe_staged_faults:one_round", "layer", EVERY)
            found += [ranks.hear(rank) for rank in (*rest, joiner)]
            ranks.children[victim].wait_ended()
        assert all(report.seconds < SOON for reports in found for report in reports)
        last = ranks.call("moe_faults:steps", "layer", 3, ranks=[*rest, joiner])
        assert {report.missing for reports in last for report in reports} == {(victim,)}

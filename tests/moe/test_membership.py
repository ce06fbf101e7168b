"""Ranks come and go under load: they join, leave, are killed and replaced, and experts move after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from moe_fault_crews import LONG, check, layer
from moe_faults import OPTIONS, Report
from moe_tools import Processes
from weights_nursery import Nursery

WORLD = 5


@pytest.fixture(scope="module")
def crew(nursery: Nursery) -> Iterator[Processes]:
    """Five processes; not all are members at first."""
    with Processes(WORLD, lent=nursery) as made:
        yield made


def let_join(crew: Processes, present: Sequence[int], new: Sequence[int]) -> None:
    """Have ranks join beside others that go on, all of whose steps are whole."""
    names, everybody = crew.names[: max(*present, *new) + 1], tuple(sorted([*present, *new]))
    crew.call("moe_faults:expect", "layer", names, ranks=present)
    for rank in new:
        crew.tell(
            rank, "moe_faults:join", names, {"name": "layer", "max_ranks": 8, "deadline": LONG, **OPTIONS}, everybody
        )
    for rank in present:
        crew.tell(rank, "moe_faults:steps_until", "layer", everybody, moves=True)
    found = {rank: crew.hear(rank) for rank in [*present, *new]}
    for reports in found.values():
        check_settled(reports)
    check_everybody(crew, everybody)


def check_settled(reports: Sequence[Report]) -> None:
    """Fail unless nobody was lost, and nothing is missing but what nobody held."""
    for report in reports:
        assert report.lost == (), report


def check_everybody(crew: Processes, ranks: Sequence[int]) -> None:
    """Fail unless these ranks hold all experts, and their steps are whole."""
    for reports in crew.call("moe_faults:steps", "layer", 4, moves=True, ranks=ranks):
        for report in reports:
            assert report.active == tuple(ranks)
            assert report.lost == ()
        assert reports[-1].missing == ()
        assert set(reports[-1].unheard) <= set(range(WORLD)) - set(ranks)


def test_a_plan_of_memberships_under_load(crew: Processes) -> None:
    with layer(crew, [0, 1], max_ranks=8):
        check_everybody(crew, [0, 1])
        let_join(crew, [0, 1], [2, 3])
        crew.call("moe_faults:leave", "layer", [2], ranks=[0, 1, 2, 3])
        check_everybody(crew, [0, 1, 3])
        crew.call("moe_faults:unmask", "layer", 2, ranks=[0, 1, 3])
        let_join(crew, [0, 1, 3], [2, 4])
        assert crew.call("moe_faults:quarantined", "layer") == [[]] * WORLD


def test_a_rank_that_is_killed_is_replaced_under_its_name(crew: Processes) -> None:
    with layer(crew, max_ranks=8):
        for victim in (1, 4):
            rest = [rank for rank in range(WORLD) if rank != victim]
            crew.kill(victim)
            for reports in crew.call("moe_faults:steps", "layer", 3, ranks=rest):
                assert {rank for report in reports for rank in report.lost} == {victim}
            crew.restart(victim)
            let_join(crew, rest, [victim])
        assert crew.call("moe_faults:quarantined", "layer") == [[]] * WORLD


def test_who_was_away_while_others_came_learns_of_them(crew: Processes) -> None:
    with layer(crew, [0, 1, 2], max_ranks=8):
        crew.call("moe_faults:mask", "layer", 2, ranks=[0, 1])
        check(crew.call("moe_faults:steps", "layer", 2, ranks=[0, 1]), gone=[2])
        let_join(crew, [0, 1], [3])  # and experts move
        crew.call("moe_faults:unmask", "layer", 2, ranks=[0, 1, 3])
        crew.tell(2, "moe_faults:rejoin", "layer", moves=True)
        for rank in (0, 1, 3):
            crew.tell(rank, "moe_faults:steps_until", "layer", (0, 1, 2, 3), moves=True)
        for rank in range(4):
            crew.hear(rank)
        check_everybody(crew, [0, 1, 2, 3])

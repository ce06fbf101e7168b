"""Until when a rank waits: who is silent, who is excused, what notices of others change; by tables, without a clock."""

from __future__ import annotations

import itertools

import pytest

from raynixl.moe.patience import LEAST, Patience, masked_number, notice_number, reserve, says_masked


@pytest.mark.parametrize(
    ("deadline", "needed", "kept"),
    [(1.0, 0.0, 0.2), (5.0, 0.0, 1.0), (30.0, 0.0, 2.0), (30.0, 5.0, 5.0), (30.0, 99.0, 10.0), (-1.0, 0.0, 0.0)],
)
def test_a_share_of_the_time_is_kept_for_the_next_phase(deadline: float, needed: float, kept: float) -> None:
    assert reserve(100.0, 100.0 + deadline, needed) == pytest.approx(kept)


def test_who_is_silent_is_given_up_before_who_is_excused_and_all_by_the_deadline() -> None:
    patience = Patience.of(7, 0.0, 10.0, 2.0)
    patience.hear(1, notice_number(6, 5.0), 1.0)  # it is a phase behind: it waits for another rank
    assert patience.until(0) == 8.0
    assert patience.until(1) == 10.0


@pytest.mark.parametrize(("phase", "end"), [(7, 6.0), (8, 4.0)])
def test_the_earliest_of_those_who_wait_decides(phase: int, end: float) -> None:
    """Who is ahead has heard all others: then nobody comes later because of somebody else, whatever it told before."""
    patience = Patience.of(7, 0.0, 10.0, 2.0)
    patience.hear(1, notice_number(phase, 3.0), 1.0)
    patience.hear(2, notice_number(6, 9.0), 1.0)
    assert patience.until(0) == pytest.approx(4.0, abs=2e-3)
    assert patience.until(2) == pytest.approx(end, abs=2e-3)
    patience.hear(1, notice_number(phase, 3.0), 3.0)  # the same again is no news
    assert patience.until(0) == pytest.approx(4.0, abs=2e-3)


def test_who_has_begun_the_phase_is_excused_no_more() -> None:
    patience = Patience.of(7, 0.0, 10.0, 2.0)
    patience.is_here(1)
    patience.hear(1, notice_number(6, 5.0), 1.0)
    assert patience.until(1) == 8.0


@pytest.mark.parametrize(
    "notice", [0, masked_number(7), notice_number(5, 0.0), notice_number(9, 0.0), notice_number(0, 0.0)]
)
def test_notices_of_other_phases_change_nothing(notice: int) -> None:
    patience = Patience.of(7, 0.0, 10.0, 2.0)
    patience.hear(1, notice, 1.0)
    assert [patience.until(rank) for rank in (0, 1)] == [8.0, 8.0]


def test_a_phase_that_begins_late_has_a_moment_still() -> None:
    patience = Patience.of(7, 11.0, 10.0, 2.0)
    assert 11.0 < patience.until(0) < 11.0 + LEAST
    assert Patience.of(7, 9.0, 10.0, 2.0).until(0) == 9.5  # half of what is left, at the least


def test_numbers_of_notices_grow() -> None:
    numbers = [
        notice_number(phase, remaining)
        for phase, remaining in itertools.product((0, 1, 2, 1 << 30, (1 << 39) - 2), (1e9, 30.0, 29.0, 0.5, 0.0, -1.0))
    ]
    assert numbers == sorted(numbers)
    masked = [masked_number(0), masked_number(1), masked_number(1 << 40)]
    assert masked == sorted(masked)
    assert numbers[-1] < masked[0]
    assert masked[-1] < 1 << 64


def test_who_was_masked_before_it_was_let_in_is_not_masked_by_that() -> None:
    assert not says_masked(masked_number(4), 5)
    assert says_masked(masked_number(5), 5)
    assert says_masked(masked_number(0), 0)
    assert not says_masked(notice_number((1 << 39) - 1, 0.0), 0)

"""A lane finds out whether its peer is there: by a read that must be without an answer for all the patience."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raynixl.backends import ucx_lane
from raynixl.backends.ucx_lane import Lane
from raynixl.native import DONE, LOST, PENDING, RESET

PATIENCE = 5.0


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


class FakeProgram:
    """A read of a word: it notes its runs, each a job that goes on until the test ends it."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.timeouts: list[float] = []
        self.refusal = 0

    def run(self, timeout: float, *, out_of_line: bool) -> Any:
        """Post it, or be refused at once."""
        assert out_of_line
        self.timeouts.append(timeout)
        if self.refusal:
            return self.refusal
        self.jobs.append(SimpleNamespace(code=PENDING))
        return self.jobs[-1]


class FakeEndpoint:
    """An endpoint that stands until it is closed."""

    transports, status, code = ("posix",), "", 0

    def close(self, code: int) -> None:
        """Note it."""
        self.code = code


class OneRail:
    """A rail that reaches everybody by shared memory."""

    def connect(self, _worker: bytes) -> Any:
        """Make an endpoint."""
        return FakeEndpoint()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The lane's clock."""
    made = Clock()
    monkeypatch.setattr(ucx_lane, "time", made, raising=False)
    return made


@pytest.fixture
def program() -> FakeProgram:
    """The program that reads the peer's word."""
    return FakeProgram()


@pytest.fixture
def lane(program: FakeProgram) -> Lane:
    """A lane that is watched."""
    made = Lane("bob", [OneRail()], [b"bob"], lambda _: OneRail())  # type: ignore[list-item]
    made.watch_by(program)  # type: ignore[arg-type]
    return made


def test_a_peer_is_silent_when_it_has_not_answered_for_all_the_patience(
    lane: Lane, program: FakeProgram, clock: Clock
) -> None:
    assert not lane.is_silent(PATIENCE)
    for _ in range(4):
        clock.now += 1.0
        assert not lane.is_silent(PATIENCE)
    clock.now += 1.0
    assert lane.is_silent(PATIENCE)
    assert len(program.jobs) == 1
    assert program.timeouts[0] > PATIENCE, "the read must not have ended when it is looked at"


def test_a_peer_that_answers_late_is_not_silent_and_is_asked_anew(
    lane: Lane, program: FakeProgram, clock: Clock
) -> None:
    assert not lane.is_silent(PATIENCE)
    clock.now += PATIENCE - 0.1
    program.jobs[0].code = DONE
    assert not lane.is_silent(PATIENCE)
    assert len(program.jobs) == 2
    clock.now += PATIENCE - 0.1
    assert not lane.is_silent(PATIENCE)
    clock.now += 0.1
    assert lane.is_silent(PATIENCE)


def test_an_answer_counts_however_long_nobody_looked(lane: Lane, program: FakeProgram, clock: Clock) -> None:
    assert not lane.is_silent(PATIENCE)
    clock.now += 100 * PATIENCE
    program.jobs[0].code = DONE
    assert not lane.is_silent(PATIENCE)


def test_a_lane_that_cannot_read_or_has_failed_says_nothing_of_its_peer(
    lane: Lane, program: FakeProgram, clock: Clock
) -> None:
    program.refusal = LOST
    assert not lane.is_silent(PATIENCE)
    clock.now += 2 * PATIENCE
    program.refusal = 0
    assert not lane.is_silent(PATIENCE)
    clock.now += 2 * PATIENCE
    lane.fail(RESET)
    assert not lane.is_silent(PATIENCE)

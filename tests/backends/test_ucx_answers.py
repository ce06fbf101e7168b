"""Answers to peers who ask for keys: at once where nothing is to be done, else on threads, of which there are few."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agent_tools import eventually
from rail_fakes import INCARNATION, FakeLink, fake_local

from raynixl import BackendUnavailable, RegionStale, TransferTimeout
from raynixl.backends.ucx_answers import MAX_AT_A_TIME, Answers
from raynixl.backends.ucx_key import unseal_workers
from raynixl.backends.ucx_wireup import Answer, Ask, Refusal, parse_wireup, unpack

pytestmark = pytest.mark.usefixtures("nothing_left")


class SlowExports:
    """Exports whose regions take as long to map as the test wants."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.waiting = 0
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self.has_mapped = False
        self._lock = threading.Lock()  # protects waiting and threads

    def is_mapped(self, _number: int) -> bool:
        """As the test wants it."""
        return self.has_mapped

    def sealed(self, number: int, _link: object) -> bytes:
        """Wait, then answer or raise."""
        with self._lock:
            self.waiting += 1
            self.threads.add(threading.get_ident())
        assert self.has_mapped or self.may_go_on.wait(20.0)
        if self.error is not None:
            raise self.error
        return f"keys of {number}".encode()

    def why_slow(self, number: int) -> str:
        """Nothing here is on a GPU."""
        return ""


@pytest.fixture
def exports() -> Iterator[SlowExports]:
    """Exports that take their time until they may go on."""
    made = SlowExports()
    yield made
    made.may_go_on.set()


@pytest.fixture
def answers(exports: SlowExports, nothing_left: Callable[[], list[str]]) -> Answers:
    """Answers of an agent with one worker."""
    return Answers(fake_local(), exports, workers=lambda: [b"worker"], window=lambda: 65536)  # type: ignore[arg-type]


def ask(answers: Answers, link: FakeLink, number: int = 1) -> None:
    """Let a question come in."""
    answers.give(link, Ask(number=number, region=number))  # type: ignore[arg-type]


def heard(link: FakeLink, count: int = 1) -> list[Any]:
    """Wait for so many replies, in the order of their numbers."""
    eventually(lambda: len(link.sent) >= count, f"{count} replies")
    return sorted((parse_wireup(body) for body in link.sent), key=lambda one: one.number)  # type: ignore[union-attr]


def test_what_needs_no_work_is_answered_at_once_by_the_same_thread(answers: Answers, exports: SlowExports) -> None:
    exports.has_mapped, link = True, FakeLink()
    ask(answers, link, 5)
    assert exports.threads == {threading.get_ident()}
    (reply,) = [parse_wireup(body) for body in link.sent]
    assert isinstance(reply, Answer)
    assert (reply.number, unpack(reply.sealed)) == (5, b"keys of 5")
    assert unseal_workers(unpack(reply.workers), incarnation=INCARNATION) == (b"worker",)


def test_what_takes_long_keeps_nobody_waiting(answers: Answers, exports: SlowExports) -> None:
    link = FakeLink()
    ask(answers, link)
    assert link.sent == []
    exports.may_go_on.set()
    assert isinstance(heard(link)[0], Answer)
    assert threading.get_ident() not in exports.threads


def test_so_many_threads_at_a_time_and_no_more(answers: Answers, exports: SlowExports) -> None:
    link = FakeLink()
    for number in range(1, MAX_AT_A_TIME + 11):
        ask(answers, link, number)
    refused = heard(link, 10)
    assert [one.number for one in refused] == list(range(MAX_AT_A_TIME + 1, MAX_AT_A_TIME + 11))
    for one in refused:
        assert isinstance(one, Refusal)
        assert isinstance(one.to_error("alice"), TransferTimeout)
        assert ("overloaded" in one.message, bool(one.hint)) == (True, True)
    eventually(lambda: exports.waiting == MAX_AT_A_TIME, "the others are being worked on")
    exports.may_go_on.set()
    assert sum(isinstance(one, Answer) for one in heard(link, MAX_AT_A_TIME + 10)) == MAX_AT_A_TIME
    eventually(lambda: not any(one.name == "raynixl-key" for one in threading.enumerate()), "all threads ended")
    later = FakeLink()
    ask(answers, later, 99)
    assert isinstance(heard(later)[0], Answer)


def test_an_error_is_told_to_who_asked_and_frees_its_place(answers: Answers, exports: SlowExports) -> None:
    exports.error = BackendUnavailable("region 1 cannot be pinned", hint="ulimit -l")
    exports.may_go_on.set()
    for _ in range(MAX_AT_A_TIME + 5):
        link = FakeLink()
        ask(answers, link)
        error = heard(link)[0].to_error("alice")
        assert (type(error), error.message, error.hint) == (
            BackendUnavailable, "region 1 cannot be pinned", "ulimit -l"
        )  # fmt: skip
        eventually(lambda: answers._running == 0, "its place is free")


@pytest.mark.parametrize("has_mapped", [True, False], ids=["at once", "on a thread"])
def test_an_error_that_nobody_expected_is_told_too_and_logged(
    answers: Answers, exports: SlowExports, caplog: pytest.LogCaptureFixture, *, has_mapped: bool
) -> None:
    exports.has_mapped, exports.error, link = has_mapped, OSError(errno.EMFILE, "Too many open files"), FakeLink()
    exports.may_go_on.set()
    ask(answers, link)
    error = heard(link)[0].to_error("alice")
    assert type(error) is BackendUnavailable
    assert "Too many open files" in error.message
    assert "Too many open files" in caplog.text
    eventually(lambda: answers._running == 0, "its place is free")


def test_long_errors_are_cut_to_what_a_message_may_hold(answers: Answers, exports: SlowExports) -> None:
    exports.has_mapped, exports.error, link = True, RegionStale("m" * 9999, hint="h" * 9999), FakeLink()
    ask(answers, link)
    (reply,) = heard(link)
    assert isinstance(reply.to_error("alice"), RegionStale)
    assert (len(reply.message), len(reply.hint)) == (4000, 1000)


def test_a_peer_that_left_meanwhile_harms_nobody(answers: Answers, exports: SlowExports) -> None:
    link, other = FakeLink(), FakeLink()
    ask(answers, link)
    link.die(has_hung_up=True)
    ask(answers, other)
    exports.may_go_on.set()
    assert isinstance(heard(other)[0], Answer)
    eventually(lambda: answers._running == 0, "both are over")
    assert link.sent == []


def test_a_process_without_threads_to_spare_refuses(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(MAX_AT_A_TIME + 5):
        link = FakeLink()
        ask(answers, link)
        (reply,) = heard(link)
        assert isinstance(reply.to_error("alice"), TransferTimeout)
        assert "can't start new thread" in reply.message

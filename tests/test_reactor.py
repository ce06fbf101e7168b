"""The reactor: callbacks one at a time, timers on time, no wake-up lost, no polling while idle."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from agent_tools import PATIENCE, eventually

from raynixl.errors import ConfigError
from raynixl.reactor import Reactor

pytestmark = [pytest.mark.pure, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def reactor(nothing_left: Callable[[], list[str]]) -> Iterator[Reactor]:
    """A reactor that is closed at the end."""
    reactor = Reactor("test")
    yield reactor
    reactor.close()


@pytest.fixture
def bells(nothing_left: Callable[[], list[str]]) -> Iterator[Callable[[], int]]:
    """Event descriptors, closed at the end unless the test closed them."""
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def soon(deadline: float = PATIENCE) -> float:
    """A monotonic deadline."""
    return time.monotonic() + deadline


def test_calls_are_made_in_order_and_one_at_a_time(reactor: Reactor) -> None:
    seen: list[int] = []
    inside, overlaps = [0], [0]

    def call(number: int) -> None:
        inside[0] += 1
        overlaps[0] += inside[0] > 1
        seen.append(number)
        inside[0] -= 1

    for number in range(1000):
        reactor.call_soon(lambda number=number: call(number))
    assert reactor.run_until(lambda: len(seen) == 1000, soon())
    assert seen == list(range(1000))
    assert overlaps == [0]


def test_timers_run_in_the_order_of_their_times_and_not_before(reactor: Reactor) -> None:
    seen: list[tuple[str, float]] = []
    began = time.monotonic()
    for name, delay in (("late", 0.06), ("soon", 0.02), ("now", 0.0)):
        reactor.call_later(delay, lambda name=name, delay=delay: seen.append((name, time.monotonic() - began - delay)))
    assert reactor.run_until(lambda: len(seen) == 3, soon())
    assert [name for name, _ in seen] == ["now", "soon", "late"]
    assert all(late >= 0 for _, late in seen)


def test_a_timer_runs_while_nobody_waits(reactor: Reactor) -> None:
    rung = threading.Event()
    reactor.call_later(0.01, rung.set)
    assert rung.wait(PATIENCE)


def test_a_timer_set_by_a_callback_of_either_thread_runs(reactor: Reactor) -> None:
    ends: list[int] = []
    reactor.call_soon(lambda: reactor.call_later(0.01, lambda: ends.append(1)))
    eventually(lambda: ends == [1], "the service thread's timer")
    reactor.call_soon(lambda: reactor.call_later(0.01, lambda: ends.append(2)))
    assert reactor.run_until(lambda: ends == [1, 2], soon())


def test_a_cancelled_timer_does_not_run(reactor: Reactor) -> None:
    seen: list[str] = []
    first = reactor.call_later(0.01, lambda: seen.append("first"))
    reactor.call_later(0.02, lambda: seen.append("second"))
    first.cancel()
    assert reactor.run_until(lambda: bool(seen), soon())
    assert seen == ["second"]
    first.cancel()


def test_cancelled_timers_are_forgotten_before_their_time(reactor: Reactor) -> None:
    for _ in range(10_000):
        reactor.call_later(3000.0, lambda: None).cancel()
    assert len(reactor._timers) < 1000


def test_a_failing_callback_is_logged_and_the_others_go_on(
    reactor: Reactor, bells: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    bell = bells()

    def fail(_mask: int = 0) -> None:
        if bell in seen:
            os.eventfd_read(bell)
        seen.append(bell)
        raise ValueError("broken callback")

    with caplog.at_level(logging.ERROR):
        reactor.add(bell, fail)
        os.eventfd_write(bell, 1)
        reactor.call_soon(fail)
        reactor.call_soon(lambda: seen.append(-1))
        assert reactor.run_until(lambda: -1 in seen and seen.count(bell) >= 2, soon())
    assert "broken callback" in caplog.text


def test_a_waiter_may_not_wait_inside_a_callback(reactor: Reactor) -> None:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            reactor.run_until(lambda: False, soon())
        except ConfigError as exc:
            caught.append(exc)

    reactor.call_soon(wait)
    eventually(lambda: caught, "the refusal on the service thread")
    reactor.call_soon(wait)
    assert reactor.run_until(lambda: len(caught) == 2, soon())


def test_a_wait_ends_at_its_deadline(reactor: Reactor) -> None:
    began = time.monotonic()
    assert not reactor.run_until(lambda: False, began + 0.05)
    assert time.monotonic() >= began + 0.05


def test_many_threads_wait_and_each_gets_its_own(reactor: Reactor) -> None:
    flags = [threading.Event() for _ in range(32)]
    got: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: got.append(n) if reactor.run_until(flags[n].is_set, soon()) else None)
        for n in range(32)
    ]
    for thread in threads:
        thread.start()
    for number in (*range(31, 15, -1), *range(16)):  # leaders leave before, after and between their followers
        reactor.call_soon(flags[number].set)
        eventually(lambda number=number: number in got, f"thread {number} to get its answer")
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(got) == list(range(32))


def test_conversations_of_many_threads_lose_no_wake_up(reactor: Reactor, bells: Callable[[], int]) -> None:
    rounds, threads_count = 300, 6
    finished: list[int] = []

    def converse() -> None:
        bell, heard = bells(), [0]

        def hear(_mask: int) -> None:
            os.eventfd_read(bell)
            heard[0] += 1

        reactor.add(bell, hear)
        for turn in range(1, rounds + 1):
            os.eventfd_write(bell, 1)
            if not reactor.run_until(lambda turn=turn: heard[0] >= turn, soon()):
                return
        reactor.remove(bell)
        finished.append(bell)

    threads = [threading.Thread(target=converse) for _ in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    assert len(finished) == threads_count


def test_descriptors_are_served_again_after_a_leader_left(reactor: Reactor, bells: Callable[[], int]) -> None:
    bell, heard = bells(), []

    def hear(_mask: int) -> None:
        heard.append(os.eventfd_read(bell))

    reactor.add(bell, hear)
    for turn in range(1, 50):
        assert not reactor.run_until(lambda: False, time.monotonic() + 0.001)
        os.eventfd_write(bell, 1)
        eventually(lambda turn=turn: len(heard) == turn, "the service thread to take over")


def test_an_event_of_a_removed_descriptor_does_not_reach_its_successor(
    reactor: Reactor, bells: Callable[[], int]
) -> None:
    """Both are ready in one poll; the first to be served closes the other, whose number is given out anew."""
    pair, fresh = (bells(), bells()), bells()
    called, wrong, served = [], [], threading.Event()

    def replace_other(mine: int, other: int) -> None:
        called.append(mine)
        os.eventfd_read(mine)
        if len(called) == 1:
            reactor.remove(other)
            os.dup2(fresh, other)  # the number now means another, quiet descriptor
            reactor.add(other, wrong.append)
            reactor.call_soon(lambda: reactor.call_soon(served.set))

    def begin() -> None:
        for mine, other in (pair, pair[::-1]):
            os.eventfd_write(mine, 1)
            reactor.add(mine, lambda _mask, mine=mine, other=other: replace_other(mine, other))

    reactor.call_soon(begin)
    assert reactor.run_until(served.is_set, soon())
    assert len(called) == 1
    assert not wrong


def test_close_ends_every_wait(nothing_left: Callable[[], list[str]]) -> None:
    reactor = Reactor("closing")
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(reactor.run_until(lambda: False, soon(60)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: reactor._followers == 3, "three threads to follow a fourth")
    reactor.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [False] * 4
    reactor.close()
    assert reactor.is_closed
    reactor.wake()
    assert not reactor.run_until(lambda: False, soon())


def test_close_makes_the_calls_that_were_asked_for(nothing_left: Callable[[], list[str]]) -> None:
    reactor = Reactor("closing")
    seen: list[int] = []
    for number in range(100):
        reactor.call_soon(lambda number=number: seen.append(number))
    reactor.close()
    assert seen == list(range(100))


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_an_idle_reactor_does_not_poll(reactor: Reactor, is_waited_for: bool) -> None:
    """Counted in dispatches, not in seconds: a busy machine changes nothing."""
    leader = threading.Thread(target=lambda: reactor.run_until(lambda: False, soon(0.4)))
    if is_waited_for:
        leader.start()
        eventually(lambda: reactor._led is not None, "a leader")
    rounds = [0]
    run_timers, dispatch = reactor._run_timers, reactor._dispatch
    reactor._run_timers = lambda: (rounds.__setitem__(0, rounds[0] + 1), run_timers())[1]  # type: ignore[method-assign]
    reactor._dispatch = lambda events: (rounds.__setitem__(0, rounds[0] + 1), dispatch(events))[1]  # type: ignore[method-assign]
    threading.Event().wait(0.3)
    assert rounds[0] <= 2
    if is_waited_for:
        leader.join(PATIENCE)


def test_a_leader_that_sleeps_leaves_the_service_thread_asleep(reactor: Reactor, bells: Callable[[], int]) -> None:
    """The inner descriptor is masked while a caller leads: else readiness would wake both, again and again."""
    bell, spins = bells(), [0]
    run_timers = reactor._run_timers
    reactor._run_timers = lambda: (spins.__setitem__(0, spins[0] + 1), run_timers())[1]  # type: ignore[method-assign]
    heard: list[int] = []

    def hear(_mask: int) -> None:
        heard.append(1)
        if len(heard) == 50:
            os.eventfd_read(bell)

    reactor.add(bell, hear)

    def ring() -> None:
        eventually(lambda: reactor._led is not None, "a leader")
        spins[0] = 0
        os.eventfd_write(bell, 1)

    ringer = threading.Thread(target=ring)
    ringer.start()
    assert reactor.run_until(lambda: len(heard) >= 50, soon())
    ringer.join(PATIENCE)
    assert spins[0] <= 5


@pytest.mark.parametrize("is_led", [False, True], ids=["service thread", "leading caller"])
def test_close_does_not_wait_for_a_callback_that_blocks(
    nothing_left: Callable[[], list[str]], caplog: pytest.LogCaptureFixture, is_led: bool
) -> None:
    """The descriptors stay open under the callback, and go when it ends."""
    reactor = Reactor("blocked")
    inside, go_on = threading.Event(), threading.Event()
    leader = threading.Thread(target=lambda: reactor.run_until(inside.is_set, soon()))
    if is_led:
        leader.start()
        eventually(lambda: reactor._led is not None, "a leader")

    def block_here() -> None:
        inside.set()
        go_on.wait(PATIENCE)

    reactor.call_soon(block_here)
    assert inside.wait(PATIENCE)
    with caplog.at_level(logging.ERROR):
        reactor.close(0.05)
    assert reactor.is_closed
    assert "block_here" in caplog.text
    os.eventfd_write(reactor._bell, 1)  # still its own
    go_on.set()
    eventually(lambda: not reactor._are_bells_open, "the last to lead lets go")
    if is_led:
        leader.join(PATIENCE)
    reactor._thread.join(PATIENCE)

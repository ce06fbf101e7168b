"""The reactor: one epoll, served by one thread, or by a caller who waits in its place.

A thread that waits for a message takes over the polling while it waits, so that the kernel wakes it and
nobody else: one hand-over instead of two (16 us against 105 us for a round trip between idle processes).
A caller whose last wait was short looks for a moment before it sleeps, since waking a core costs 20 to 50 us.
While nobody waits the reactor's own thread sleeps in epoll without the interpreter's lock.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from raynixl.conditions import Condition
from raynixl.errors import ConfigError

logger = logging.getLogger(__name__)

_FOREVER = 3600.0
_SHORT_WAIT_NS = 200_000
"""A wait that ends within this time is a conversation: the next one begins by looking instead of sleeping."""
_LOOK_NS = 100_000
_MIN_TIDY = 256


class Timer:
    """A pending call of the reactor; `cancel` makes it void."""

    __slots__ = ("action", "when")

    def __init__(self, when: float, action: Callable[[], None] | None) -> None:
        self.when = when
        self.action = action

    def cancel(self) -> None:
        """Forget the call; safe from any thread and after it ran."""
        self.action = None


class Reactor:
    """Calls back when descriptors are ready and timers are due, on whichever thread polls.

    Callbacks run one at a time, must not block and must not call `run_until`. Any thread may call anything here.
    """

    def __init__(self, name: str) -> None:
        self._inner = select.epoll()  # every descriptor of the agent
        self._outer = select.epoll()  # the inner epoll (masked while a caller leads) and the service bell
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes whoever polls the inner epoll
        self._service_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inner.register(self._bell, select.EPOLLIN)
        self._outer.register(self._inner.fileno(), select.EPOLLIN)
        self._outer.register(self._service_bell, select.EPOLLIN)
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._tidy_at = _MIN_TIDY  # how many timers make it worth while to sweep out the cancelled
        self._order = itertools.count()
        self._lock = threading.RLock()  # protects _timers, _tidy_at, _led, _followers
        self._lead = threading.Lock()  # held by the thread that dispatches
        self._changed = Condition(self._lock)
        self._bells = threading.Lock()  # protects the bells from being rung after they are closed
        self._are_bells_open = True
        self._led: int | None = None  # ident of the caller that leads, if one does
        self._followers = 0
        self._is_talking = False  # under _lead
        self._closed = False
        self._is_over = False  # the service thread is not polling any more: whoever leads lets go at its end
        self._thread = threading.Thread(target=self._serve, name=f"raynixl-{name}"[:15], daemon=True)
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the service thread."""
        return threading.current_thread() is self._thread

    @property
    def is_dispatching(self) -> bool:
        """Whether the caller is inside a callback, where it must not wait."""
        return self._led == threading.get_ident() or self.is_own_thread

    @property
    def is_closed(self) -> bool:
        """Whether close was called."""
        return self._closed

    def add(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Watch a descriptor; the callback gets the epoll events."""
        self._callbacks[fd] = callback
        self._inner.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Watch other events of a descriptor."""
        self._inner.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Watch a descriptor no more; call before closing it."""
        if self._callbacks.pop(fd, None) is not None:
            self._inner.unregister(fd)

    def call_soon(self, action: Callable[[], None]) -> None:
        """Call on the polling thread, soon."""
        self._calls.append(action)
        self.wake()

    def call_later(self, delay: float, action: Callable[[], None]) -> Timer:
        """Call on the polling thread after `delay` seconds."""
        timer = Timer(time.monotonic() + delay, action)
        with self._lock:
            first = not self._timers or timer.when < self._timers[0][0]
            heapq.heappush(self._timers, (timer.when, next(self._order), timer))
            if len(self._timers) >= self._tidy_at:
                self._tidy_timers()
        if first and not self.is_own_thread:
            self._ring(self._service_bell)
        return timer

    def wake(self) -> None:
        """Make every thread in `run_until` look at its condition again."""
        self._ring(self._bell)

    def run_until(self, is_ready: Callable[[], bool], deadline: float) -> bool:
        """Wait, serving the reactor meanwhile, until `is_ready()` or the monotonic deadline; return which."""
        if self.is_dispatching:
            raise ConfigError("what runs on the polling thread must not wait", hint="serve(..., threaded=True)")
        while not is_ready():
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._closed:
                return is_ready()
            if self._lead.acquire(blocking=False):
                self._lead_until(is_ready, deadline)
            else:
                self._follow(is_ready, remaining)
        return True

    def close(self, timeout: float = 5.0) -> None:
        """Stop serving and let go of the descriptors; idempotent. Not from a callback of a leading caller.

        A callback that still blocks after `timeout` keeps the descriptors, and they go when it ends.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._ring(self._service_bell)
        self.wake()
        if not self.is_own_thread:
            self._thread.join(timeout)
        self._is_over = True
        if self._lead.acquire(timeout=max(0.1, deadline - time.monotonic())):  # a leading caller leaves at the bell
            self._stop_leading()
        else:
            logger.error("a callback still blocks a reactor that was closed:\n%s", self._where_it_blocks())

    def _let_go(self) -> None:
        """Make the calls that were asked for and close the descriptors; _lead is held."""
        while self._calls:  # such as links that were closed a moment ago and hold descriptors
            self._guard(self._calls.popleft())
        with self._bells:
            if not self._are_bells_open:
                return
            self._are_bells_open = False
            self._inner.close()
            self._outer.close()
            os.close(self._bell)
            os.close(self._service_bell)
            self._callbacks.clear()

    def _where_it_blocks(self) -> str:
        """Return the stack of the thread that dispatches."""
        ident = self._led or self._thread.ident
        frame = None if ident is None else sys._current_frames().get(ident)
        return "".join(traceback.format_stack(frame)) if frame is not None else "it has just ended"

    def _stop_leading(self) -> None:
        """Release _lead; the last to lead a reactor that is over lets go of it."""
        try:
            if self._is_over:
                self._let_go()
        finally:
            self._lead.release()

    def _lead_until(self, is_ready: Callable[[], bool], deadline: float) -> None:
        """Poll in the service thread's place; the caller has taken _lead."""
        try:
            if self._closed:
                return
            self._led = threading.get_ident()
            self._outer.modify(self._inner.fileno(), 0)
            began = time.monotonic_ns()
            look_until = began + _LOOK_NS if self._is_talking else 0
            while not is_ready() and not self._closed:
                now = time.monotonic_ns()
                remaining = deadline - now * 1e-9
                if remaining <= 0:
                    return
                self._dispatch(self._inner.poll(0 if now < look_until else min(remaining, _FOREVER)))
            self._is_talking = time.monotonic_ns() - began < _SHORT_WAIT_NS
        finally:
            if self._led is not None:
                self._led = None
                if not self._closed:
                    self._outer.modify(self._inner.fileno(), select.EPOLLIN)
            self._stop_leading()
            if self._followers:
                with self._lock:
                    self._changed.notify_all()

    def _follow(self, is_ready: Callable[[], bool], remaining: float) -> None:
        """Wait for another thread's dispatching to bring what this one waits for."""
        with self._lock:
            self._followers += 1
            try:
                if not is_ready() and self._lead.locked():
                    self._changed.wait(remaining)
            finally:
                self._followers -= 1

    def _serve(self) -> None:
        while not self._closed:
            events = self._outer.poll(self._run_timers())
            if self._closed:
                return
            for fd, _ in events:
                if fd == self._service_bell:
                    self._drain(self._service_bell)
                elif self._lead.acquire(blocking=False):
                    try:
                        if not self._closed:
                            self._dispatch(self._inner.poll(0))
                    finally:
                        self._stop_leading()
                    if self._followers:
                        with self._lock:
                            self._changed.notify_all()

    def _tidy_timers(self) -> None:
        """Forget cancelled timers, which most are; _lock is held. Done so seldom that a timer pays nothing for it."""
        self._timers = [entry for entry in self._timers if entry[2].action is not None]
        heapq.heapify(self._timers)
        self._tidy_at = max(_MIN_TIDY, 2 * len(self._timers))

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        meant = [self._callbacks.get(fd) for fd, _ in events]
        for (fd, mask), callback in zip(events, meant, strict=True):
            if fd == self._bell:
                self._drain(self._bell)
                while self._calls:
                    self._guard(self._calls.popleft())
                continue
            # A callback before this one may have closed the descriptor, and its number may be another's by now.
            if callback is not None and self._callbacks.get(fd) is callback:
                try:
                    callback(mask)
                except Exception:
                    logger.exception("a reactor callback failed")
        if self._followers:
            with self._lock:
                self._changed.notify_all()

    def _run_timers(self) -> float:
        """Call what is due; return seconds until the next."""
        while True:
            with self._lock:
                if not self._timers:
                    return _FOREVER
                when, _, timer = self._timers[0]
                remaining = when - time.monotonic()
                if timer.action is not None and remaining > 0:
                    return min(remaining, _FOREVER)
                heapq.heappop(self._timers)
            action, timer.action = timer.action, None
            if action is not None:
                self.call_soon(action)  # so that no two callbacks ever run at once

    @staticmethod
    def _guard(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # thread edge: one failed call must not end the service of all others
            logger.exception("a reactor call failed")

    def _ring(self, bell: int) -> None:
        with self._bells:
            if self._are_bells_open:
                try:
                    os.eventfd_write(bell, 1)
                except BlockingIOError:
                    return  # full: it rings already

    @staticmethod
    def _drain(bell: int) -> None:
        try:
            os.eventfd_read(bell)
        except BlockingIOError:
            return

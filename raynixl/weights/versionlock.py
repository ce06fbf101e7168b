"""The version lock: readers pin a version, and a flip waits for them and then has the weights alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from raynixl.conditions import Condition
from raynixl.errors import TransferTimeout

_LOOK_SECONDS = 0.1
"""How often a waiting flip looks for readers that ended without leaving."""


def _do_nothing() -> None:
    pass


class VersionLock:
    """Many readers, or one flip; a waiting flip goes before new readers.

    Pins are counted for each thread, so one that has a pin gets more at once, also while a flip waits, and the
    flip's own thread may read. A pin of a thread that has ended, or of a frame that was left by an exception that
    skips hooks (KeyboardInterrupt), counts no more. `leaving` is called by a reader that is about to leave.
    """

    def __init__(self, leaving: Callable[[], None] = _do_nothing) -> None:
        self._leaving = leaving
        self._changed = Condition()  # protects everything below
        self._pins: dict[threading.Thread, list[FrameType | None]] = {}
        self._writer: threading.Thread | None = None
        self._waiting = 0

    def __repr__(self) -> str:
        return f"VersionLock({len(self._pins)} readers, {'a flip' if self._writer else 'no flip'})"

    def pin(self, timeout: float, *, frame: FrameType | None = None) -> threading.Thread:
        """Take a pin for this thread, valid while `frame` runs if one is given; return what `unpin` takes.

        Raises:
            TransferTimeout: a flip went on for too long.
        """
        thread = threading.current_thread()
        with self._changed:
            is_inside = thread in self._pins or self._writer is thread
            if not (is_inside or self._changed.wait_for(self._is_calm, timeout)):
                raise TransferTimeout(
                    f"a flip has kept readers waiting for {timeout:g} s", hint="see what on_flip does"
                )
            self._pins.setdefault(thread, []).append(frame)
        return thread

    def unpin(self, thread: threading.Thread) -> None:
        """Give back one pin of a thread; more than were taken are ignored."""
        try:
            self._leaving()
        finally:
            self._drop(thread)

    def _drop(self, thread: threading.Thread) -> None:
        with self._changed:
            pins = self._pins.get(thread)
            if not pins:
                return
            pins.pop()
            if not pins:
                del self._pins[thread]
                self._changed.notify_all()

    @contextmanager
    def writing(self, timeout: float) -> Iterator[None]:
        """Wait for the readers to leave and keep new ones out.

        Raises:
            TransferTimeout: some reader did not leave in time; all goes on as before.
        """
        self.hold(timeout)
        try:
            yield
        finally:
            self.let_go()

    def adopt(self) -> None:
        """Have this thread go on as the one that `hold` was called by."""
        with self._changed:
            self._writer = threading.current_thread()

    def let_go(self) -> None:
        """Let readers in again."""
        with self._changed:
            self._writer = None
            self._changed.notify_all()

    def _is_calm(self) -> bool:
        return self._writer is None and not self._waiting

    def hold(self, timeout: float) -> None:
        """Wait for the readers to leave and keep new ones out until `let_go`, which any thread may call.

        Raises:
            TransferTimeout: some reader did not leave in time; all goes on as before.
        """
        deadline = time.monotonic() + timeout
        me = threading.current_thread()
        with self._changed:
            self._waiting += 1
            try:
                while self._writer is not None or any(thread is not me for thread in self._pins):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise self._stuck(timeout)
                    if not self._changed.wait(min(left, _LOOK_SECONDS)):
                        self._forget_ended()
                self._writer = me
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def _forget_ended(self) -> None:
        frames = sys._current_frames()
        for thread, pins in list(self._pins.items()):
            running = _stack(frames.get(thread.ident or 0))
            kept = [frame for frame in pins if thread.is_alive() and (frame is None or frame in running)]
            if kept:
                self._pins[thread] = kept
            else:
                del self._pins[thread]

    def _stuck(self, timeout: float) -> TransferTimeout:
        names = ", ".join(sorted(thread.name for thread in self._pins)) or "another flip"
        return TransferTimeout(
            f"readers of the old version did not leave within {timeout:g} s: {names}",
            hint="the old version stays; make read sections shorter, or flip_timeout longer",
        )


def _stack(frame: FrameType | None) -> set[FrameType]:
    frames = set()
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    return frames

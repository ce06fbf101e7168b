"""The watch: a thread that looks at the jobs of a GPU, so that those whom nobody waits for end and are reported too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_LEAST_PAUSE, _MOST_PAUSE = 50e-6, 2e-3
_GROWTH = 1.25
_QUIET = 50
"""Looks without a job in flight, after which the thread sleeps until there is one: waking it disturbs who posts."""


class Watch:
    """Calls `look`, which says whether jobs are left: seldom, unless somebody is in a hurry, and not without jobs."""

    def __init__(self, look: Callable[[], bool], name: str) -> None:
        self._look = look
        self._name = name
        self._bell = threading.Event()
        self._lock = threading.Lock()  # protects _is_awake, _thread
        self._is_awake = False
        self._thread: threading.Thread | None = None
        self._is_hurried = False
        self._is_closed = False
        self._has_failed = False

    def wake(self) -> None:
        """Hear of a job, which `look` sees by now."""
        with self._lock:
            if self._is_awake or not self._has_thread():
                return
            self._is_awake = True
        self._bell.set()

    def _has_thread(self) -> bool:
        """Start the thread if there is none. Where there can be none, those who wait look by themselves."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # the next job tries again
                logger.warning("jobs of a GPU are not watched: %s", exc)
                return False
            self._thread = thread
        return True

    def hurry(self) -> None:
        """Look more often for a while: somebody sleeps until a job has ended."""
        self._is_hurried = True
        self._bell.set()

    def close(self, timeout: float) -> None:
        """End the thread."""
        self._is_closed = True
        self._bell.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        pause, quiet = _MOST_PAUSE, 0
        while not self._is_closed:
            self._bell.wait(pause)
            self._bell.clear()
            pause = _LEAST_PAUSE if self._is_hurried else min(_MOST_PAUSE, _GROWTH * pause)
            self._is_hurried = False
            quiet = 0 if self._look_safely() else quiet + 1
            if quiet >= _QUIET and self._may_sleep():
                self._bell.wait()
                quiet = 0

    def _look_safely(self) -> bool:
        try:
            return self._look()
        except Exception:  # thread edge: the next look may do better, and other jobs depend on it
            if not self._has_failed:
                self._has_failed = True
                logger.exception("looking at the jobs of a GPU failed; said once")
            return True

    def _may_sleep(self) -> bool:
        """Whether there is no job; who comes with one from now on wakes us."""
        with self._lock:
            self._is_awake = self._look_safely()
            return not self._is_awake and not self._is_closed

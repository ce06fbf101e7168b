"""A busy interpreter: a thread that runs pure Python meanwhile, as an application's own code does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raynixl.bench.timing import Runner


@contextmanager
def busy_thread() -> Iterator[None]:
    """Keep the interpreter's lock wanted by another thread."""
    is_over, is_running = threading.Event(), threading.Event()

    def spin() -> None:
        is_running.set()
        total = 0
        while not is_over.is_set():
            for number in range(1000):
                total += number

    thread = threading.Thread(target=spin, name="bench-busy", daemon=True)
    thread.start()
    is_running.wait(5.0)
    try:
        yield
    finally:
        is_over.set()
        thread.join(5.0)


class BusyRunner:
    """Runs another runner beside a busy thread."""

    def __init__(self, runner: Runner) -> None:
        self.impl, self.prepare_seconds = runner.impl, runner.prepare_seconds
        self._runner = runner

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each."""
        with busy_thread():
            return self._runner.sample(count)

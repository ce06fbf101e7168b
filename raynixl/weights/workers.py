"""Workers: a few threads that share numbered pieces of work and stop at the first failure."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

Worker = Callable[[int], None]


def start_threads(work: Callable[[], None], count: int, *, name: str) -> list[threading.Thread]:
    """Start so many threads, or as many of them as the process may have; the caller joins those returned."""
    started: list[threading.Thread] = []
    for _ in range(count):
        thread = threading.Thread(target=work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            logger.warning("%d of %d threads could be started: %s", len(started), count, exc)
            break
        started.append(thread)
    return started


def run_workers(worker: Worker, count: int, *, threads: int) -> None:
    """Call `worker(number)` for each number below `count` on `threads` threads, the caller's included.

    Returns when no thread works any more. Each call must be bounded in time.

    Raises:
        BaseException: the first failure; what had not begun by then is left undone.
    """
    numbers = itertools.count()  # next() on it is atomic under the interpreter's lock
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures and (number := next(numbers)) < count:
                worker(number)
        except BaseException as exc:  # noqa: BLE001 - thread edge: the caller raises it
            failures.append(exc)

    helpers = start_threads(work, min(threads, count) - 1, name="raynixl-weights")
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]

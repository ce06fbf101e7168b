"""Workers: a few threads that share numbered pieces of work and stop at the first failure."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

Worker = Callable[[int], None]


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

    helpers = [
        threading.Thread(target=work, name="raynixl-weights", daemon=True) for _ in range(min(threads, count) - 1)
    ]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]

"""Timing: runners measured in turn, round by round, and what is said about their times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.int64]

ROUND_SECONDS = 0.1
"""How long one runner is measured in one round."""
MAX_POSTS = 4000
"""Posts of one round; a tight loop of thousands for the small ones."""


class Runner(Protocol):
    """One implementation of the measured operation, ready to run."""

    impl: str
    prepare_seconds: float

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector from running inside a measurement, as timeit does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(runners: Sequence[Runner], rounds: int, step: Callable[[], None]) -> list[Nanoseconds]:
    """Return the times of every runner, measured in turn; every other round in the opposite order."""
    with quiet():
        counts = [calibrate(runner) for runner in runners]
        times: list[list[int]] = [[] for _ in runners]
        for number in range(rounds):
            order = range(len(runners)) if number % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                times[index] += runners[index].sample(counts[index])
            step()
    return [np.array(each, np.int64) for each in times]


def calibrate(runner: Runner) -> int:
    """Warm a runner up; return how many runs fit one round."""
    runner.sample(2)
    start = time.perf_counter()
    runner.sample(2)
    seconds = (time.perf_counter() - start) / 2
    return int(min(MAX_POSTS, max(1, ROUND_SECONDS / seconds)))


def median_us(times: Nanoseconds) -> float:
    """Return the median in microseconds."""
    return float(np.median(times)) / 1e3


def percentile_us(times: Nanoseconds, percent: float) -> float:
    """Return a percentile in microseconds."""
    return float(np.percentile(times, percent)) / 1e3


def rounded(value: float) -> float:
    """Return a figure with five significant digits, fit to be printed."""
    return float(f"{value:.5g}")

"""A mover on a made-up driver, memory that it moves, and ways to wait."""

from __future__ import annotations

import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_fake import FakeCuda

from raynixl.backends.nvlink_tiles import Tuning
from raynixl.native import Job

MIB = 1 << 20
PATIENCE = 10.0
WAYS = {
    "small": [(3, 5, 1000)],
    "range": [(0, 64, 700_001)],
    "tiles": [(k * 9000, k * 9000 + 1, 8000) for k in range(60)],
    "narrow": [(k * 900, k * 900 + 8, 80) for k in range(60)],
    "engine": [(0, 0, MIB)],
}
TUNING = Tuning(engine_nbytes=MIB)


class Pair:
    """Two pieces of a GPU's memory that the user has."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self.source, self.target = fake.make(MIB), fake.make(MIB)
        self.data = np.random.default_rng(0).integers(0, 256, MIB, np.uint8)
        fake.view(self.source, MIB)[:] = self.data
        fake.view(self.target, MIB)[:] = 0

    def table(self, rows: list[tuple[int, int, int]]) -> Any:
        """Rows of offsets as addresses."""
        return np.array(rows, np.uint64).reshape(-1, 3) + np.array([self.source, self.target, 0], np.uint64)

    def has(self, rows: list[tuple[int, int, int]]) -> bool:
        """Whether the rows have been copied, and nothing else."""
        wanted = np.zeros(MIB, np.uint8)
        for source, target, nbytes in rows:
            wanted[target : target + nbytes] = self.data[source : source + nbytes]
        return bool((self._fake.view(self.target, MIB) == wanted).all())

    @property
    def is_untouched(self) -> bool:
        return not self._fake.view(self.target, MIB).any()


def as_job(result: int | Job) -> Job:
    assert not isinstance(result, int), result
    return result


def is_readable(fd: int, patience: float = PATIENCE) -> bool:
    return bool(select.select([fd], [], [], patience)[0])


def wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.001)


def holds_in_child(is_so: Callable[[], bool]) -> bool:
    """Fork, and return whether something is so in the child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks among threads: we mean it
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if is_so() else 2
        finally:
            os._exit(code)
    ended: list[int] = []

    def is_over() -> bool:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            ended.append(os.waitstatus_to_exitcode(status))
        return bool(ended)

    try:
        wait_until(is_over)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return ended == [0]

"""A barrier of processes on one host: words in a shared file, and nothing else, so that it can stand beside a clock."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np

from raynixl.errors import TransferTimeout

_LINE_WORDS = 8  # a cache line for each rank
_LAZY_SECONDS = 2e-5
_LOOKS = 256  # looks between two looks at the clock


class StepBarrier:
    """Makes ranks begin a step together. Whoever comes early sleeps, so that it takes no core from those still at work.

    When all are there they look without sleeping until all know it: ranks go on within some microseconds of each
    other where there are cores for all.
    """

    def __init__(self, path: Path, rank: int, ranks: int, *, seconds: float = 60.0) -> None:
        nbytes = 2 * ranks * _LINE_WORDS * 8
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, nbytes)
            words = np.frombuffer(mmap.mmap(fd, nbytes), np.int64)
        finally:
            os.close(fd)
        self._lines = words.reshape(2, ranks, _LINE_WORDS)[:, :, 0]
        self._rank, self._seconds, self._step = rank, seconds, 0

    def wait(self) -> None:
        """Return when every rank has called this as often.

        Raises:
            TransferTimeout: somebody did not come.
        """
        self._step += 1
        came, ready = self._lines
        came[self._rank] = self._step
        deadline = time.monotonic() + self._seconds
        while came.min() < self._step:
            time.sleep(_LAZY_SECONDS)
            self._check(deadline)
        ready[self._rank] = self._step
        while True:
            for _ in range(_LOOKS):
                if ready.min() >= self._step:
                    return
                os.sched_yield()
            self._check(deadline)

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            late = int(self._lines[0].argmin())
            raise TransferTimeout(f"rank {late} did not begin a step within {self._seconds:g} s", hint="see its error")

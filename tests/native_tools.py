"""Tools to point a copy engine at memory; shared by the tests in tests/native."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from raynixl.native import COPY, PENDING, Engine, Gate, Job, Program

KIB = 1 << 10
MIB = 1 << 20
INLINE = 256 * KIB
BIG = 64 * MIB


def table(*rows: tuple[int, int, int]) -> np.ndarray:
    """Rows of (source address, destination address, nbytes) as a program takes them."""
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def address_of(array: np.ndarray) -> int:
    """Where an array's bytes are."""
    return int(array.ctypes.data)


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    """Bytes that differ from place to place."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def copier(engine: Engine, source: np.ndarray, target: np.ndarray, gates: Sequence[Gate] = ()) -> Program:
    """A program that copies one array onto another."""
    return engine.program(COPY, 0, table((address_of(source), address_of(target), source.nbytes)), gates)


def wait_threads_gone(known: set[str], timeout: float = 5.0) -> None:
    """Wait until this process has no threads but the known: the kernel lists a joined one for a moment longer."""
    deadline = time.monotonic() + timeout
    while not set(os.listdir("/proc/self/task")) <= known:
        assert time.monotonic() < deadline, "threads are left"
        time.sleep(0.001)


def finish(result: Any, timeout: float = 30.0) -> int:
    """The code of a run, waited for if it is a job."""
    if isinstance(result, int):
        return result
    assert result.wait(timeout)
    return int(result.code)


def started(program: object) -> Job:
    """A job of which at least one piece is complete."""
    job = program.run(60.0)  # type: ignore[attr-defined]
    while job.nbytes_done == 0 and job.code == PENDING:
        time.sleep(0.001)
    assert job.code == PENDING
    return job

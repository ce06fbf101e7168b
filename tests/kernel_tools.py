"""Memory, movers and a busy stream for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.backends.nvlink_mover import Mover
from raynixl.backends.nvlink_tiles import Tuning, Way
from raynixl.native import DONE, Gate, Job, load

POISON = 0xA5
PATIENCE = 30.0
WAYS = {
    Way.TILES: Tuning(small_nbytes=0, engine_rows=0, narrow_nbytes=0),
    Way.NARROW: Tuning(small_nbytes=0, engine_rows=0, narrow_nbytes=1 << 40),
    Way.RANGE: Tuning(small_nbytes=0, engine_rows=0),
    Way.SMALL: Tuning(small_nbytes=1 << 30),
    Way.ENGINE: Tuning(small_nbytes=0, engine_rows=1 << 20, engine_nbytes=0),
}
"""What makes a mover go one way only."""

Bytes = npt.NDArray[np.uint8]
_SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < nanoseconds);
}
"""


@contextmanager
def moving(way: Way) -> Iterator[Mover]:
    """A mover of the first GPU that goes one way."""
    made = Mover(0, WAYS[way])
    yield made
    made.close()


def new_gate() -> Gate:
    """An open gate."""
    return load(native=True).Gate()


def settle() -> None:
    """Wait for what cupy does."""
    import cupy

    cupy.cuda.Device(0).synchronize()


def uploaded(data: npt.NDArray[Any]) -> Any:
    """A copy on the GPU, which is there."""
    import cupy

    made = cupy.asarray(data)
    settle()
    return made


def random_bytes(nbytes: int, seed: int = 0) -> Bytes:
    """Bytes that repeat nowhere."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def end_of(result: int | Job, patience: float = PATIENCE) -> int:
    """The code of what `run` returned, once it has ended."""
    if isinstance(result, int):
        return result
    assert result.wait(patience), "the GPU does not come to the end"
    return result.code


def copied(mover: Mover, data: Bytes, rows: npt.NDArray[np.uint64], target_nbytes: int) -> Bytes:
    """What a target full of poison holds after rows of offsets have been copied into it."""
    import cupy

    source, target = uploaded(data), cupy.full(target_nbytes, POISON, cupy.uint8)
    settle()
    gate = new_gate()
    table = rows.astype(np.uint64) + np.array([source.data.ptr, target.data.ptr, 0], np.uint64)
    assert end_of(mover.program(table, [gate]).run(PATIENCE)) == DONE
    assert gate.inflight == 0
    return target.get()


def expected(data: Bytes, rows: npt.NDArray[np.uint64], target_nbytes: int) -> Bytes:
    """What it must hold."""
    target = np.full(target_nbytes, POISON, np.uint8)
    for source, at, nbytes in rows.tolist():
        target[at : at + nbytes] = data[source : source + nbytes]
    return target


def keep_busy(stream: Any, seconds: float) -> None:
    """Have a stream of cupy take so long."""
    import cupy

    spin = cupy.RawKernel(_SPIN, "spin")
    with stream:
        spin((1,), (1,), (np.int64(seconds * 1e9),))

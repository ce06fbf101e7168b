"""Digests of bytes in a GPU's memory, made there by one kernel: the same values as the core's (native/digest.h)."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.nvlink_mover import Mover, mover
from raynixl.backends.nvlink_program import GpuProgram, Start
from raynixl.errors import BackendUnavailable, TransferTimeout
from raynixl.native import CANCELLED, DONE, PENDING
from raynixl.native.twin_digest import BLOCK_NBYTES, check_rows, lane_keys

U64 = npt.NDArray[np.uint64]

_THREADS, _WARPS = 256, 8
_CTAS = 4
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 32  # a warp makes the factors of 32 blocks at once
_ROWS_PER_WARP = 4


def digest_rows(device: int, rows: U64, out: U64, *, seed: int, stream: int = 0, timeout: float = 60.0) -> None:
    """Add the digest of each row of (address, nbytes, position, index) to `out[index]`, modulo 2^64.

    Addresses are in memory that the GPU reaches, and hold what is on `stream` now when that is through. Returns when
    the sums have been added; this thread waits without the interpreter's lock.

    Raises:
        ValueError, TypeError: the rows or sums do not fit; see `raynixl.native.Native.digest_rows`.
        BackendUnavailable: kernels cannot be compiled here, or the GPU has failed.
        TransferTimeout: it is not through in time.
    """
    check_rows(rows, out, seed)
    if not rows[:, 1].any():
        return
    gpu = mover(device)
    deadline = time.monotonic() + timeout
    cut = cut_blocks(rows, _tile_nbytes(rows, gpu))
    sums = np.zeros(2 * len(out), np.uint64)
    held = gpu.transit.upload(np.concatenate([cut.reshape(-1), sums]))
    where = held.address + cut.nbytes
    grid = min(gpu.multiprocessors * _CTAS, -(-len(cut) // _WARPS))
    values = [held.address, len(cut), where, *lane_keys(seed).tolist()]
    start = Start(gpu.launcher("raynixl_digest", grid, _THREADS, values), held)
    program = GpuProgram(gpu, start, (), count=len(rows), nbytes=int(rows[:, 1].sum()))
    _run(program, cuda.record(stream, device), timeout)
    gpu.transit.download(where, sums, max(0.001, deadline - time.monotonic()))
    out += sums.reshape(out.shape)


def cut_blocks(rows: U64, tile: int) -> U64:
    """Cut rows where their positions are multiples of a tile, itself one of a block's length."""
    rows = rows[rows[:, 1] > 0]
    step = np.uint64(tile)
    first = rows[:, 2] // step
    parts = ((rows[:, 2] + rows[:, 1] - np.uint64(1)) // step - first + np.uint64(1)).astype(np.int64)
    row = np.repeat(np.arange(len(rows)), parts)
    number = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64)
    bound = (first[row] + number) * step
    start = np.maximum(bound, rows[row, 2])
    nbytes = np.minimum(
        bound - start + step, rows[row, 2] + rows[row, 1] - start
    )  # modulo 2^64: the bound may be behind
    return np.column_stack([rows[row, 0] + (start - rows[row, 2]), nbytes, start, rows[row, 3]])


def _tile_nbytes(rows: U64, gpu: Mover) -> int:
    """Return what one warp takes at a time: enough for all warps, if there is."""
    warps = gpu.multiprocessors * _CTAS * _WARPS
    blocks = int(rows[:, 1].sum()) // (BLOCK_NBYTES * warps * _ROWS_PER_WARP)
    return BLOCK_NBYTES * min(_MOST_BLOCKS, max(_LEAST_BLOCKS, 1 << max(0, blocks.bit_length() - 1)))


def _run(program: GpuProgram, event: cuda.Event, timeout: float) -> None:
    try:
        code = program.run_after(timeout, event)
    finally:
        event.close()
    if not isinstance(code, int):
        job = code
        job.wait(timeout)
        code = job.code
        if code == PENDING:
            job.cancel(CANCELLED)
    if code < 0:
        raise BackendUnavailable("the GPU has failed while it made digests", hint="see the log, and nvidia-smi")
    if code != DONE:
        raise TransferTimeout(f"digests of {program.nbytes} bytes took more than {timeout:g} s", hint="see nvidia-smi")

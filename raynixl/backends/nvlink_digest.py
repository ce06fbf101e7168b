"""Digests of bytes in a GPU's memory, made there by one kernel: the same values as the core's (native/digest.h)."""

from __future__ import annotations

import functools
import threading

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.nvlink_mover import Mover, mover
from raynixl.backends.nvlink_program import GpuProgram, Start
from raynixl.backends.nvlink_slabs import Piece
from raynixl.backends.nvlink_transit import Arrival
from raynixl.errors import BackendUnavailable, TransferTimeout
from raynixl.native import DONE
from raynixl.native.twin_digest import BLOCK_NBYTES, check_rows, lane_keys

U64 = npt.NDArray[np.uint64]

_THREADS, _WARPS = 256, 8
_CTAS = 3
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 32  # a warp makes the factors of 32 blocks at once
_TILES_PER_WARP = 4
_NEAR_ROWS = 64  # so many are read by the GPU from the host's memory, once for each CTA; nvlink_kernels.cu has it too
_COLUMNS = 5


def digest_rows(device: int, rows: U64, out: U64, *, seed: int, stream: int = 0, timeout: float = 60.0) -> None:
    """Add the digest of each row of (address, nbytes, position, index) to `out[index]`, modulo 2^64.

    Addresses are in memory that the GPU reaches, and hold what is on `stream` now when that is through. Returns when
    the sums have been added; this thread waits without the interpreter's lock. Any thread may call it.

    Raises:
        ValueError, TypeError: the rows or sums do not fit; see `raynixl.native.Native.digest_rows`.
        BackendUnavailable: kernels cannot be compiled here, or the GPU has failed.
        TransferTimeout: it is not through in time.
    """
    check_rows(rows, out, seed)
    rows = rows[rows[:, 1] > 0]
    if not len(rows):
        return
    gpu = mover(device)
    scratches: _Scratches = cuda.kept(("digests", device), lambda: _Scratches(gpu))
    nbytes = int(rows[:, 1].sum())
    table, tiles, tile = number_tiles(rows, tile_nbytes(nbytes, gpu.multiprocessors * _CTAS * _WARPS))
    scratch = scratches.take(len(out))
    where, held = scratch.put(gpu, table)
    grid = min(gpu.multiprocessors * _CTAS, -(-tiles // _WARPS))
    values = [where, len(table), tiles, tile, scratch.sums.address, scratch.out_address, len(out), *_keys(seed)]
    arrivals = (scratch.zeroed,) if held is None else (scratch.zeroed, held)
    start = Start(gpu.launcher("raynixl_digest", grid, _THREADS, values), (scratch, held), arrivals)
    event = cuda.record(stream, device)
    try:
        code = GpuProgram(gpu, start, (), count=len(rows), nbytes=nbytes).run_to_end(timeout, event)
    finally:
        event.close()
    if code < 0:
        raise BackendUnavailable("the GPU has failed while it made digests", hint="see the log, and nvidia-smi")
    if code != DONE:
        raise TransferTimeout(f"digests of {nbytes} bytes took more than {timeout:g} s", hint="see nvidia-smi")
    out += scratch.out[: out.size].reshape(out.shape)
    scratches.give(scratch)


def number_tiles(rows: U64, tile: int) -> tuple[U64, int, int]:
    """Return rows with the number of the first tile of each beside them, how many tiles there are, and their length.

    Tiles end where positions are multiples of their length.
    """
    step = np.uint64(tile)
    last = rows[:, 2] + (rows[:, 1] - np.uint64(1))
    counts = last // step - rows[:, 2] // step + np.uint64(1)
    ends = np.cumsum(counts, dtype=np.uint64)
    return np.column_stack([rows, ends - counts]), int(ends[-1]), tile


def tile_nbytes(nbytes: int, warps: int) -> int:
    """Return what one warp takes at a time, in whole blocks: enough for all warps, if there is."""
    blocks = nbytes // (BLOCK_NBYTES * warps * _TILES_PER_WARP)
    return BLOCK_NBYTES * min(_MOST_BLOCKS, max(_LEAST_BLOCKS, 1 << max(0, blocks.bit_length() - 1)))


@functools.lru_cache(maxsize=16)
def _keys(seed: int) -> tuple[int, int]:
    first, second = lane_keys(seed).tolist()
    return first, second


class _Scratch:
    """What one call works with: sums on the GPU, zeros between calls, and pinned memory for rows and results."""

    def __init__(self, gpu: Mover, sums: int) -> None:
        near, out = 8 * _COLUMNS * _NEAR_ROWS, 16 * sums
        self.count = sums
        self.sums: Piece = gpu.tables.take(out)
        self.zeroed = gpu.transit.zero(self.sums)
        self._pinned = gpu.pinned.take(near + out)
        with cuda.on(gpu.device):
            self._near_address = cuda.host_device_address(self._pinned.address)
        self.out_address = self._near_address + near
        view = np.frombuffer(cuda.host_bytes(self._pinned.address, near + out), np.uint64)
        self._near, self.out = view[: near // 8], view[near // 8 :]

    def put(self, gpu: Mover, table: U64) -> tuple[int, Arrival | None]:
        """Put rows where the GPU reads them; return the address, and what is to be held besides."""
        if len(table) > _NEAR_ROWS:
            held = gpu.transit.upload(table)
            return held.piece.address, held
        self._near[: table.size] = table.reshape(-1)
        return self._near_address, None


class _Scratches:
    """Those of a GPU that nobody works with."""

    def __init__(self, gpu: Mover) -> None:
        self._gpu = gpu
        self._lock = threading.Lock()  # protects _idle
        self._idle: dict[int, list[_Scratch]] = {}

    def take(self, sums: int) -> _Scratch:
        """Return one for so many sums; who does not give it back because it was not through drops it."""
        count = max(256, 1 << (sums - 1).bit_length())
        with self._lock:
            idle = self._idle.get(count)
            if idle:
                return idle.pop()
        return _Scratch(self._gpu, count)

    def give(self, scratch: _Scratch) -> None:
        """Take one back, whose sums are zeros again."""
        with self._lock:
            self._idle.setdefault(scratch.count, []).append(scratch)

    def close(self) -> None:
        """Let go of them."""
        self._idle.clear()

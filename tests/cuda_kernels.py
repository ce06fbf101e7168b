"""What the kernels of nvlink_kernels.cu do, in numpy, for the fake driver; also in place of compiling them."""

from __future__ import annotations

from ctypes import c_uint64
from typing import Any

import numpy as np
from cuda_fake import FakeCuda

from raynixl.backends import nvlink_kernel
from raynixl.native.twin_digest import BLOCK_NBYTES, CONSTANTS

_END = (c_uint64, c_uint64, c_uint64)
_SIDE = 128


def register(fake: FakeCuda) -> None:
    """Have a fake driver know the kernels, until it is finished."""
    _stand_in_for_the_compiler(fake)
    fake.kernel("raynixl_copy_small", c_uint64, c_uint64, c_uint64, *_END)(_small)
    fake.kernel("raynixl_copy_range", c_uint64, c_uint64, c_uint64, c_uint64, *_END)(_range)
    fake.kernel("raynixl_copy_tiles", c_uint64, c_uint64, *_END)(_tiles)
    fake.kernel("raynixl_copy_narrow", c_uint64, c_uint64, *_END)(_tiles)
    fake.kernel("raynixl_signal", *_END)(_signal)
    fake.kernel("raynixl_digest", *[c_uint64] * 9, *_END)(_digest)
    for kind in ("float32", "bfloat16", "float16"):
        fake.kernel(f"raynixl_quantise_{kind}", *[c_uint64] * 5)(_quantiser(kind))


def _stand_in_for_the_compiler(fake: FakeCuda) -> None:
    compiler, finish = nvlink_kernel.image_for, fake.finish
    nvlink_kernel.image_for = lambda architecture, options=(), sources=(): b"not compiled"

    def finished() -> None:
        nvlink_kernel.image_for = compiler
        finish()

    fake.finish = finished  # type: ignore[method-assign]


def _words(gpu: Any, address: int, count: int) -> Any:
    return gpu.view(address, 8 * count).view(np.uint64)


def _finish(gpu: Any, flag: int, sequence: int, counter: int) -> None:
    counted = gpu.view(counter, 8).view(np.uint32)
    assert counted[0] == 0, "two kernels use one counter at a time"
    if sequence == 0:
        counted[1] += 1
        sequence = int(counted[1])
    word = _words(gpu, flag, 1)
    assert sequence > int(word[0]), "ends come in another order than they were put on the lane"
    word[0] = sequence


def _copy(gpu: Any, source: int, target: int, nbytes: int) -> None:
    if nbytes:
        gpu.view(target, nbytes)[:] = gpu.view(source, nbytes).copy()


def _small(gpu: Any, grid: Any, source: int, target: int, nbytes: int, *end: int) -> None:
    assert grid == (1, 1, 1)
    _copy(gpu, source, target, nbytes)
    _finish(gpu, *end)


def _range(gpu: Any, grid: Any, source: int, target: int, nbytes: int, tile: int, *end: int) -> None:
    assert tile > 0
    assert tile % 128 == 0
    _copy(gpu, source, target, nbytes)
    _finish(gpu, *end)


def _tiles(gpu: Any, grid: Any, rows: int, count: int, *end: int) -> None:
    for source, target, nbytes in _words(gpu, rows, 3 * count).reshape(-1, 3).tolist() if count else ():
        _copy(gpu, source, target, nbytes)
    _finish(gpu, *end)


def _signal(gpu: Any, grid: Any, *end: int) -> None:
    assert grid == (1, 1, 1)
    _finish(gpu, *end)


def _digest(gpu: Any, grid: Any, rows: int, *values: int) -> None:
    count, tiles, tile, sums, out, sums_count, first, second, *end = values
    assert tile % BLOCK_NBYTES == 0, "tiles are whole blocks"
    assert tile <= 32 * BLOCK_NBYTES, "a warp makes the factors of 32 blocks"
    table = _words(gpu, rows, 5 * count).reshape(-1, 5).tolist() if count else []
    keys, found = np.array([first, second], np.uint64), np.zeros((sums_count, 2), np.uint64)
    for number, (address, nbytes, position, index, first_tile) in enumerate(table):
        last_tile = first_tile + (position + nbytes - 1) // tile - position // tile
        assert last_tile + 1 == (table[number + 1][4] if number + 1 < count else tiles), "tiles are counted wrongly"
        skew = position % BLOCK_NBYTES
        blocks = -(-(skew + nbytes) // BLOCK_NBYTES)
        padded = np.zeros(blocks * BLOCK_NBYTES, np.uint8)
        padded[skew : skew + nbytes] = gpu.view(address, nbytes)
        words = padded.view(np.uint32).reshape(blocks, -1).astype(np.uint64)
        numbers = np.arange(blocks, dtype=np.uint64) + np.uint64(position // BLOCK_NBYTES + 1)
        factors = _mix((numbers * np.uint64(0x9E3779B97F4A7C15))[:, None] + keys) | np.uint64(1)
        parts = np.stack([(words * constants).sum(axis=1) for constants in CONSTANTS], axis=1)
        found[index] += (parts * factors).sum(axis=0)
    if sums_count:
        assert not _words(gpu, sums, 2 * sums_count).any(), "sums are not zeros before"
        _words(gpu, out, 2 * sums_count)[:] = found.reshape(-1)
    _finish(gpu, *end)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _quantiser(kind: str) -> Any:
    def run(gpu: Any, grid: Any, source: int, stored: int, scales: int, rows: int, columns: int) -> None:
        if rows == columns == 1:  # the mover warms up: torch takes a second to be imported
            return
        import torch

        from raynixl.weights.quantising import quantise

        down, across = -(-rows // _SIDE), -(-columns // _SIDE)
        matrices = grid[0] // (down * across)
        dtype = getattr(torch, kind)
        count = matrices * rows * columns
        data = torch.frombuffer(bytearray(gpu.view(source, count * dtype.itemsize)), dtype=dtype)
        values = torch.empty((matrices, rows, columns), dtype=torch.float8_e4m3fn)
        scale = torch.empty((matrices, down, across), dtype=torch.float32)
        quantise(data.view(matrices, rows, columns), values, scale)
        gpu.view(stored, count)[:] = values.view(torch.uint8).reshape(-1).numpy()
        gpu.view(scales, 4 * scale.numel()).view(np.float32)[:] = scale.reshape(-1).numpy()

    return run

"""The digest of bytes in a device's memory, made there: the same values as from the host's cores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import BackendUnavailable
from raynixl.native.twin_digest import BLOCK_NBYTES, CONSTANTS, block_factors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_PIECE_BLOCKS = 4096  # 16 MiB, which take 8 times as much while they are multiplied

U64 = NDArray[np.uint64]


def digest_device(flats: Sequence[torch.Tensor], rows: U64, out: U64, *, seed: int) -> None:
    """Add the digest of each row of (address, nbytes, position, index) to `out[index]`, modulo 2^64.

    Each row lies in one of the flat tensors of bytes, which are on one device. Follows what was put on this thread's
    current stream, and waits for it. On a GPU a kernel of ours does it, where it can be had.

    Raises:
        ValueError: an index of no sum, or a row outside.
    """
    if not flats or not len(rows):
        return
    if not flats[0].is_cuda or not _digest_by_kernel(flats[0].device, rows, out, seed):
        _digest_by_torch(flats, rows, out, seed)


def _digest_by_kernel(device: torch.device, rows: U64, out: U64, seed: int) -> bool:
    import torch

    from raynixl.backends.nvlink_digest import digest_rows

    stream = torch.cuda.current_stream(device).cuda_stream
    try:
        digest_rows(device.index or 0, rows, out, seed=seed, stream=stream)
    except BackendUnavailable as exc:
        logger.debug("torch digests on %s: %s", device, exc)
        return False
    return True


def _digest_by_torch(flats: Sequence[torch.Tensor], rows: U64, out: U64, seed: int) -> None:
    starts = np.array([flat.data_ptr() for flat in flats], np.uint64)
    order = np.argsort(starts)
    owner = np.searchsorted(starts[order], rows[:, 0], side="right") - 1
    for number in np.unique(owner[rows[:, 1] > 0]).tolist():
        if number < 0:
            raise ValueError("a row lies outside the data")
        flat = flats[int(order[number])]
        mine = rows[(owner == number) & (rows[:, 1] > 0)]
        mine[:, 0] -= np.uint64(flat.data_ptr())
        digest_device_rows(flat, mine, out, seed=seed)


def digest_device_rows(data: torch.Tensor, rows: U64, out: U64, *, seed: int) -> None:
    """Add the digest of each row of (offset in data, nbytes, position, index) to `out[index]`, modulo 2^64.

    `data` is a contiguous one-dimensional uint8 tensor on any device, `out` is (M, 2). Waits for the device once.

    Raises:
        ValueError: an index of no sum, or a row outside `data`; nothing was read.
    """
    _check(data, rows, out)
    sums = [piece for row in rows.tolist() for piece in _digest_row(data, row[:3], seed)]
    if sums:
        import torch

        owners = [row[3] for row in rows.tolist() for _ in range(_count_pieces(row[1], row[2]))]
        np.add.at(out, owners, torch.stack(sums).cpu().numpy().view(np.uint64))


def _check(data: torch.Tensor, rows: U64, out: U64) -> None:
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype != np.uint64:
        raise ValueError("rows must be an (N, 4) array of uint64")
    if (rows[:, 3] >= np.uint64(len(out))).any():
        raise ValueError("a row has the index of no sum")
    size = np.uint64(data.numel())
    if (rows[:, 1] > size).any() or (rows[:, 0] > size - np.minimum(rows[:, 1], size)).any():
        raise ValueError("a row lies outside the data")
    if (rows[:, 2] + rows[:, 1] < rows[:, 2]).any():
        raise ValueError("a row reaches past the end of all positions")


def _count_pieces(nbytes: int, position: int) -> int:
    blocks = -(-(position % BLOCK_NBYTES + nbytes) // BLOCK_NBYTES) if nbytes else 0
    return -(-blocks // _PIECE_BLOCKS)


def _digest_row(data: torch.Tensor, row: list[int], seed: int) -> list[torch.Tensor]:
    """Return the digest of each piece of a row, as a pair of int64: their arithmetic is that of uint64."""
    start, nbytes, position = row
    pieces = []
    while nbytes:
        skew = position % BLOCK_NBYTES
        part = min(nbytes, _PIECE_BLOCKS * BLOCK_NBYTES - skew)
        words = _blocks_of(data[start : start + part], skew)
        pieces.append(_digest_blocks(words, position // BLOCK_NBYTES, seed))
        start, nbytes, position = start + part, nbytes - part, position + part
    return pieces


def _blocks_of(data: torch.Tensor, skew: int) -> torch.Tensor:
    """Return the words of the blocks that bytes begin `skew` bytes into, with zeros around them."""
    import torch

    blocks = -(-(skew + data.numel()) // BLOCK_NBYTES)
    if skew or data.numel() % BLOCK_NBYTES or data.data_ptr() % 4 or data.storage_offset() % 4:
        padded = torch.zeros(blocks * BLOCK_NBYTES, dtype=torch.uint8, device=data.device)
        padded[skew : skew + data.numel()] = data
        data = padded
    return data.view(torch.int32).view(blocks, BLOCK_NBYTES // 4)


def _digest_blocks(words: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    import torch

    blocks = np.arange(first, first + len(words), dtype=np.uint64)
    factors = torch.from_numpy(block_factors(blocks, seed).view(np.int64)).to(words.device)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    constants = torch.from_numpy(CONSTANTS.view(np.int64)).to(words.device)
    return torch.stack([((wide * constants[lane]).sum(1) * factors[:, lane]).sum() for lane in (0, 1)])

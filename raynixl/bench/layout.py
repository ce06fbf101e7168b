"""Layouts: which block goes where in one benchmarked transfer, and what bytes must then be found there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_CHUNK = 1 << 17  # words filled at a time: 1 MiB stays in cache
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Layout:
    """`blocks` blocks of one size; block source_ids[i] of the source goes to place target_ids[i] of the target.

    Both sides are exactly as large as the blocks together. Both processes derive the same layout from the same
    four numbers.
    """

    block_nbytes: int
    blocks: int
    is_random: bool
    seed: int = 1

    @staticmethod
    def of(numbers: Sequence[int]) -> Layout:
        """Return the layout that another process has described by its `numbers`."""
        block_nbytes, blocks, is_random, seed = numbers
        return Layout(block_nbytes, blocks, bool(is_random), seed)

    @property
    def nbytes(self) -> int:
        """Bytes that one transfer moves."""
        return self.block_nbytes * self.blocks

    @property
    def numbers(self) -> list[int]:
        """What another process derives the same layout from, by `of`."""
        return [self.block_nbytes, self.blocks, int(self.is_random), self.seed]

    @property
    def is_contiguous(self) -> bool:
        """Whether it comes to one range at each side."""
        return self.blocks == 1 or not self.is_random

    @cached_property
    def source_ids(self) -> NDArray[np.int64]:
        """Where each block comes from."""
        ids = np.arange(self.blocks, dtype=np.int64)
        return np.random.default_rng(self.seed).permutation(ids) if self.is_random else ids

    @cached_property
    def target_ids(self) -> NDArray[np.int64]:
        """Where each block goes."""
        ids = np.arange(self.blocks, dtype=np.int64)
        return np.random.default_rng(self.seed + 1).permutation(ids) if self.is_random else ids

    @cached_property
    def source_of_place(self) -> NDArray[np.int64]:
        """Which source block belongs at each place of the target, in the target's order."""
        order = np.empty(self.blocks, np.int64)
        order[self.target_ids] = self.source_ids
        return order

    def digest_moved(self, source: Bytes) -> str:
        """Return the digest that the target must have once `source` has been moved."""
        if self.is_contiguous:
            return digest(source)
        rows, state = source.reshape(self.blocks, self.block_nbytes), xxhash.xxh3_128()
        for block in self.source_of_place.tolist():
            state.update(rows[block].data)
        return state.hexdigest()


def digest(view: Bytes) -> str:
    """Return a digest that notices every changed, moved or missing byte."""
    return xxhash.xxh3_128(view.data).hexdigest()


def fill(view: Bytes, seed: int) -> None:
    """Fill memory with bytes that differ by position and seed; seed 0 clears it."""
    if seed == 0:
        view[:] = 0
        return
    whole = view.size // 8
    words = view[: whole * 8].view(np.uint64)
    for start in range(0, whole, _CHUNK):
        stop = min(whole, start + _CHUNK)
        words[start:stop] = (np.arange(start, stop, dtype=np.uint64) + np.uint64(seed)) * _ODD
    rest = view.size - whole * 8
    view[whole * 8 :] = np.arange(seed + 1, seed + 1 + rest, dtype=np.uint64).astype(np.uint8)

"""Strided: where the elements of a tensor lie inside its storage, cut into slices and into runs of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError

Index = int | slice


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements of `itemsize` bytes; offset and strides are in bytes."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * self.itemsize

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Strided:
        """Select as a tensor does, by whole numbers and slices.

        Raises:
            ConfigError: the index is none of these, or has more dimensions than the tensor.
        """
        steps = index if isinstance(index, tuple) else (index,)
        if len(steps) > len(self.shape):
            raise ConfigError(f"{len(steps)} indices for {len(self.shape)} dimensions", hint="give fewer")
        offset = self.offset
        shape: list[int] = []
        strides: list[int] = []
        for dim, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            step = steps[dim] if dim < len(steps) else slice(None)
            start, kept, by = _select(step, size)
            offset += start * stride
            if kept is not None:
                shape.append(kept)
                strides.append(stride * by)
        return Strided(offset, tuple(shape), tuple(strides), self.itemsize)

    def runs(self) -> tuple[NDArray[np.uint64], int]:
        """Return the offsets of its contiguous runs, in the order of its elements, and the bytes of each."""
        run, dims = self.itemsize, list(zip(self.shape, self.strides, strict=True))
        while dims and (dims[-1][0] == 1 or dims[-1][1] == run):
            run *= dims.pop()[0]
        offsets = np.array([self.offset], np.uint64)
        for size, stride in dims:
            steps = np.arange(size, dtype=np.uint64) * np.uint64(stride)
            offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
        return offsets, run


def contiguous(shape: Sequence[int], itemsize: int, offset: int = 0) -> Strided:
    """Return where a contiguous tensor's elements lie."""
    strides = [itemsize * prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return Strided(offset, tuple(shape), tuple(strides), itemsize)


def _select(step: Index, size: int) -> tuple[int, int | None, int]:
    """Return the first element, how many (None: the dimension goes), and how far apart."""
    if isinstance(step, slice):
        start, stop, by = step.indices(size)
        if by < 1:
            raise ConfigError(f"{step} goes backwards", hint="slice forwards, then flip")
        return start, max(0, -((start - stop) // by)), by
    if not hasattr(step, "__index__"):
        raise ConfigError(f"{step!r:.40} is neither a whole number nor a slice", hint="give w[2:5, 0] and the like")
    place = int(step)
    if not -size <= place < size:
        raise ConfigError(f"index {place} is outside a dimension of {size}", hint="give one inside it")
    return place % size if size else 0, None, 1

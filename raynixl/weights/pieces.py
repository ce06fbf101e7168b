"""Pieces: boxes of full tensors and where they lie inside local ones, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A full tensor, by its name in the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of full tensor number `tensor` that lies in local tensor number `entry`.

    `offset` is where its first element lies in the local tensor, `strides` how far its elements are apart there
    along each dimension of the full tensor; all in elements, whatever the local tensor's own dimensions are.
    """

    tensor: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    entry: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Many pieces as arrays. Dimensions that a tensor lacks follow its own: they start at 0 and have size 1."""

    tensor: Ints
    start: Ints
    size: Ints
    entry: Ints
    offset: Ints
    stride: Ints

    @staticmethod
    def of(pieces: Sequence[Piece]) -> Pieces:
        """Gather pieces.

        Raises:
            ConfigError: one has unequal numbers of starts, sizes and strides.
        """
        dims = max([1, *(len(piece.start) for piece in pieces)])
        for piece in pieces:
            if not len(piece.start) == len(piece.size) == len(piece.strides):
                raise ConfigError(f"{piece} has dimensions of several numbers", hint="give each one per dimension")
        return Pieces(
            np.array([piece.tensor for piece in pieces], np.int64),
            padded([piece.start for piece in pieces], dims, 0),
            padded([piece.size for piece in pieces], dims, 1),
            np.array([piece.entry for piece in pieces], np.int64),
            np.array([piece.offset for piece in pieces], np.int64),
            padded([piece.strides for piece in pieces], dims, 0),
        )

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: Ints | NDArray[np.bool_] | slice) -> Pieces:
        return Pieces(
            self.tensor[rows], self.start[rows], self.size[rows], self.entry[rows], self.offset[rows], self.stride[rows]
        )

    @property
    def counts(self) -> Ints:
        """The number of elements of each."""
        return np.asarray(self.size.prod(axis=1), np.int64)


def padded(rows: Sequence[Sequence[int]], dims: int, fill: int) -> Ints:
    """Return rows of up to `dims` integers as one array, short ones filled at their end."""
    table = np.full((len(rows), dims), fill, np.int64)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    for length in np.unique(lengths):
        if length:
            where = np.flatnonzero(lengths == length)
            table[where, :length] = np.array([rows[at] for at in where.tolist()], np.int64)
    return table


def row_major(sizes: Ints) -> Ints:
    """Return the strides of C-contiguous boxes whose sizes are along the last axis."""
    strides = np.ones_like(sizes)
    for axis in range(sizes.shape[-1] - 2, -1, -1):
        strides[..., axis] = strides[..., axis + 1] * sizes[..., axis + 1]
    return strides


def widened(boxes: Ints, dims: int, fill: int) -> Ints:
    """Return boxes with dimensions added at their end."""
    if boxes.shape[1] == dims:
        return boxes
    return np.hstack((boxes, np.full((len(boxes), dims - boxes.shape[1]), fill, np.int64)))


def distinct(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the distinct rows of columns, in order, and the number of each row among them."""
    keys, spans = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        spans *= high - low + 1
        if spans >= 1 << 62:  # too wide for one integer
            rows, of = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
            return rows, of.reshape(-1).astype(np.int64)
        keys = keys * (high - low + 1) + (column - low)
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    return np.column_stack([column[first] for column in columns]), of.reshape(-1).astype(np.int64)

"""Fused: local tensors that join or stack what a rank has of several tensors, and where each then lies in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError
from raynixl.weights.pieces import Ints, row_major, widened
from raynixl.weights.placement import Boxes, Mesh, Placement, boxes, flat_boxes


@dataclass(frozen=True, slots=True)
class Concat:
    """A local tensor that joins what its rank has of several tensors along a dimension, such as qkv or gate_up.

    `length` is its size along that dimension if it is longer than its parts, as a padded flat parameter is.
    """

    dim: int
    parts: tuple[str | Concat | Stack, ...]
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """A local tensor that stacks what its rank has of several tensors in a new first dimension, such as experts."""

    parts: tuple[str | Concat | Stack, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What all ranks have of tensors of one shape and placement: who has a local tensor (R,), its shape (R, D), and
    the pieces in it, in order of rank; `is_flat` if it is a run of elements."""

    present: NDArray[np.bool_]
    local: Ints
    is_flat: bool
    rank: Ints
    start: Ints
    size: Ints
    offset: Ints
    stride: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """A local tensor on all ranks: who has it (R,), its shape (R, D) of `dims` dimensions, and for each tensor in it
    its kind, where it begins there (R,), and with which strides (R, its dimensions)."""

    present: NDArray[np.bool_]
    shape: Ints
    dims: int
    kinds: tuple[int, ...]
    firsts: tuple[Ints, ...]
    strides: tuple[Ints, ...]


def kind_of(shape: Sequence[int], padded: Sequence[int], mesh: Mesh, placements: Sequence[Placement]) -> Kind:
    """Work out what the ranks of a mesh have of a tensor that is sharded as if it had the padded shape.

    Raises:
        ConfigError: the placements do not fit the mesh or the shape.
    """
    if len(padded) != len(shape) or any(new < old for new, old in zip(padded, shape, strict=True)):
        raise ConfigError(f"a tensor of shape {list(shape)} cannot be padded to {list(padded)}")
    own = boxes(padded, mesh, placements)
    if (own.length >= 0).any():
        if tuple(padded) != tuple(shape):
            raise ConfigError("a flat tensor is padded", hint="pad the flat parameter: Concat(0, ..., length=...)")
        return _flat_kind(own)
    size = np.minimum(own.start + own.size, np.array(shape, np.int64)) - own.start
    rank = np.flatnonzero(own.present & (size > 0).all(axis=1))
    zeros = np.zeros(len(rank), np.int64)
    return Kind(own.present, own.size, False, rank, own.start[rank], size[rank], zeros, row_major(own.size)[rank])


def _flat_kind(own: Boxes) -> Kind:
    rows = [
        (rank, [a + b for a, b in zip(own.start[rank].tolist(), start, strict=True)], size, offset)
        for rank in np.flatnonzero(own.present).tolist()
        for start, size, offset in flat_boxes(own.size[rank].tolist(), int(own.first[rank]), int(own.length[rank]))
    ]
    dims = own.start.shape[1]
    rank = np.array([row[0] for row in rows], np.int64)
    start, size = (np.array([row[n] for row in rows], np.int64).reshape(len(rows), dims) for n in (1, 2))
    stride = row_major(own.size)[rank]
    local = np.where(own.present, own.length, 0)[:, None]
    return Kind(own.present, local, True, rank, start, size, np.array([row[3] for row in rows], np.int64), stride)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A part of a local tensor while it is put together; `origins` are the coordinates of the tensors in it."""

    present: NDArray[np.bool_]
    shape: Ints
    kinds: tuple[int, ...]
    origins: tuple[Ints, ...]
    widths: tuple[int, ...]


def assemble(tree: str | Concat | Stack, kinds: Sequence[Kind], numbers: Iterator[int]) -> Assembly:
    """Put a local tensor together from the kinds of its tensors, whose numbers come in order.

    Raises:
        ConfigError: shapes do not fit each other.
    """
    part = _part(tree, kinds, numbers)
    strides = row_major(part.shape)
    firsts = tuple((origin * strides).sum(axis=1) for origin in part.origins)
    own = tuple(strides[:, strides.shape[1] - width :] for width in part.widths)
    dims = part.shape.shape[1]
    return Assembly(part.present, widened(part.shape, max(dims, 1), 1), dims, part.kinds, firsts, own)


def _part(tree: str | Concat | Stack, kinds: Sequence[Kind], numbers: Iterator[int]) -> _Part:
    if isinstance(tree, str):
        number = next(numbers)
        kind = kinds[number]
        width = kind.local.shape[1]
        return _Part(kind.present, kind.local, (number,), (np.zeros_like(kind.local),), (width,))
    parts = [_part(part, kinds, numbers) for part in tree.parts]
    if not parts or len({part.shape.shape[1] for part in parts}) > 1:
        raise ConfigError("what is fused has several numbers of dimensions, or is nothing")
    return _concat(tree, parts) if isinstance(tree, Concat) else _stack(parts)


def _concat(tree: Concat, parts: Sequence[_Part]) -> _Part:
    dims = parts[0].shape.shape[1]
    if not -dims <= tree.dim < dims:
        raise ConfigError(f"there is no dimension {tree.dim} to join along")
    dim = tree.dim % dims
    present, shape = _common(parts, np.arange(dims) != dim)
    length = np.zeros(len(present), np.int64)
    origins = []
    for part in parts:
        step = np.zeros_like(shape)
        step[:, dim] = length
        origins += [origin + step for origin in part.origins]
        length = length + np.where(part.present, part.shape[:, dim], 0)
    if tree.length is not None:
        if (length > tree.length).any():
            raise ConfigError(f"parts of {int(length.max())} do not fit a length of {tree.length}")
        length = np.full_like(length, tree.length)
    shape[:, dim] = length
    return _Part(present, shape, *_inner(parts, origins))


def _stack(parts: Sequence[_Part]) -> _Part:
    present, shape = _common(parts, np.ones(parts[0].shape.shape[1], np.bool_))
    at = np.zeros(len(present), np.int64)
    origins = []
    for part in parts:
        origins += [np.hstack((at[:, None], origin)) for origin in part.origins]
        at = at + part.present
    return _Part(present, np.hstack((at[:, None], shape)), *_inner(parts, origins))


def _common(parts: Sequence[_Part], same: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Ints]:
    """Return who has any part, and the shape that all parts of a rank have in dimensions that must be the same."""
    present, shape = parts[0].present.copy(), parts[0].shape.copy()
    for part in parts[1:]:
        new = part.present & ~present
        shape[new] = part.shape[new]
        present |= part.present
        if (part.shape[part.present][:, same] != shape[part.present][:, same]).any():
            raise ConfigError("what is fused has several shapes", hint="all but the joined dimension must be equal")
    return present, shape


def _inner(parts: Sequence[_Part], origins: list[Ints]) -> tuple[tuple[int, ...], tuple[Ints, ...], tuple[int, ...]]:
    numbers = tuple(number for part in parts for number in part.kinds)
    return numbers, tuple(origins), tuple(width for part in parts for width in part.widths)

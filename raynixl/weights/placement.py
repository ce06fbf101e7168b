"""Placement: how one tensor is spread over a mesh of ranks, and which box of it each rank then has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raynixl.errors import ConfigError
from raynixl.weights.pieces import Ints

MAX_RANKS = 65_536


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in a grid: a name and a size for each of its dimensions. Rank numbers run along the last one first."""

    dims: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if any(size < 1 for _, size in self.dims) or self.ranks > MAX_RANKS:
            raise ConfigError(f"a mesh of {self}", hint=f"sizes are 1 or more, {MAX_RANKS} ranks in all at most")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.dims) or "one rank"

    @property
    def ranks(self) -> int:
        """How many ranks it has."""
        return math.prod(size for _, size in self.dims)

    def rank(self, coordinate: Sequence[int]) -> int:
        """Return the number of the rank at a coordinate.

        Raises:
            ConfigError: it is outside.
        """
        sizes = [size for _, size in self.dims]
        if len(coordinate) != len(sizes) or any(not 0 <= at < n for at, n in zip(coordinate, sizes, strict=True)):
            raise ConfigError(f"coordinate {tuple(coordinate)} is outside the mesh {self}")
        return int(np.ravel_multi_index(tuple(coordinate), sizes)) if sizes else 0

    def coordinates(self) -> Ints:
        """Return the coordinates of all ranks, one a row."""
        sizes = [size for _, size in self.dims]
        return np.indices(sizes).reshape(len(sizes), -1).T.astype(np.int64) if sizes else np.zeros((1, 0), np.int64)


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank along this dimension of the mesh has the same."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Split along a dimension of the tensor, as torch chunks it: the last ranks get less, or nothing.

    `units` are what must not be split, such as heads; when they are fewer than ranks, each goes to several ranks.
    """

    dim: int
    units: int | None = None


@dataclass(frozen=True, slots=True)
class Flat:
    """Split as one run of elements, as FSDP's flat parameter is: `start` is where it lies among `total` elements."""

    start: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """One rank along this dimension of the mesh has it, the others have none of it: pipeline stages, experts."""

    index: int


Placement = Replicate | Shard | Flat | Owner


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """What each rank has of one tensor: a box of it, or a flat run of a box; `length` is -1 where there is no run."""

    present: np.ndarray[tuple[int], np.dtype[np.bool_]]
    start: Ints
    size: Ints
    first: Ints
    length: Ints


def boxes(shape: Sequence[int], mesh: Mesh, placements: Sequence[Placement]) -> Boxes:
    """Return what each rank of a mesh has of a tensor, its placements applied from left to right.

    Raises:
        ConfigError: the placements do not fit the mesh or the shape.
    """
    if len(placements) != len(mesh.dims):
        raise ConfigError(
            f"{len(placements)} placements on the mesh {mesh}", hint="give one for each of its dimensions"
        )
    coordinates = mesh.coordinates()
    ranks = len(coordinates)
    found = Boxes(
        np.ones(ranks, np.bool_),
        np.zeros((ranks, len(shape)), np.int64),
        np.tile(np.array(shape, np.int64), (ranks, 1)),
        np.zeros(ranks, np.int64),
        np.full(ranks, -1, np.int64),
    )
    for placement, (name, size), at in zip(placements, mesh.dims, coordinates.T, strict=True):
        if isinstance(placement, Owner):
            if not 0 <= placement.index < size:
                raise ConfigError(f"{placement} on the dimension {name}={size}", hint="owners count from 0")
            found.present[at != placement.index] = False
        elif isinstance(placement, Shard):
            _shard(found, shape, placement, (at, size))
        elif isinstance(placement, Flat):
            _flatten(found, placement, (at, size))
    return found


def _shard(found: Boxes, shape: Sequence[int], placement: Shard, place: tuple[Ints, int]) -> None:
    dim, (at, ranks) = placement.dim, place
    if not -len(shape) <= dim < len(shape) or (found.length >= 0).any():
        raise ConfigError(f"{placement} does not fit a tensor of shape {list(shape)}", hint="or comes after Flat()")
    whole = found.size[:, dim]
    unit = 1
    if placement.units is not None:
        unit = _unit(shape[dim], placement.units, ranks)
        if placement.units < ranks:
            if (whole != shape[dim]).any():
                raise ConfigError(f"{placement} comes after another split of its dimension", hint="put it first")
            found.start[:, dim] += at // (ranks // placement.units) * unit
            found.size[:, dim] = unit
            return
    per = -(whole // -(unit * ranks)) * unit
    first = np.minimum(at * per, whole)
    found.size[:, dim] = np.minimum(first + per, whole) - first
    found.start[:, dim] += first


def _unit(length: int, units: int, ranks: int) -> int:
    if units < 1 or length % units or (units < ranks and ranks % units):
        raise ConfigError(
            f"{units} units of a dimension of {length} on {ranks} ranks",
            hint="units must divide the dimension, and the ranks when they are fewer",
        )
    return length // units


def _flatten(found: Boxes, placement: Flat, place: tuple[Ints, int]) -> None:
    at, ranks = place
    if (found.length >= 0).any():
        raise ConfigError("a tensor is flat twice", hint="use Flat() on one dimension of the mesh")
    whole = found.size.prod(axis=1)
    total = whole if placement.total is None else np.int64(placement.total)
    if placement.start < 0 or (placement.start + whole > total).any():
        raise ConfigError(f"{placement} does not hold a tensor of {int(whole.max())} elements")
    per = -(-total // ranks)
    first = np.clip(at * per - placement.start, 0, whole)
    found.first[:] = first
    found.length[:] = np.clip((at + 1) * per - placement.start, 0, whole) - first


def flat_boxes(size: Sequence[int], first: int, length: int) -> list[tuple[list[int], list[int], int]]:
    """Cut a run of the elements of a C-contiguous box into boxes: (start, size, where in the run each begins)."""
    found: list[tuple[list[int], list[int], int]] = []
    at, end = first, first + length
    while at < end:
        row, axis = 1, len(size)
        while axis > 0 and at % (row * size[axis - 1]) == 0 and at + row * size[axis - 1] <= end:
            axis -= 1
            row *= size[axis]
        start, rest = [0] * len(size), at
        for dim in range(len(size) - 1, -1, -1):
            rest, start[dim] = divmod(rest, size[dim])
        box = [1] * axis + list(size[axis:])
        if axis > 0:
            box[axis - 1] = min((end - at) // row, size[axis - 1] - start[axis - 1])
        found.append((start, box, at - first))
        at += math.prod(box)
    return found

"""Table: what the ranks of one mesh hold of a model, each rank's pieces and local tensors, as one compact value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from raynixl.errors import ConfigError
from raynixl.weights.columns import Columns, pack_columns
from raynixl.weights.layout import ALIGNMENT, ARENA_NBYTES, itemsize
from raynixl.weights.pieces import Ints, TensorInfo, padded
from raynixl.weights.tablecheck import MAX_EXTENT, check_table
from raynixl.weights.wire import MAX_DIMS

MAGIC = b"RXTB"
MAX_SIZE = MAX_EXTENT + 1

ARENA_SHIFT = 48
"""A position is (arena << ARENA_SHIFT) | offset: one integer for a byte of a set of arenas."""


class Geometries(NamedTuple):
    """Pieces of one tensor on all ranks, for each distinct way in which some tensor lies; sorted by (number, rank).

    `slot` counts the local tensors of a rank that hold parts of the tensor. `offset` is from where the slot begins.
    """

    number: Ints
    rank: Ints
    slot: Ints
    start: Ints
    size: Ints
    offset: Ints
    stride: Ints

    def of(self, number: int) -> Geometries:
        """Return the rows of one geometry."""
        first, last = np.searchsorted(self.number, (number, number + 1))
        return Geometries(*(column[first:last] for column in self))


class Locals(NamedTuple):
    """The local tensors of a mesh: names and dtypes, which shape each has on each rank, and who shares memory.

    `shapes` (F, R, D) holds -1 first where a rank lacks the tensor, and 1 after a shape's own `dims` (F,).
    `tied` is the first of those that lie in one place, `sharing` is that of `Entry`.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shape_of: Ints
    shapes: Ints
    dims: Ints
    tied: Ints
    sharing: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Table:
    """What the ranks of one mesh hold. Tensor g has geometry `geometry_of[g]` (-1: no rank has any of it).

    Its slot k lies in local tensor `entry_of[k, g]` (-1: no slot), from element `leads[lead_of[k, g], rank]` on.
    `alias[g]` is the first tensor that has the same values, g itself if it is alone. `others` are the hashes of names
    of tensors that are known and not needed. Equal tables have one digest.
    """

    tensors: tuple[TensorInfo, ...]
    alias: Ints
    geometry_of: Ints
    geometries: Geometries
    entry_of: Ints
    lead_of: Ints
    leads: Ints
    locals: Locals
    others: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    _places: dict[bytes, Ints] = field(default_factory=dict, init=False, repr=False)

    def __str__(self) -> str:
        return f"{len(self.tensors)} tensors on {self.ranks} ranks"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has."""
        return int(self.leads.shape[1])

    @cached_property
    def itemsizes(self) -> Ints:
        """The bytes of an element of each tensor."""
        return _itemsizes([info.dtype for info in self.tensors])

    @cached_property
    def entry_itemsizes(self) -> Ints:
        """The bytes of an element of each local tensor."""
        return _itemsizes(self.locals.dtypes)

    @cached_property
    def counts(self) -> Ints:
        """The elements of each shape on each rank (F, R), -1 where a rank lacks it."""
        counts = self.locals.shapes.prod(axis=2)
        return np.where(self.locals.shapes[:, :, 0] < 0, np.int64(-1), counts)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each tensor by its name."""
        return {info.name: number for number, info in enumerate(self.tensors)}

    @cached_property
    def digest(self) -> str:
        """What names this table once it has travelled."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    @cached_property
    def alike(self) -> Ints:
        """For each rank the first rank that holds just the same."""
        parts = [self.counts.T, self.locals.shapes.transpose(1, 0, 2).reshape(self.ranks, -1), self.leads.T]
        hashes: dict[bytes, int] = {}
        found = np.zeros(self.ranks, np.int64)
        rank = self.geometries.rank
        order = np.argsort(rank, kind="stable")
        ends = np.searchsorted(rank[order], np.arange(self.ranks + 1))
        for at in range(self.ranks):
            rows = order[ends[at] : ends[at + 1]]
            columns = [column[rows].tobytes() for column in self.geometries if column is not rank]
            key = b"".join([part[at].tobytes() for part in parts] + columns)
            found[at] = hashes.setdefault(key, at)
        return found

    def entry_nbytes(self, rank: int) -> Ints:
        """Return the bytes of each local tensor on a rank, -1 where it lacks the tensor."""
        counts = self.counts[self.locals.shape_of, rank]
        return np.where(counts < 0, np.int64(-1), counts * self.entry_itemsizes)

    def entry_shape(self, entry: int, rank: int) -> tuple[int, ...]:
        """Return the shape of a local tensor on a rank."""
        form = int(self.locals.shape_of[entry])
        return tuple(self.locals.shapes[form, rank, : self.locals.dims[form]].tolist())

    def places(self, rank: int) -> Ints:
        """Return the position of each local tensor in the arenas of a rank; -1 where it is absent or empty."""
        nbytes = self.entry_nbytes(rank)
        key = nbytes.tobytes()
        if key not in self._places:  # many ranks have local tensors of equal sizes
            self._places[key] = pack(nbytes, self.locals.tied)[0]
        return self._places[key]

    def bases(self, rank: int, places: Ints) -> Ints:
        """Return the position (K, G) at which each slot of each tensor begins, given where the local tensors lie."""
        at = np.append(places, -1)[self.entry_of]  # no slot is entry -1, the last
        base = at + self.leads[self.lead_of, rank] * self.itemsizes
        return np.where(at < 0, np.int64(-1), base)

    def to_bytes(self) -> bytes:
        """Return the table as bytes for a peer."""
        own = self.locals
        dtypes = sorted({*own.dtypes, *(info.dtype for info in self.tensors)})
        numbers = {dtype: number for number, dtype in enumerate(dtypes)}
        shapes = [info.shape for info in self.tensors]
        flat = [value for entry in sorted(own.sharing) for value in own.sharing[entry]]
        arrays = [
            np.array([numbers[info.dtype] for info in self.tensors], np.int64),
            np.array([len(shape) for shape in shapes], np.int64),
            padded(shapes, max([1, *map(len, shapes)]), 1),
            self.alias, self.geometry_of, *self.geometries, self.entry_of, self.lead_of, self.leads,
            np.array([numbers[dtype] for dtype in own.dtypes], np.int64),
            own.shape_of, own.shapes, own.dims, own.tied,
            np.array(sorted(own.sharing), np.int64),
            np.array([len(own.sharing[entry]) for entry in sorted(own.sharing)], np.int64),
            np.array(flat, np.int64),
            self.others,
        ]  # fmt: skip
        return pack_columns(MAGIC, [dtypes, [info.name for info in self.tensors], own.names], arrays)

    @staticmethod
    def from_bytes(data: bytes) -> Table:
        """Parse a table that a peer sent.

        Raises:
            IntegrityError: truncated, too large, of another version, or pieces outside their tensors.
        """
        columns = Columns(data, MAGIC, "a table of shards")
        try:
            table = _read(columns)
            check_table(table)
        except ConfigError as exc:
            raise columns.malformed(exc.message) from exc
        return table


def _read(columns: Columns) -> Table:
    dtypes, names, local_names = columns.texts(), columns.texts(), columns.texts()
    count, entries = len(names), len(local_names)
    dtype_of = columns.array(count, high=len(dtypes))
    dims = columns.array(count, high=MAX_DIMS + 1)
    shapes = columns.array(count, None, high=MAX_SIZE)
    if count and int(dims.max()) > shapes.shape[1]:
        raise columns.malformed("a tensor has too many dimensions")
    kinds = list(zip(dtype_of.tolist(), dims.tolist(), shapes.tolist(), strict=True))
    tensors = tuple(
        TensorInfo(name, dtypes[dtype], tuple(shape[:length]))
        for name, (dtype, length, shape) in zip(names, kinds, strict=True)
    )
    alias, geometry_of = columns.array(count, high=max(count, 1)), columns.array(count, low=-1)
    number = columns.array(None)
    rows = len(number)
    rank, slot = columns.array(rows), columns.array(rows)
    start = columns.array(rows, None, high=MAX_SIZE)
    width = start.shape[1]
    size, offset = columns.array(rows, width, high=MAX_SIZE), columns.array(rows, high=MAX_SIZE)
    known = Geometries(number, rank, slot, start, size, offset, columns.array(rows, width, high=MAX_SIZE))
    entry_of = columns.array(None, count, low=-1, high=max(entries, 1))
    lead_of = columns.array(len(entry_of), count)
    leads = columns.array(None, None, high=MAX_SIZE)
    is_outside = rows and int(rank.max()) >= leads.shape[1]
    if is_outside or not leads.size or (lead_of.size and int(lead_of.max()) >= len(leads)):
        raise columns.malformed("a piece is on no rank")
    own = _read_locals(columns, (local_names, dtypes, leads.shape[1]))
    others = columns.array(None, low=-(1 << 63), high=1 << 63)
    columns.end()
    return Table(tensors, alias, geometry_of, known, entry_of, lead_of, leads, own, others)


def _read_locals(columns: Columns, known: tuple[list[str], list[str], int]) -> Locals:
    names, dtypes, ranks = known
    entries = len(names)
    dtype_of, shape_of = columns.array(entries, high=len(dtypes)), columns.array(entries)
    shapes = columns.array(None, ranks, None, low=-1, high=MAX_SIZE)
    dims = columns.array(len(shapes), high=shapes.shape[2] + 1)
    if entries and int(shape_of.max()) >= len(shapes):
        raise columns.malformed("a local tensor has no shape")
    tied = columns.array(entries, high=max(entries, 1))
    shared = columns.array(None, high=max(entries, 1))
    lengths = columns.array(len(shared), high=MAX_DIMS + 3)
    flat = columns.array(int(lengths.sum())).tolist()
    ends = np.cumsum(lengths).tolist()
    sharing = {
        entry: tuple(flat[end - length : end])
        for entry, length, end in zip(shared.tolist(), lengths.tolist(), ends, strict=True)
    }
    return Locals(tuple(names), tuple(dtypes[at] for at in dtype_of), shape_of, shapes, dims, tied, sharing)


def hashes(names: Iterable[str]) -> Ints:
    """Return a number for each name, in their order."""
    import xxhash

    found = [xxhash.xxh3_64_intdigest(name.encode(errors="surrogatepass")) for name in names]
    return np.array(found, np.uint64).view(np.int64)


def pack(nbytes: Ints, tied: Ints, *, arena_nbytes: int = ARENA_NBYTES) -> tuple[Ints, Ints]:
    """Lay local tensors out in order, as `build_layout` does: positions (-1: absent or empty), sizes of the arenas."""
    own = np.flatnonzero((nbytes > 0) & ((tied == np.arange(len(tied))) | (nbytes[tied] < 0)))
    rooms = -(-nbytes[own] // ALIGNMENT) * ALIGNMENT
    ends = np.cumsum(rooms)
    places = np.full(len(nbytes), -1, np.int64)
    sizes: list[int] = []
    first, begun = 0, 0
    while first < len(own):
        last = max(first + 1, int(np.searchsorted(ends, begun + arena_nbytes, side="right")))
        positions = ends[first:last] - rooms[first:last] - begun
        places[own[first:last]] = positions + (len(sizes) << ARENA_SHIFT)
        sizes.append(int(ends[last - 1]) - begun)
        first, begun = last, int(ends[last - 1])
    others = np.flatnonzero((nbytes > 0) & (places < 0))
    places[others] = places[tied[others]]
    return places, np.array(sizes, np.int64)


def _itemsizes(dtypes: Sequence[str]) -> Ints:
    sizes = {dtype: itemsize(dtype) for dtype in set(dtypes)}
    return np.fromiter((sizes[dtype] for dtype in dtypes), np.int64, len(dtypes))

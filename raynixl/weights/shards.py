"""Shards: what one rank holds of a model, as a value that a plan is made from."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.layout import Entry, Layout, build_layout
from raynixl.weights.pieces import Ints, Pieces, TensorInfo, distinct, padded, row_major
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.table import ARENA_SHIFT, Geometries, Locals, Table, hashes, pack
from raynixl.weights.tablecheck import check_table

_MAGIC = b"RXSH"
_HEAD = struct.Struct("<4sI")


@dataclass(frozen=True)
class Shards:
    """What rank number `rank` of a table holds. To a peer that has the table, table and rank number are enough."""

    table: Table
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.table}"

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The full tensors that this is a part of; of some it may hold nothing."""
        return self.table.tensors

    @cached_property
    def layout(self) -> Layout:
        """The local tensors, in the arenas that carry them."""
        table, places = self.table, self.table.places(self.rank)
        nbytes = table.entry_nbytes(self.rank)
        sizes = pack(nbytes, table.locals.tied)[1]
        rows = zip(np.flatnonzero(nbytes >= 0).tolist(), places[nbytes >= 0].tolist(), strict=True)
        return Layout(tuple(entry_at(table, (self.rank, row), place) for row, place in rows), tuple(sizes.tolist()))

    @cached_property
    def pieces(self) -> Pieces:
        """The boxes of full tensors that it holds; `entry` counts the entries of its layout."""
        table = self.table
        known = table.geometries
        own = Geometries(*(column[known.rank == self.rank] for column in known))
        first = np.searchsorted(own.number, table.geometry_of)
        counts = np.searchsorted(own.number, table.geometry_of, side="right") - first
        counts[table.geometry_of < 0] = 0
        tensor = np.repeat(np.arange(len(table.tensors)), counts)
        rows = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(tensor))
        slot = own.slot[rows]
        numbers = np.cumsum(table.entry_nbytes(self.rank) >= 0) - 1
        lead = table.leads[table.lead_of[slot, tensor], self.rank]
        entry = numbers[table.entry_of[slot, tensor]]
        return Pieces(tensor, own.start[rows], own.size[rows], entry, own.offset[rows] + lead, own.stride[rows])

    @cached_property
    def digest(self) -> str:
        """What names these shards: ranks of one mesh that hold the same have one digest."""
        return f"{self.table.digest}:{int(self.table.alike[self.rank])}"

    def to_bytes(self) -> bytes:
        """Return the shards and the whole table as bytes for a peer."""
        return _HEAD.pack(_MAGIC, self.rank) + self.table.to_bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Shards:
        """Parse shards that a peer sent.

        Raises:
            IntegrityError: truncated, too large, of another version, or pieces outside their tensors.
        """
        magic, rank = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size))
        if magic != _MAGIC:
            raise IntegrityError("a rank's shards are malformed", hint="they are not from this raynixl")
        return Shards.at(Table.from_bytes(data[_HEAD.size :]), rank)

    @staticmethod
    def at(table: Table, rank: int) -> Shards:
        """Return the shards of a rank that a peer named.

        Raises:
            IntegrityError: the table has no such rank.
        """
        if not 0 <= rank < table.ranks:
            raise IntegrityError(f"there is no rank {rank} in {table}", hint="it is not from this raynixl")
        return Shards(table, rank)


def entry_at(table: Table, local: tuple[int, int], place: int) -> Entry:
    """Return the entry of a layout for (rank, local tensor) at a position, or nowhere at -1."""
    rank, entry = local
    dtype, shape = table.locals.dtypes[entry], table.entry_shape(entry, rank)
    nbytes = int(np.prod(shape, dtype=np.int64)) * int(table.entry_itemsizes[entry])
    arena, offset = (place >> ARENA_SHIFT, place & ((1 << ARENA_SHIFT) - 1)) if place >= 0 else (0, 0)
    name, sharing = table.locals.names[entry], table.locals.sharing.get(entry, ())
    return Entry(name, dtype, shape, arena, offset, nbytes, sharing)


def replicated(specs: Sequence[TensorSpec]) -> Shards:
    """Return the shards of a rank that holds every tensor whole, under its own name.

    Raises:
        ConfigError: a name is used twice, or a dtype cannot be carried.
    """
    layout = build_layout(specs)
    tensors = tuple(TensorInfo(entry.name, entry.dtype, entry.shape) for entry in layout.entries)
    own = [number for number, entry in enumerate(layout.entries) if entry.nbytes]
    dims = max([1, *(len(info.shape) for info in tensors)])
    size = padded([tensors[number].shape for number in own], dims, 1)
    zeros, numbers = np.zeros(len(own), np.int64), np.array(own, np.int64)
    stride = np.where(size > 1, row_major(size), 0)
    return from_pieces(tensors, layout, Pieces(numbers, np.zeros_like(size), size, numbers, zeros, stride))


def from_pieces(
    tensors: Sequence[TensorInfo], layout: Layout, pieces: Pieces, *, tied: Mapping[str, str] | None = None
) -> Shards:
    """Return the shards of a rank by itself; `pieces.entry` counts the entries of the layout, which holds ties.

    `tensors` are all that were offered; of those that are not used only the names are remembered. A local tensor
    without any piece is not fed by a push; what no piece covers of one that is fed gets zeros. `tied` names the tensor
    that another one is, wherever that lies.

    Raises:
        ConfigError: a name is used twice, a dtype cannot be carried, or a piece lies outside its tensors.
    """
    order = np.lexsort((pieces.offset, pieces.entry, pieces.tensor))
    pieces = pieces[order][pieces.counts[order] > 0]
    _check_numbers(pieces, (len(tensors), len(layout.entries)))
    tensors, pieces, others = _pruned(tensors, pieces, tied or {})
    slot, entry_of, lead_of, leads = _slots(pieces, len(tensors))
    rest = pieces.offset - leads[lead_of[slot, pieces.tensor], 0]
    stride = np.where(pieces.size > 1, pieces.stride, 0)
    geometry_of, rows, number = _intern(
        pieces.tensor, np.column_stack((slot, rest, pieces.start, pieces.size, stride)), len(tensors)
    )
    dims = pieces.start.shape[1]
    start, size, stride = (rows[:, 2 + dims * n : 2 + dims * (n + 1)] for n in range(3))
    known = Geometries(number, np.zeros_like(number), rows[:, 0], start, size, rows[:, 1], stride)
    own = _locals(layout)
    alias = _aliases(tensors, (geometry_of, np.append(own.tied, -1)[entry_of], leads[lead_of, 0]))
    tie(alias, tensors, tied or {})
    table = Table(tuple(tensors), alias, geometry_of, known, entry_of, lead_of, leads, own, others)
    check_table(table)
    return Shards(table, 0)


def _pruned(
    tensors: Sequence[TensorInfo], pieces: Pieces, tied: Mapping[str, str]
) -> tuple[Sequence[TensorInfo], Pieces, Ints]:
    """Leave out tensors of which nothing is used, a model's worth of experts for one, and return their hashes."""
    if len({info.name for info in tensors}) != len(tensors):
        raise ConfigError("two tensors have one name", hint="give each tensor its own name")
    kept = np.zeros(len(tensors), np.bool_)
    kept[pieces.tensor] = True
    named = {*tied, *tied.values()}
    for at in np.flatnonzero(~kept).tolist():
        kept[at] = 0 in tensors[at].shape or tensors[at].name in named
    others = np.sort(hashes(tensors[at].name for at in np.flatnonzero(~kept).tolist()))
    moved = replace(pieces, tensor=(np.cumsum(kept) - 1)[pieces.tensor])
    return [tensors[at] for at in np.flatnonzero(kept).tolist()], moved, others


def _check_numbers(pieces: Pieces, limits: tuple[int, int]) -> None:
    for column, limit in zip((pieces.tensor, pieces.entry), limits, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < limit:
            raise ConfigError(
                "a piece is of a tensor that is not listed", hint="pieces count tensors and entries from 0"
            )


def _slots(pieces: Pieces, tensors: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Number the local tensors that hold each tensor: the slot of each piece, then entry_of, lead_of, leads."""
    new = np.ones(len(pieces), np.bool_)
    new[1:] = (np.diff(pieces.tensor) != 0) | (np.diff(pieces.entry) != 0)
    heads = np.flatnonzero(new)
    of = pieces.tensor[heads]
    number = np.arange(len(heads)) - np.searchsorted(of, of)
    slots = int(number.max()) + 1 if len(heads) else 1
    entry_of, lead_of = np.full((slots, tensors), -1, np.int64), np.zeros((slots, tensors), np.int64)
    entry_of[number, of] = pieces.entry[heads]
    leads, lead_of[number, of] = np.unique(pieces.offset[heads], return_inverse=True)
    if not len(leads):
        leads = np.zeros(1, np.int64)
    return number[np.cumsum(new) - 1], entry_of, lead_of, leads[:, None]


def _intern(tensor: Ints, rows: Ints, tensors: int) -> tuple[Ints, Ints, Ints]:
    """Give tensors whose rows are equal one number: it for each tensor, the rows of all numbers, the number of each."""
    known, row_of = distinct(tuple(rows.T))
    first, last = np.searchsorted(tensor, np.arange(tensors)), np.searchsorted(tensor, np.arange(tensors), side="right")
    numbers: dict[bytes, int] = {}
    geometry_of = np.full(tensors, -1, np.int64)
    kept: list[Ints] = []
    for at in np.flatnonzero(last > first).tolist():
        own = row_of[first[at] : last[at]]
        number = numbers.setdefault(own.tobytes(), len(numbers))
        if number == len(kept):
            kept.append(own)
        geometry_of[at] = number
    index = np.repeat(np.arange(len(kept)), [len(own) for own in kept])
    return geometry_of, known[np.concatenate(kept)] if kept else rows[:0], index.astype(np.int64)


def _locals(layout: Layout) -> Locals:
    entries = layout.entries
    dims = max([1, *(len(entry.shape) for entry in entries)])
    forms: dict[tuple[int, ...], int] = {}
    shape_of = np.array([forms.setdefault(entry.shape, len(forms)) for entry in entries], np.int64)
    heads: dict[tuple[int, int], int] = {}
    tied = np.array(
        [heads.setdefault(entry.place, n) if entry.nbytes else n for n, entry in enumerate(entries)], np.int64
    )
    sharing = {number: entry.sharing for number, entry in enumerate(entries) if entry.sharing}
    shapes = padded(list(forms), dims, 1)[:, None, :]
    lengths = np.array([len(form) for form in forms], np.int64)
    names, dtypes = tuple(entry.name for entry in entries), tuple(entry.dtype for entry in entries)
    return Locals(names, dtypes, shape_of, shapes, lengths, tied, sharing)


def _aliases(tensors: Sequence[TensorInfo], where: tuple[Ints, Ints, Ints]) -> Ints:
    """For each tensor find the first that lies in just the same places."""
    geometry_of, heads, leads = where
    alias = np.arange(len(tensors))
    _, of = distinct((geometry_of, *heads, *np.where(heads < 0, 0, leads)))
    counts = np.bincount(of) if len(of) else of
    first = np.full(len(counts), len(tensors))
    np.minimum.at(first, of, np.arange(len(of)))
    for at in np.flatnonzero((counts[of] > 1) & (geometry_of >= 0)).tolist():
        head = int(first[of[at]])
        if (tensors[at].dtype, tensors[at].shape) == (tensors[head].dtype, tensors[head].shape):
            alias[at] = head
    return alias


def tie(alias: Ints, tensors: Sequence[TensorInfo], tied: Mapping[str, str]) -> None:
    """Note in `alias` which tensors are one.

    Raises:
        ConfigError: there is no such tensor, or two differ in shape or dtype.
    """
    number = {tensors[at].name: at for at in range(len(tensors))} if tied else {}
    for pair in tied.items():
        missing = [name for name in pair if name not in number]
        if missing:
            raise ConfigError(f"there is no tensor {missing[0]!r:.200} to tie", hint="tied names tensors")
        one, two = (number[name] for name in pair)
        if (tensors[one].dtype, tensors[one].shape) != (tensors[two].dtype, tensors[two].shape):
            raise ConfigError(f"{pair[0]!r:.200} and {pair[1]!r:.200} cannot be tied: they differ in shape or dtype")
        low, high = sorted((int(alias[one]), int(alias[two])))
        alias[alias == high] = low

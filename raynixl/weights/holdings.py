"""Holdings: the source's side of a plan, which part of it has which box of each tensor, and where."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from raynixl.weights.difference import Difference
from raynixl.weights.intersect import Cells, cells
from raynixl.weights.layout import shape_text
from raynixl.weights.pieces import Ints, TensorInfo, distinct, widened
from raynixl.weights.shards import Shards
from raynixl.weights.table import Table


class Held(NamedTuple):
    """The boxes of one class of tensors: who has each, in which slot, from where in it, and with which strides."""

    cells: Cells
    part: Ints
    slot: Ints
    offset: Ints
    stride: Ints


class Holdings:
    """What the ranks of a source hold together. Ranks with equal shards are one part."""

    def __init__(self, sources: Sequence[Shards]) -> None:
        parts: dict[str, list[int]] = {}
        for number, shards in enumerate(sources):
            parts.setdefault(shards.digest, []).append(number)
        self.parts: tuple[tuple[int, ...], ...] = tuple(map(tuple, parts.values()))
        self.shards = tuple(sources[members[0]] for members in self.parts)
        numbers: dict[str, int] = {}
        self.table_of = np.array([numbers.setdefault(own.table.digest, len(numbers)) for own in self.shards], np.int64)
        self.tables: tuple[Table, ...] = tuple(
            self.shards[int(np.argmax(self.table_of == number))].table for number in range(len(numbers))
        )
        self.tensors: list[TensorInfo] = []
        self.differences: list[Difference] = []
        self.index: dict[str, int] = {}
        self.where = self._number()
        self.alias = self._aliases()

    def _number(self) -> Ints:
        """Number the tensors of all tables: for each table and tensor its number there, or -1."""
        columns = [np.array([self._number_of(info) for info in table.tensors], np.int64) for table in self.tables]
        where = np.full((len(self.tables), len(self.tensors)), -1, np.int64)
        for row, column in zip(where, columns, strict=True):
            row[column] = np.arange(len(column))
        return where

    def _number_of(self, info: TensorInfo) -> int:
        number = self.index.get(info.name)
        if number is None:
            number = self.index[info.name] = len(self.tensors)
            self.tensors.append(info)
        elif (known := self.tensors[number]) is not info and known != info:
            cells = shape_text(known.dtype, known.shape), shape_text(info.dtype, info.shape)
            self.differences.append(Difference(info.name, *cells, "the sources disagree"))
        return number

    def _aliases(self) -> Ints:
        """For each tensor the first that has the same values: some table says so, and none has both apart."""
        alias = np.arange(len(self.tensors))
        for table in self.tables:
            for number in np.flatnonzero(table.alias != np.arange(len(table.alias))).tolist():
                pair = (number, int(table.alias[number]))
                one, other = sorted(int(alias[self.index[table.tensors[at].name]]) for at in pair)
                alias[alias == other] = one
        tied = np.flatnonzero(alias != np.arange(len(alias)))
        for table, where in zip(self.tables, self.where, strict=True):
            ours, heads = where[tied], where[alias[tied]]
            has_both = (ours >= 0) & (heads >= 0)
            has_both[has_both] = (table.geometry_of[ours[has_both]] >= 0) & (table.geometry_of[heads[has_both]] >= 0)
            apart = tied[has_both][table.alias[ours[has_both]] != table.alias[heads[has_both]]]
            alias[apart] = apart
        return alias

    @cached_property
    def class_of(self) -> Ints:
        """A number for each tensor: tensors of one class lie in the same way at all parts."""
        return self._classes[0]

    @cached_property
    def _classes(self) -> tuple[Ints, Ints]:
        lies = np.full(self.where.shape, -1, np.int64)
        for row, table, where in zip(lies, self.tables, self.where, strict=True):
            row[where >= 0] = table.geometry_of[where[where >= 0]]
        keys, of = distinct(tuple(lies))
        return of, keys

    def held(self, number: int) -> Held:
        """Return who has which box of the tensors of one class, no box by two at once."""
        found = []
        for table, geometry in enumerate(self._classes[1][number].tolist()):
            if geometry >= 0:
                rows = self.tables[table].geometries.of(geometry)
                part = self._part_of[table][rows.rank]
                columns = (part, rows.slot, rows.offset, rows.start, rows.size, rows.stride)
                found.append([column[part >= 0] for column in columns])
        dims = max([1, *(columns[3].shape[1] for columns in found)])
        part, slot, offset = (np.concatenate([np.zeros(0, np.int64), *(own[n] for own in found)]) for n in range(3))
        start, size, stride = (
            np.concatenate([np.zeros((0, dims), np.int64), *(widened(own[n], dims, fill) for own in found)])
            for n, fill in ((3, 0), (4, 1), (5, 0))
        )
        own = cells(start, size) if len(start) else Cells(start, size, part, part, part)
        at = own.holder
        return Held(
            own, part[at], slot[at], offset[at] + ((own.start - start[at]) * stride[at]).sum(axis=1), stride[at]
        )

    @cached_property
    def _part_of(self) -> list[Ints]:
        """For each table the part that each rank stands for, -1 for those that are replicas or no sources."""
        found = [np.full(table.ranks, -1, np.int64) for table in self.tables]
        for part, shards in enumerate(self.shards):
            found[int(self.table_of[part])][shards.rank] = part
        return found

    @cached_property
    def _store(self) -> tuple[Ints, Ints, Ints]:
        """All positions in one array: those of a part's slot begin at `first[part] + slot * step[part]`."""
        kept: dict[tuple[int, bytes], int] = {}
        arrays: list[Ints] = []
        first, size = np.zeros(len(self.shards), np.int64), 0
        for part, shards in enumerate(self.shards):
            bases = shards.table.bases(shards.rank, shards.table.places(shards.rank))
            key = (int(self.table_of[part]), bases.tobytes())
            if key not in kept:
                kept[key] = size
                arrays.append(bases.reshape(-1))
                size += bases.size
            first[part] = kept[key]
        step = np.array([len(shards.table.tensors) for shards in self.shards], np.int64)
        return np.concatenate(arrays), first, step

    def positions(self, tensors: Ints, parts: Ints, slots: Ints) -> Ints:
        """Return where slots of tensors begin in the arenas of parts: a row for each tensor."""
        store, first, step = self._store
        own = self.where[self.table_of[parts][None, :], tensors[:, None]]
        return store[(first[parts] + slots * step[parts])[None, :] + own]

"""Needs: the target's side of a plan, which tensors go into its local ones, and where those lie in an image."""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raynixl.weights.difference import DTYPE_DIFFERS, Difference, is_same_view
from raynixl.weights.holdings import Holdings
from raynixl.weights.layout import Layout, shape_text
from raynixl.weights.pieces import Ints, TensorInfo, widened
from raynixl.weights.shards import Shards, entry_at
from raynixl.weights.table import Table, pack

_LAST = np.int64(1 << 62)


class Needs:
    """What the ranks of one target's table need of a source. `wanted[g]` is the source's number of tensor g, or -1."""

    def __init__(self, table: Table, holdings: Holdings) -> None:
        self.table = table
        self._holdings = holdings
        self.differences: list[Difference] = []
        self.wanted = self._match()
        self._check_dtypes()
        self._check_ties()

    def _match(self) -> Ints:
        table, index, known = self.table, self._holdings.index, self._holdings.tensors
        wanted = np.full(len(table.tensors), -1, np.int64)
        for number, info in enumerate(table.tensors):
            if table.geometry_of[number] < 0 and 0 not in info.shape:
                continue  # no rank has any of it
            found = index.get(info.name, -1)
            if found < 0:
                found = self._by_alias(number)
            theirs = known[found] if found >= 0 else None
            if theirs is not None and theirs.shape == info.shape and theirs.dtype == info.dtype:
                wanted[number] = self._holdings.alias[found]
            else:
                self.differences.append(_unlike(theirs, info))
        return wanted

    def _by_alias(self, number: int) -> int:
        """Return the source's number of a tensor that the target has tied to this one, or -1."""
        table = self.table
        alike = np.flatnonzero(table.alias == table.alias[number]).tolist()
        names = (table.tensors[other].name for other in alike if other != number)
        return next((self._holdings.index[name] for name in names if name in self._holdings.index), -1)

    def _check_dtypes(self) -> None:
        """Bytes are carried as they are: local tensors must have the dtype of what goes into them."""
        table = self.table
        kinds = {name: at for at, name in enumerate({*table.locals.dtypes, *(info.dtype for info in table.tensors)})}
        own = np.array([*(kinds[dtype] for dtype in table.locals.dtypes), -1], np.int64)
        needed = np.array([kinds[info.dtype] for info in table.tensors], np.int64)
        for slot in table.entry_of:
            for at in np.flatnonzero((slot >= 0) & (self.wanted >= 0) & (own[slot] != needed)).tolist():
                info, entry = table.tensors[at], int(slot[at])
                target = f"{table.locals.dtypes[entry]} in {table.locals.names[entry]}"
                row = Difference(info.name, shape_text(info.dtype, info.shape), target, DTYPE_DIFFERS)
                self.differences.append(row)

    @cached_property
    def order(self) -> Ints:
        """The local tensors in the order of the source's first tensor in each: equal needs are laid out alike."""
        table = self.table
        first = np.full(len(table.locals.names), _LAST, np.int64)
        for slot in table.entry_of:
            used = np.flatnonzero((slot >= 0) & (self.wanted >= 0))
            np.minimum.at(first, slot[used], self.wanted[used])
        order = np.argsort(first, kind="stable")
        names, starts = table.locals.names, np.flatnonzero(np.diff(first[order], prepend=-1))
        for begin, end in itertools.pairwise([*starts.tolist(), len(order)]):
            if end - begin > 1:
                order[begin:end] = sorted(order[begin:end].tolist(), key=names.__getitem__)
        return order.astype(np.int64)

    @cached_property
    def group_of(self) -> Ints:
        """For each local tensor the first, in order, that gets the same bytes: they lie in one place."""
        table = self.table
        position = np.empty(len(self.order), np.int64)
        position[self.order] = np.arange(len(self.order))
        heads: dict[object, int] = {}
        root = np.arange(len(position))
        for entry in sorted(self._contents, key=position.__getitem__):
            shape = int(table.locals.shape_of[entry]), table.locals.dtypes[entry]
            head = int(table.locals.tied[entry])
            root[head] = heads.setdefault((self._contents[entry], shape), head)
        group = root[table.locals.tied]
        first = np.full(len(group), _LAST, np.int64)
        np.minimum.at(first, group, position)
        return self.order[first[group]]

    @cached_property
    def _contents(self) -> dict[int, tuple[object, ...]]:
        """What goes into the local tensors that may not be alone in getting it: pieces of the source's tensors."""
        table = self.table
        filled = (table.entry_of >= 0) & (self.wanted >= 0)[None, :]
        counts = np.zeros(len(self._holdings.tensors) + 1, np.int64)
        np.add.at(counts, np.broadcast_to(self.wanted, filled.shape)[filled], 1)
        doubtful = np.zeros(len(table.locals.names), np.bool_)
        doubtful[table.entry_of[filled & (counts[self.wanted] > 1)[None, :]]] = True
        ties = np.flatnonzero(table.locals.tied != np.arange(len(doubtful)))
        doubtful[ties] = doubtful[table.locals.tied[ties]] = True
        found: dict[int, list[tuple[object, ...]]] = {}
        for slot, number in np.argwhere(filled & np.append(doubtful, np.False_)[table.entry_of]).tolist():
            rows = table.geometries.of(int(table.geometry_of[number]))
            own = b"".join(column[rows.slot == slot].tobytes() for column in rows[3:])
            lead = table.leads[table.lead_of[slot, number]].tobytes()
            ranks = rows.rank[rows.slot == slot].tobytes()
            content = (int(self.wanted[number]), own, ranks, lead)
            found.setdefault(int(table.entry_of[slot, number]), []).append(content)
        return {entry: tuple(sorted(pieces, key=repr)) for entry, pieces in found.items()}

    def _check_ties(self) -> None:
        """What shares memory at the target must be the same, or share it likewise, at the source."""
        table, contents = self.table, self._contents
        for entry in np.flatnonzero(table.locals.tied != np.arange(len(table.locals.tied))).tolist():
            head = int(table.locals.tied[entry])
            if entry in contents and head in contents and contents[entry] != contents[head]:
                self._untied(entry, head)
        clusters: dict[int, int] = {}
        for entry, sharing in sorted(table.locals.sharing.items()):
            head = clusters.setdefault(sharing[0], entry)
            if head != entry and not all(self._share_alike(source, (head, entry)) for source in self._holdings.tables):
                self._untied(entry, head)

    def _untied(self, entry: int, head: int) -> None:
        names = self.table.locals.names
        why = "tied at the target alone"
        self.differences.append(Difference(names[entry], "apart", f"shares memory with {names[head]}", why))

    def _share_alike(self, source: Table, pair: tuple[int, int]) -> bool:
        ours = [self._entry_of(source, entry) for entry in pair]
        if None in ours:
            return True  # it is missing there, which is told elsewhere
        mine = [entry_at(source, (0, entry), -1) for entry in ours if entry is not None]
        return is_same_view(mine[0], mine[1], *(entry_at(self.table, (0, entry), -1) for entry in pair))

    def _entry_of(self, source: Table, entry: int) -> int | None:
        """Return the source's local tensor that has the tensor that goes into one of ours."""
        for number in np.flatnonzero((self.table.entry_of == entry).any(axis=0)).tolist():
            found = source.index.get(self.table.tensors[number].name)
            if found is not None and source.entry_of[0, found] >= 0:
                return int(source.entry_of[0, found])
        return None

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Whether a rank has pieces of a slot of a geometry: (slots, geometries, ranks)."""
        rows = self.table.geometries
        count = int(rows.number[-1]) + 1 if len(rows.number) else 1
        found = np.zeros((len(self.table.entry_of), count, self.table.ranks), np.bool_)
        found[rows.slot, rows.number, rows.rank] = True
        return found


def _unlike(theirs: TensorInfo | None, ours: TensorInfo) -> Difference:
    cell = shape_text(ours.dtype, ours.shape)
    if theirs is None:
        return Difference(ours.name, "-", cell, "missing at the source")
    what = [label for label in ("shape", "dtype") if getattr(theirs, label) != getattr(ours, label)]
    why = f"{' and '.join(what)} {'differs' if len(what) == 1 else 'differ'}"
    return Difference(ours.name, shape_text(theirs.dtype, theirs.shape), cell, why)


class Image:
    """The bytes that one rank of a target needs, in its shadow slot: where each of its local tensors lies."""

    def __init__(self, needs: Needs, rank: int) -> None:
        self.needs = needs
        self.rank = rank
        table = needs.table
        has = np.zeros(len(table.locals.names), np.bool_)
        for slot, present in zip(table.entry_of, needs.present, strict=True):
            used = np.flatnonzero((slot >= 0) & (needs.wanted >= 0) & (table.geometry_of >= 0))
            has[slot[used[present[table.geometry_of[used], rank]]]] = True
        nbytes = table.entry_nbytes(rank)
        fed = np.zeros(len(has), np.bool_)
        fed[needs.group_of[has]] = True
        order = needs.order
        self._entries = order[((fed[needs.group_of] & (nbytes > 0)) | (nbytes == 0))[order]]
        self.carried = self._carriers(has)
        places, sizes = self._pack(nbytes)
        self.arenas: tuple[int, ...] = tuple(sizes.tolist())
        self.places = places

    def _carriers(self, has: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of local tensors that get the same bytes, only the first one's are pulled."""
        filled = self._entries[has[self._entries]]
        _, first = np.unique(self.needs.group_of[filled], return_index=True)
        carried = np.zeros(len(has), np.bool_)
        carried[filled[first]] = True
        return carried

    def _pack(self, nbytes: Ints) -> tuple[Ints, Ints]:
        own = self._entries
        groups = self.needs.group_of[own]
        _, first, of = np.unique(groups, return_index=True, return_inverse=True)
        packed, sizes = pack(nbytes[own], first[of.reshape(-1)].astype(np.int64))
        places = np.full(len(nbytes), -1, np.int64)
        places[own] = packed
        return places, sizes

    @cached_property
    def layout(self) -> Layout:
        """The image as entries, named as the target's local tensors are."""
        table, places = self.needs.table, self.places
        own = self._entries.tolist()
        return Layout(tuple(entry_at(table, (self.rank, entry), int(places[entry])) for entry in own), self.arenas)

    def key(self, dims: int) -> object:
        """Return what is equal for images of equal needs, whatever tables they come from; `dims` suffice for all."""
        table, own = self.needs.table, self._entries.tolist()
        pieces = Shards(table, self.rank).pieces
        wanted = self.needs.wanted[pieces.tensor]
        entry = np.flatnonzero(table.entry_nbytes(self.rank) >= 0)[pieces.entry]
        at = self.places[entry] + pieces.offset * table.entry_itemsizes[entry]
        boxes = (widened(box, dims, n) for box, n in ((pieces.start, 0), (pieces.size, 1), (pieces.stride, 0)))
        rows = np.column_stack((wanted, at, *boxes))[wanted >= 0]
        kinds = tuple((table.locals.names[n], table.locals.dtypes[n], table.entry_shape(n, self.rank)) for n in own)
        sharing = tuple(table.locals.sharing.get(n, ()) for n in own)
        return self.arenas, kinds, sharing, self.places[own].tobytes(), np.unique(rows, axis=0).tobytes()

    @cached_property
    def bases(self) -> Ints:
        """The position at which each slot of each tensor begins."""
        return self.needs.table.bases(self.rank, self.places)

    @cached_property
    def is_simple(self) -> bool:
        """Whether all that is needed is pulled for itself."""
        own = self._entries
        return bool((self.needs.group_of[own] == own).all())

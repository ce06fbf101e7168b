"""Ranges: which bytes of which source part go where in an image, as rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import RangeError
from raynixl.weights.columns import Columns, pack_columns
from raynixl.weights.pieces import Ints

_MAGIC = b"RXRG"
PART, SOURCE_ARENA, SOURCE_OFFSET, ARENA, OFFSET, RUN_NBYTES, COUNT, SOURCE_STRIDE, STRIDE = range(9)


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Strided runs of bytes: each row is `count` runs of `run_nbytes`, `source_stride` and `stride` bytes apart.

    `rows` (N, 9) holds the columns that the properties name. No byte of an image is in two rows. Rows are in order of
    part, then of their place in the image.
    """

    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and np.array_equal(self.rows, other.rows)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        runs = int(self.count.sum())
        return f"{self.nbytes / 1e6:,.1f} MB in {runs:,} runs ({len(self):,} rows) of {len(self.parts)} parts"

    def __getitem__(self, rows: slice | NDArray[np.bool_] | Ints) -> Ranges:
        return Ranges(self.rows[rows])

    @property
    def part(self) -> Ints:
        """The part of the source that has the bytes."""
        return self.rows[:, PART]

    @property
    def source_arena(self) -> Ints:
        """The arena of the source that they lie in."""
        return self.rows[:, SOURCE_ARENA]

    @property
    def source_offset(self) -> Ints:
        """Where the first run begins there."""
        return self.rows[:, SOURCE_OFFSET]

    @property
    def arena(self) -> Ints:
        """The arena of the image that they go to."""
        return self.rows[:, ARENA]

    @property
    def offset(self) -> Ints:
        """Where the first run begins there."""
        return self.rows[:, OFFSET]

    @property
    def run_nbytes(self) -> Ints:
        """The length of a run."""
        return self.rows[:, RUN_NBYTES]

    @property
    def count(self) -> Ints:
        """The number of runs."""
        return self.rows[:, COUNT]

    @property
    def source_stride(self) -> Ints:
        """How far the runs are apart at the source."""
        return self.rows[:, SOURCE_STRIDE]

    @property
    def stride(self) -> Ints:
        """How far the runs are apart in the image."""
        return self.rows[:, STRIDE]

    @property
    def nbytes(self) -> int:
        """All bytes."""
        return int((self.run_nbytes * self.count).sum())

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts that have any of the bytes."""
        return tuple(np.unique(self.part).tolist())

    def expand(self) -> Ints:
        """Return one row for each run: part, source arena, source offset, arena, offset, nbytes."""
        counts = self.count
        rows = np.repeat(self.rows, counts, axis=0)
        turn = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows[:, SOURCE_OFFSET] += turn * rows[:, SOURCE_STRIDE]
        rows[:, OFFSET] += turn * rows[:, STRIDE]
        return np.ascontiguousarray(rows[:, :COUNT])

    def cut(self, arenas: Sequence[int], chunk_nbytes: int) -> Cuts:
        """Cut at the chunks of an image with arenas of these sizes, numbered as `Layout.chunks` numbers them."""
        sizes = -(-np.array(arenas, np.int64) // chunk_nbytes)
        firsts = np.cumsum(sizes) - sizes
        rows, within = _cut(self.rows, chunk_nbytes)
        chunk = firsts[rows[:, ARENA]] + within if len(rows) else within
        order = np.argsort(chunk, kind="stable")
        bounds = np.searchsorted(chunk[order], np.arange(int(sizes.sum()) + 1))
        return Cuts(Ranges(rows[order]), bounds.astype(np.int64))

    def check(self, source_arenas: Sequence[Sequence[int]], arenas: Sequence[int]) -> None:
        """Refuse rows that reach outside the arenas of their part, or of the image.

        Raises:
            RangeError: some do.
        """
        if not len(self):
            return
        counts = np.array([len(sizes) for sizes in source_arenas], np.int64)
        part = np.minimum(self.part, len(counts) - 1)
        known = np.array([size for sizes in source_arenas for size in sizes], np.int64)
        at = (np.cumsum(counts) - counts)[part] + np.minimum(self.source_arena, counts[part] - 1)
        inside = (self.part < len(counts)) & (self.source_arena < counts[part]) & (self.arena < len(arenas))
        own = np.array(arenas, np.int64)[np.minimum(self.arena, len(arenas) - 1)]
        inside &= self.source_offset + (self.count - 1) * self.source_stride + self.run_nbytes <= known[at]
        inside &= self.offset + (self.count - 1) * self.stride + self.run_nbytes <= own
        if not inside.all():
            raise RangeError(f"{int((~inside).sum())} ranges of a plan lie outside their arenas", hint="plan again")

    def to_bytes(self) -> bytes:
        """Return the rows as bytes for a peer."""
        return pack_columns(_MAGIC, [], list(self.rows.T))

    @staticmethod
    def from_bytes(data: bytes) -> Ranges:
        """Parse rows that a peer sent; `check` says whether they fit the arenas.

        Raises:
            IntegrityError: they are malformed.
        """
        columns = Columns(data, _MAGIC, "a list of ranges")
        first = columns.array(None, high=1 << 32)
        rest = [columns.array(len(first), low=low, high=1 << 46) for low in (0, 0, 0, 0, 1, 1, 0, 0)]
        columns.end()
        rows = np.column_stack([first, *rest])
        if (
            rows[:, COUNT].astype(np.float64) * rows[:, [SOURCE_STRIDE, STRIDE, RUN_NBYTES]].max(axis=1) > 1 << 60
        ).any():
            raise columns.malformed("a row is too long")
        if ((rows[:, COUNT] > 1) & (rows[:, STRIDE] < rows[:, RUN_NBYTES])).any():
            raise columns.malformed("runs overlap")
        return Ranges(rows)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Ranges cut at chunks: those of chunk m are `ranges[bounds[m]:bounds[m + 1]]`."""

    ranges: Ranges
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, chunk: int) -> Ranges:
        return self.ranges[int(self.bounds[chunk]) : int(self.bounds[chunk + 1])]

    @property
    def nbytes(self) -> Ints:
        """The bytes that go into each chunk."""
        sums = np.concatenate(([0], np.cumsum(self.ranges.run_nbytes * self.ranges.count)))
        return np.asarray(sums[self.bounds[1:]] - sums[self.bounds[:-1]], np.int64)


def join(rows: Ints) -> Ranges:
    """Return rows in order, with those joined into one that follow each other at the source and in the image."""
    rows = rows.copy()
    dense = (
        (rows[:, COUNT] > 1) & (rows[:, STRIDE] == rows[:, RUN_NBYTES]) & (rows[:, SOURCE_STRIDE] == rows[:, STRIDE])
    )
    rows[dense, RUN_NBYTES] *= rows[dense, COUNT]
    rows[dense, COUNT] = 1
    single = rows[:, COUNT] == 1
    rows[single, SOURCE_STRIDE] = rows[single, STRIDE] = 0
    rows = rows[np.lexsort((rows[:, OFFSET], rows[:, ARENA], rows[:, PART]))]
    single = rows[:, COUNT] == 1
    follows = (
        single[1:]
        & single[:-1]
        & (rows[1:, [PART, SOURCE_ARENA, ARENA]] == rows[:-1, [PART, SOURCE_ARENA, ARENA]]).all(axis=1)
    )
    for column in (SOURCE_OFFSET, OFFSET):
        follows &= rows[1:, column] == rows[:-1, column] + rows[:-1, RUN_NBYTES]
    heads = np.flatnonzero(np.concatenate(([True], ~follows))[: len(rows)])
    if len(heads) < len(rows):
        lengths = np.add.reduceat(rows[:, RUN_NBYTES], heads)
        kept = rows[heads]
        kept[kept[:, COUNT] == 1, RUN_NBYTES] = lengths[kept[:, COUNT] == 1]
        rows = kept
    return Ranges(rows)


def _cut(rows: Ints, chunk_nbytes: int) -> tuple[Ints, Ints]:
    """Cut rows at multiples of chunk_nbytes in their arena: rows, and which chunk of its arena each one lies in.

    Of a row, each chunk gets the end of a run that began before it, its whole runs, and the beginning of one more.
    """
    last = rows[:, OFFSET] + (rows[:, COUNT] - 1) * rows[:, STRIDE] + rows[:, RUN_NBYTES] - 1
    first_chunk = rows[:, OFFSET] // chunk_nbytes
    touched = last // chunk_nbytes - first_chunk + 1
    whole = rows[touched == 1]
    split, touched, first_chunk = rows[touched > 1], touched[touched > 1], first_chunk[touched > 1]
    each = np.repeat(split, touched, axis=0)
    chunk = np.repeat(first_chunk - (np.cumsum(touched) - touched), touched) + np.arange(len(each))
    begin, end = chunk * chunk_nbytes - each[:, OFFSET], (chunk + 1) * chunk_nbytes - each[:, OFFSET]
    run, count, stride = each[:, RUN_NBYTES], each[:, COUNT], np.maximum(each[:, STRIDE], 1)
    low = np.clip(-(-begin // stride), 0, count)
    high = np.clip((end - run) // stride + 1, low, count)
    parts = [(whole, whole[:, OFFSET] // chunk_nbytes)]
    full = each.copy()
    full[:, COUNT] = high - low
    parts.append((_moved(full, low, np.int64(0)), chunk))
    for turn in (low - 1, high):  # the run that the chunk's beginning cuts, and the one that its end cuts
        at = turn * stride
        cut_from, cut_to = np.maximum(begin - at, 0), np.minimum(end - at, run)
        is_real = (turn >= 0) & (turn < count) & (cut_from < cut_to)
        cut = each.copy()
        cut[:, RUN_NBYTES], cut[:, COUNT] = cut_to - cut_from, is_real
        parts.append((_moved(cut, turn, cut_from), chunk))
    found = np.concatenate([part for part, _ in parts])
    chunks = np.concatenate([number for _, number in parts])
    kept = found[:, COUNT] > 0
    found, chunks = found[kept], chunks[kept]
    alone = found[:, COUNT] == 1
    found[alone, SOURCE_STRIDE] = found[alone, STRIDE] = 0
    return found, chunks


def _moved(rows: Ints, turns: Ints, nbytes: Ints | np.int64) -> Ints:
    rows[:, SOURCE_OFFSET] += turns * rows[:, SOURCE_STRIDE] + nbytes
    rows[:, OFFSET] += turns * rows[:, STRIDE] + nbytes
    return rows

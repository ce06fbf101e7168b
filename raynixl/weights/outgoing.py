"""Outgoing rows: what a source serves to every image of a plan, prepared once, and digested for each version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import IntegrityError, RangeError
from raynixl.weights.digest import ARENA_BIT
from raynixl.weights.ranges import COUNT, PART, Ranges
from raynixl.weights.sourcing import ImageRows, Outgoing, Partial

if TYPE_CHECKING:
    from raynixl.weights.bank import Bank

U64 = NDArray[np.uint64]
ADDRESS, NBYTES, POSITION, INDEX = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one image gets: the chunks that get anything, rows [first, last) of all, and sums from `index` on."""

    image: int
    place: int
    chunks: NDArray[np.uint32]
    first: int
    last: int
    index: int


class OutgoingRows:
    """All rows that a source serves under a plan: each lies in one chunk of one image, in their order.

    `rows` (N, 4) are the offset in the source's arena, length, position in the image, and number of the sum that the
    digest of a row goes to; `arena` (N,) is the source's arena.

    Raises:
        IntegrityError: a row reaches outside of the source's arenas, or of the image's.
    """

    def __init__(self, message: Outgoing, arenas: Sequence[int]) -> None:
        self.plan = message.plan
        self.chunk_nbytes = message.chunk_nbytes
        self.shares: list[Share] = []
        rows: list[U64] = [np.zeros((0, 4), np.uint64)]
        own: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        first = index = 0
        for image in message.rows:
            found, arena, chunks = _rows(image, message.chunk_nbytes, arenas)
            self.shares.append(Share(image.image, image.place, chunks, first, first + len(found), index))
            found[:, INDEX] += np.uint64(index)
            first, index = first + len(found), index + len(chunks)
            rows.append(found)
            own.append(arena)
        self.rows = np.concatenate(rows)
        self.arena = np.concatenate(own)
        self._sums = index

    def zeros(self) -> U64:
        """Return sums for the digests of all rows, none of them added yet."""
        return np.zeros((self._sums, 2), np.uint64)

    def __repr__(self) -> str:
        return f"OutgoingRows({len(self.shares)} images, {len(self.rows)} rows, {self.nbytes / 1e6:,.1f} MB)"

    @property
    def nbytes(self) -> int:
        """The bytes of all rows; what goes to two images counts twice."""
        return int(self.rows[:, NBYTES].sum())

    def at(self, bank: Bank) -> U64:
        """Return the rows with their addresses in these arenas."""
        rows = self.rows.copy()
        rows[:, ADDRESS] += bank.addresses[self.arena]
        return rows

    def digest(self, bank: Bank, *, version: int, threads: int) -> dict[int, Partial]:
        """Return this source's share of the digest of every chunk, for each image that gets anything."""
        sums = self.zeros()
        if len(self.rows):
            bank.digest(self.at(bank), sums, seed=version, threads=threads)
        return self.partials(sums)

    def partials(self, sums: U64) -> dict[int, Partial]:
        """Return sums to which all rows were added, for each image that gets anything."""
        return {
            share.image: Partial(share.chunks, sums[share.index : share.index + len(share.chunks)])
            for share in self.shares
        }


def _rows(
    image: ImageRows, chunk_nbytes: int, arenas: Sequence[int]
) -> tuple[U64, NDArray[np.int64], NDArray[np.uint32]]:
    """Return the rows of one image, the source's arena of each, and the numbers of the chunks that get anything."""
    ranges = Ranges.from_bytes(image.ranges)
    ranges.rows[:, PART] = 0
    try:
        ranges.check([arenas], image.arenas)
    except RangeError as exc:
        raise IntegrityError(f"outgoing rows are malformed: {exc.message}", hint="plan again") from exc
    cuts = ranges.cut(image.arenas, chunk_nbytes)
    counts = np.diff(cuts.bounds)
    chunks = np.flatnonzero(counts)
    number = np.repeat(np.repeat(np.arange(len(chunks)), counts[chunks]), cuts.ranges.rows[:, COUNT])
    runs = cuts.ranges.expand()
    _, source_arena, source_offset, arena, offset, nbytes = runs.T
    position = arena << ARENA_BIT | offset
    rows = np.stack([source_offset, nbytes, position, number], axis=1).astype(np.uint64)
    return np.ascontiguousarray(rows), source_arena, chunks.astype(np.uint32)

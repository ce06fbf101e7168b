"""Cargo: what a target pulls chunk by chunk, an image or a delta: where each chunk lies, here and at its sources."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import IntegrityError
from raynixl.weights.digest import ARENA_BIT
from raynixl.weights.layout import Layout
from raynixl.weights.ranges import OFFSET, PART, RUN_NBYTES, SOURCE_ARENA, SOURCE_OFFSET, Ranges
from raynixl.weights.targeting import Blob, Incoming

if TYPE_CHECKING:
    from raynixl.blocks import Blocks
    from raynixl.region import Region, RemoteRegion
    from raynixl.weights.protocol import Holder

U64 = NDArray[np.uint64]
_KEPT_SHARES = 4096  # chunks whose reads are kept from push to push


@dataclass(frozen=True)
class Giver:
    """A source that has bytes of a chunk: its name, and the regions that its arenas are."""

    name: str
    regions: Sequence[RemoteRegion]
    offset: int = 0
    """Where the part begins in its only region, for a delta."""

    @cached_property
    def key(self) -> Hashable:
        """What tells its memory from any other."""
        return self.offset, tuple((one.owner, one.incarnation, one.id, one.generation) for one in self.regions)


@dataclass(frozen=True, slots=True)
class Share:
    """What one part gives to one chunk: (source arena, offsets, lengths)s, and where they go in the chunk's arena."""

    part: int
    there: tuple[tuple[int, U64], ...]
    lengths: tuple[U64, ...]
    here: U64

    def far(self, giver: Giver) -> list[Blocks]:
        """Return what to read from a giver."""
        return [
            giver.regions[arena].blocks(offsets + np.uint64(giver.offset), lengths)
            for (arena, offsets), lengths in zip(self.there, self.lengths, strict=True)
        ]

    def near(self, region: Region) -> Blocks:
        """Return where it goes."""
        return region.blocks(self.here, np.concatenate(self.lengths))


class Cargo(Protocol):
    """What is pulled. Chunks are numbered rows of (arena, offset, nbytes)."""

    chunks: NDArray[np.int64]

    @property
    def key(self) -> Hashable:
        """What tells it from any other."""

    def shares(self, chunk: int) -> Sequence[Share]:
        """Return what each part gives to a chunk."""

    def extents(self, chunk: int) -> NDArray[np.int64]:
        """Return what of a chunk comes from sources at all, as rows of (offset in its arena, nbytes)."""


class ImageCargo:
    """An image of a plan: which bytes of which part go where."""

    def __init__(self, incoming: Incoming) -> None:
        self.layout = Layout.from_bytes(incoming.layout)
        self.plan = incoming.plan
        self.number = incoming.image
        self.chunk_nbytes = incoming.chunk_nbytes
        self.chunks = self.layout.chunks(incoming.chunk_nbytes)
        ranges = Ranges.from_bytes(incoming.ranges)
        self.nbytes = ranges.nbytes
        self.parts = ranges.parts
        self.key = (self.plan, self.number, self.chunk_nbytes)  # a plan does not tell how images are cut
        self._cuts = ranges.cut(self.layout.arenas, incoming.chunk_nbytes)
        if len(self._cuts) != len(self.chunks):
            raise IntegrityError("the ranges do not fit the image", hint="run one version of raynixl everywhere")
        self._extents = [_merged(self._cuts[chunk]) for chunk in range(len(self.chunks))]
        self.shares = lru_cache(_KEPT_SHARES)(self._shares)

    def extents(self, chunk: int) -> NDArray[np.int64]:
        """See `Cargo`."""
        return self._extents[chunk]

    def _shares(self, chunk: int) -> Sequence[Share]:
        rows = self._cuts[chunk].expand()
        order = np.lexsort((rows[:, SOURCE_OFFSET], rows[:, SOURCE_ARENA], rows[:, PART]))
        return tuple(_share(part, own) for part, own in _by(rows[order], PART))


class DeltaCargo:
    """The blobs of a delta: one for each part, each an arena of its own."""

    def __init__(self, blobs: Sequence[Blob], chunk_nbytes: int) -> None:
        self.key = "delta"  # its memory is of one pull alone, and what is read into it
        self.sizes = [blob.nbytes for blob in blobs]
        self.chunks = np.array(
            [
                (place, offset, min(chunk_nbytes, nbytes - offset))
                for place, nbytes in enumerate(self.sizes)
                for offset in range(0, nbytes, chunk_nbytes)
            ],
            np.int64,
        ).reshape(-1, 3)

    def shares(self, chunk: int) -> Sequence[Share]:
        """See `Cargo`."""
        place, offset, nbytes = self.chunks[chunk].tolist()
        here = np.array([offset], np.uint64)
        return (Share(place, ((0, here),), (np.array([nbytes], np.uint64),), here),)

    def extents(self, chunk: int) -> NDArray[np.int64]:
        """See `Cargo`."""
        return self.chunks[chunk : chunk + 1, 1:]


def digest_table(cargo: Cargo, chunk: int, bases: U64) -> U64:
    """Return the rows that digest what came into a chunk; `bases` are the addresses of the arenas."""
    arena = int(cargo.chunks[chunk, 0])
    extents = cargo.extents(chunk)
    rows = np.zeros((len(extents), 4), np.uint64)
    offsets = extents[:, 0].astype(np.uint64)
    rows[:, 0] = offsets + bases[arena]
    rows[:, 1] = extents[:, 1]
    rows[:, 2] = offsets | np.uint64(arena << ARENA_BIT)
    return rows


def givers_of(holders: Sequence[Holder]) -> tuple[Giver, ...]:
    """Return holders of a part as givers."""
    return tuple(Giver(holder.name, holder.remotes()) for holder in holders)


def givers_of_blob(blob: Blob) -> tuple[Giver, ...]:
    """Return those who have a blob as givers."""
    return tuple(Giver(one.owner, [one.remote()], one.offset) for one in blob.at)


def _merged(ranges: Ranges) -> NDArray[np.int64]:
    """Return what ranges fill, in order, as few rows of (offset, nbytes)."""
    rows = ranges.expand()
    if not len(rows):
        return np.zeros((0, 2), np.int64)
    offset, nbytes = rows[:, OFFSET], rows[:, RUN_NBYTES]
    order = np.argsort(offset)
    offset, nbytes = offset[order], nbytes[order]
    heads = np.flatnonzero(np.concatenate(([True], offset[1:] != offset[:-1] + nbytes[:-1])))
    return np.column_stack((offset[heads], np.add.reduceat(nbytes, heads)))


def _share(part: int, rows: NDArray[np.int64]) -> Share:
    there, lengths = [], []
    for arena, own in _by(rows, SOURCE_ARENA):
        there.append((arena, own[:, SOURCE_OFFSET].astype(np.uint64)))
        lengths.append(own[:, RUN_NBYTES].astype(np.uint64))
    return Share(part, tuple(there), tuple(lengths), rows[:, OFFSET].astype(np.uint64))


def _by(rows: NDArray[np.int64], column: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Return runs of rows that are equal in a column."""
    bounds = np.flatnonzero(np.diff(rows[:, column], prepend=-1, append=-1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield int(rows[start, column]), rows[start:stop]


__all__ = ["Cargo", "DeltaCargo", "Giver", "ImageCargo", "Share", "digest_table", "givers_of", "givers_of_blob"]

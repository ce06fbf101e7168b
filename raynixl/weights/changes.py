"""Changes: what a source's rows of every image hold that they did not at a base version, as blobs that peers pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raynixl.weights.bank import Bank
from raynixl.weights.delta import MAX_SHARE
from raynixl.weights.digest import ARENA_BIT, digest_rows
from raynixl.weights.layout import Layout, itemsize
from raynixl.weights.outgoing import ADDRESS, NBYTES, POSITION, OutgoingRows, Share
from raynixl.weights.sourcing import DeltaOffer

U64 = NDArray[np.uint64]

ALIGNMENT = 64
_LARGEST_ITEM = 16
_SAMPLES, _SAMPLE_NBYTES = 256, 4096
_MUCH_SHARE = 2 * MAX_SHARE


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Rows of an image whose elements have one size: (offset at the source, arena, nbytes, position), ascending."""

    itemsize: int
    rows: NDArray[np.int64]


class Changes:
    """What encodes the rows of a plan; prepared once for it. Replicas make equal blobs."""

    def __init__(self, outgoing: OutgoingRows, layout: Layout) -> None:
        self._outgoing = outgoing
        sizes = _Itemsizes(layout)
        self._parts = {share.image: _parts(outgoing, share, sizes) for share in outgoing.shares}

    @staticmethod
    def can(chunk_nbytes: int) -> bool:
        """Whether chunks of this size never cut an element."""
        return chunk_nbytes % _LARGEST_ITEM == 0

    def encode(self, old: Bank, new: Bank, *, threads: int) -> dict[int, bytes]:
        """Return the blob of each image for which it is small enough; both banks are of one space."""
        encode = new.encoder(old, threads=threads)
        found = {}
        for image, parts in self._parts.items():
            if _seems_much(parts, old, new):
                continue
            room = int(sum(part.rows[:, 2].sum() for part in parts) * MAX_SHARE)
            blobs: list[bytes] = []
            for part in parts:
                blob = encode(part.rows, part.itemsize, room)
                if blob is None:
                    break
                blobs.append(blob)
                room -= len(blob)
            else:
                found[image] = b"".join(blobs)
        return found

    def offers(
        self, blobs: dict[int, bytes], memory: NDArray[np.uint8], *, base: int, seed: int
    ) -> dict[int, DeltaOffer]:
        """Put blobs into memory that peers read, one after the other, and return what is said of each."""
        places = {share.image: share.place for share in self._outgoing.shares}
        offers = {}
        at = 0
        for image, blob in blobs.items():
            memory[at : at + len(blob)] = np.frombuffer(blob, np.uint8)
            digests = _digests(memory[at : at + len(blob)], (places[image], self._outgoing.chunk_nbytes), seed)
            offers[image] = DeltaOffer(base, at, len(blob), digests)
            at += room(blob)
        return offers


def room(blob: bytes) -> int:
    """Return the bytes that a blob takes."""
    return -(-len(blob) // ALIGNMENT) * ALIGNMENT


def _seems_much(parts: Sequence[_Part], old: Bank, new: Bank) -> bool:
    """Whether a sample has far more changed elements than would fit: a step of training often changes nearly all.

    To find that out by encoding until there is no room took 2.5 s for 1 GB. The sample is the same at every replica.
    """
    seen = changed = 0
    for part in parts:
        rows = part.rows[:: max(1, len(part.rows) // _SAMPLES), :3].copy()
        size = np.minimum(rows[:, 2], _SAMPLE_NBYTES)
        rows[:, 0] += (rows[:, 2] - size) // 2 // part.itemsize * part.itemsize
        rows[:, 2] = size
        one, other = (np.frombuffer(bank.read(rows), f"V{part.itemsize}") for bank in (old, new))
        seen += int(size.sum())
        changed += int((one != other).sum()) * part.itemsize
    return changed > seen * _MUCH_SHARE


def _digests(blob: NDArray[np.uint8], place: tuple[int, int], seed: int) -> U64:
    """Return the digests of a blob's chunks, as of arena number `place` of a delta image."""
    arena, chunk_nbytes = place
    offsets = np.arange(0, blob.nbytes, chunk_nbytes, dtype=np.int64)
    sums = np.zeros((len(offsets), 2), np.uint64)
    if len(offsets):
        nbytes = np.minimum(chunk_nbytes, blob.nbytes - offsets)
        numbers = np.arange(len(offsets))
        rows = np.stack([blob.ctypes.data + offsets, nbytes, arena << ARENA_BIT | offsets, numbers], axis=1)
        digest_rows(np.ascontiguousarray(rows.astype(np.uint64)), sums, seed=seed)
    return sums


class _Itemsizes:
    """The size of elements at each place of a layout: positions from which on it is another one."""

    def __init__(self, layout: Layout) -> None:
        entries = sorted((entry.place, itemsize(entry.dtype)) for entry in layout.entries if entry.nbytes)
        kept = [n for n, (_, size) in enumerate(entries) if n == 0 or entries[n - 1][1] != size]
        self.starts = np.array([entries[n][0][0] << ARENA_BIT | entries[n][0][1] for n in kept], np.int64)
        self.sizes = np.array([entries[n][1] for n in kept], np.int64)

    def cut(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cut rows (offset, arena, nbytes, position) where the size changes; return them and their sizes."""
        at = rows[:, 1] << ARENA_BIT | rows[:, 0]
        first = np.searchsorted(self.starts, at, side="right") - 1
        last = np.searchsorted(self.starts, at + rows[:, 2] - 1, side="right") - 1
        counts = last - first + 1
        cut, of = np.repeat(rows, counts, axis=0), np.repeat(at, counts)
        number = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(cut))
        ends = np.append(self.starts[1:], np.iinfo(np.int64).max)
        begin = np.maximum(self.starts[number] - of, 0)
        end = np.minimum(ends[number] - of, cut[:, 2])
        cut[:, 0] += begin
        cut[:, 3] += begin
        cut[:, 2] = end - begin
        return cut, self.sizes[number]


def _parts(outgoing: OutgoingRows, share: Share, sizes: _Itemsizes) -> list[_Part]:
    own = outgoing.rows[share.first : share.last].astype(np.int64)
    arena = outgoing.arena[share.first : share.last]
    rows, size = sizes.cut(np.stack([own[:, ADDRESS], arena, own[:, NBYTES], own[:, POSITION]], axis=1))
    parts = ((one, rows[size == one]) for one in np.unique(size).tolist())
    return [_Part(one, np.ascontiguousarray(mine[np.argsort(mine[:, 3], kind="stable")])) for one, mine in parts]

"""Targeting: the messages between whoever pushes and a target; what is long in them is binary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raynixl.record import Incarnation, Name, RegionRecord
from raynixl.region import RemoteRegion
from raynixl.weights.pact import Stage
from raynixl.weights.protocol import Digest, Fault, Holder, Push, Seconds, Version, Wire
from raynixl.weights.sourcing import MAX_CHUNKS, ChunkNbytes, Count, Image, malformed, pack, u8, unpack

Part = Annotated[int, Field(ge=0, lt=1 << 20)]


class Describe(Wire):
    """To a target: say what you hold. One that records its loader asks `source` for the table of the tensors."""

    source: Name
    table: Digest
    seconds: Seconds


class Held(Wire):
    """A version that lies whole and verified in a slot of a target, and can be pulled from there."""

    version: Version
    image: Digest
    digest: Digest
    chunk_nbytes: ChunkNbytes
    holder: Holder


class Subscribed(Wire):
    """From a target: which rank of which table it is, what it serves, and the versions that it can give to others."""

    table: Digest
    rank: Annotated[int, Field(ge=0, lt=1 << 20)]
    host: Annotated[str, Field(max_length=300)]
    version: Count
    held: Annotated[tuple[Held, ...], Field(strict=False, max_length=1024)] = ()
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """To a target, once for each plan: its image, and which bytes of which part go where in it."""

    plan: str
    image: int
    chunk_nbytes: int
    layout: bytes
    ranges: bytes

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        head = _IncomingHead(
            plan=self.plan, image=self.image, chunk_nbytes=self.chunk_nbytes, layout=len(self.layout),
            ranges=len(self.ranges),
        )  # fmt: skip
        return pack(head, [self.layout, self.ranges])

    @staticmethod
    def from_bytes(data: bytes) -> Incoming:
        """Parse what whoever pushes sent.

        Raises:
            IntegrityError: it is malformed.
        """
        head, tail = unpack(_IncomingHead, data)
        layout, ranges = bytes(tail.take(head.layout)), bytes(tail.take(head.ranges))
        tail.end()
        return Incoming(head.plan, head.image, head.chunk_nbytes, layout, ranges)


class BlobAt(Wire):
    """A source that has a blob: in which region of it, and where in that."""

    owner: Name
    incarnation: Incarnation
    region: RegionRecord
    offset: Count

    def remote(self) -> RemoteRegion:
        """Return the region as a transfer takes it."""
        return RemoteRegion(self.owner, self.incarnation, self.region)


class Blob(Wire):
    """The delta of one part, and the sources that have it."""

    nbytes: Annotated[int, Field(ge=1, lt=1 << 48)]
    at: Annotated[tuple[BlobAt, ...], Field(strict=False, min_length=1, max_length=1024)]


@dataclass(frozen=True, slots=True)
class Pull:
    """To a target: bring this version into a slot and check it, the delta to `base` if that is not 0.

    `digests` (n, 2) are of the image's chunks, `blob_digests` of the delta's. In a relay, of the image or of the delta,
    the target asks under the push's own topics what to pull from whom. After `flip_seconds` whoever pushes has given
    the target up.
    """

    push: str
    version: int
    plan: str
    seconds: float
    flip_seconds: float
    is_relay: bool
    origins: Mapping[int, tuple[Holder, ...]]
    digests: NDArray[np.uint64]
    base: int = 0
    blobs: tuple[Blob, ...] = ()
    blob_digests: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    relays_delta: bool = False

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        head = _PullHead(
            push=self.push, version=self.version, plan=self.plan, seconds=self.seconds,
            flip_seconds=self.flip_seconds, is_relay=self.is_relay, origins=tuple(self.origins.items()),
            base=self.base, blobs=self.blobs, chunks=len(self.digests), blob_chunks=len(self.blob_digests),
            relays_delta=self.relays_delta,
        )  # fmt: skip
        return pack(head, [u8(self.digests), u8(self.blob_digests)])

    @staticmethod
    def from_bytes(data: bytes) -> Pull:
        """Parse what whoever pushes sent.

        Raises:
            IntegrityError: it is malformed.
        """
        head, tail = unpack(_PullHead, data)
        digests, blob_digests = tail.digests(head.chunks), tail.digests(head.blob_chunks)
        tail.end()
        if len(dict(head.origins)) != len(head.origins):
            raise malformed("it names a part twice")
        return Pull(
            head.push, head.version, head.plan, head.seconds, head.flip_seconds, head.is_relay, dict(head.origins),
            digests, head.base, head.blobs, blob_digests, head.relays_delta,
        )  # fmt: skip


class Step(Wire):
    """To a target that has pulled: flip, or let your readers in again, with the old version if you have not flipped."""

    push: Push
    seconds: Seconds


class Hold(Wire):
    """To a rank of a replica: keep your readers out, as the first half of a flip of all its `ranks` at once.

    It is the flip to what was pulled, or to `version`, if that is not 0, which the rank holds. If whoever pushes is
    gone before all have flipped, the ranks settle it among themselves; they know the flip as `pact`.
    """

    push: Push
    pact: Push
    seconds: Seconds
    version: Count = 0
    ranks: Annotated[tuple[Name, ...], Field(strict=False, max_length=65_536)]


class Settle(Wire):
    """Between the ranks of a replica: how far the one that asks, or answers, is with a flip that nobody leads."""

    pact: Push
    stage: Annotated[Stage, Field(strict=False)]


class Return(Wire):
    """To a target: serve a version again that you still hold."""

    version: Version
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a target knows of a version that it holds: the digests of its chunks."""

    version: int
    image: str
    digests: NDArray[np.uint64]

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return pack(_ManifestHead(version=self.version, image=self.image, chunks=len(self.digests)), [u8(self.digests)])

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Parse what a target sent.

        Raises:
            IntegrityError: it is malformed.
        """
        head, tail = unpack(_ManifestHead, data)
        digests = tail.digests(head.chunks)
        tail.end()
        return Manifest(head.version, head.image, digests)


class _IncomingHead(Wire):
    plan: Digest
    image: Image
    chunk_nbytes: ChunkNbytes
    layout: Count
    ranges: Count


class _PullHead(Wire):
    push: Push
    version: Version
    plan: Digest
    seconds: Seconds
    flip_seconds: Seconds
    is_relay: bool
    origins: Annotated[
        tuple[tuple[Part, Annotated[tuple[Holder, ...], Field(strict=False, max_length=65_536)]], ...],
        Field(strict=False, max_length=65_536),
    ]
    base: Count
    blobs: Annotated[tuple[Blob, ...], Field(strict=False, max_length=65_536)]
    chunks: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]
    blob_chunks: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]
    relays_delta: bool


class _ManifestHead(Wire):
    version: Version
    image: Digest
    chunks: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]


__all__ = [
    "Blob", "BlobAt", "Describe", "Held", "Hold", "Incoming", "Manifest", "Pull", "Return",
    "Settle", "Step", "Subscribed",
]  # fmt: skip

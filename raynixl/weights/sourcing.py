"""Sourcing: the messages between whoever pushes and a source; what is long in them is binary."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raynixl.errors import IntegrityError
from raynixl.record import RegionRecord
from raynixl.weights.protocol import LIMIT, Digest, Holder, M, Push, Seconds, Version, Wire

MAX_IMAGES = 65_536
MAX_CHUNKS = 1 << 22
_MAX_ARENAS = 65_536
_TAIL = struct.Struct("<4sI")  # magic, bytes of the head
_MAGIC = b"RXS1"

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
ChunkNbytes = Annotated[int, Field(ge=4096, le=1 << 40)]
Image = Annotated[int, Field(ge=0, lt=MAX_IMAGES)]
Arenas = Annotated[tuple[Annotated[int, Field(gt=0, lt=1 << 62)], ...], Field(strict=False, max_length=_MAX_ARENAS)]


class Described(Wire):
    """From a source: which rank of which table it is, and the last version that some target took."""

    table: Digest
    rank: Annotated[int, Field(ge=0, lt=1 << 20)]
    version: Count
    nbytes: Count
    chunk_nbytes: ChunkNbytes


class Freeze(Wire):
    """To a source: copy your weights out as this version and keep them for this push.

    `plan` names what was sent as `Outgoing`; `base` is a version that targets hold, or 0 if no delta is wanted.
    """

    push: Push
    version: Version
    seconds: Seconds
    plan: Digest
    base: Count = 0


class Release(Wire):
    """To a source: it need not keep this push's copy any more; `committed` says that some target took the version.

    It may come twice: early, as soon as others hold all chunks, and when the push is over.
    """

    push: Push
    committed: bool


@dataclass(frozen=True, slots=True)
class ImageRows:
    """What one source serves to one image: ranges as bytes, and the sizes of the image's arenas.

    `place` is the number of the arena that this source's part fills in a delta image.
    """

    image: int
    place: int
    arenas: tuple[int, ...]
    ranges: bytes


@dataclass(frozen=True, slots=True)
class Outgoing:
    """To a source, once for each plan: what it serves to every image, and how images are cut into chunks."""

    plan: str
    chunk_nbytes: int
    rows: tuple[ImageRows, ...]

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        heads = tuple(
            _RowsHead(image=row.image, place=row.place, arenas=row.arenas, nbytes=len(row.ranges)) for row in self.rows
        )
        head = _OutgoingHead(plan=self.plan, chunk_nbytes=self.chunk_nbytes, rows=heads)
        return pack(head, [row.ranges for row in self.rows])

    @staticmethod
    def from_bytes(data: bytes) -> Outgoing:
        """Parse what somebody who pushes sent.

        Raises:
            IntegrityError: it is malformed.
        """
        head, tail = unpack(_OutgoingHead, data)
        rows = tuple(ImageRows(row.image, row.place, row.arenas, bytes(tail.take(row.nbytes))) for row in head.rows)
        tail.end()
        if len({row.image for row in rows}) != len(rows):
            raise malformed("it names an image twice")
        return Outgoing(head.plan, head.chunk_nbytes, rows)


@dataclass(frozen=True, slots=True)
class Partial:
    """A source's share of an image's digests: the chunks that it gives bytes to, and what it adds to each (n, 2)."""

    chunks: NDArray[np.uint32]
    digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class DeltaOffer:
    """What changed in a source's share of an image since a base version: a blob, and the digests of its chunks."""

    base: int
    offset: int
    nbytes: int
    digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Frozen:
    """From a source: the version is ready to be pulled, and this is its share of the digests of every image."""

    version: int
    plan: str
    shards: str
    holder: Holder
    nbytes: int
    copy_out_seconds: float
    digest_seconds: float
    partials: Mapping[int, Partial]
    deltas: Mapping[int, DeltaOffer] = field(default_factory=dict)
    delta_region: RegionRecord | None = None

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        partials = tuple(_PartialHead(image=image, count=len(one.chunks)) for image, one in self.partials.items())
        deltas = tuple(
            _DeltaHead(image=image, base=one.base, offset=one.offset, nbytes=one.nbytes, count=len(one.digests))
            for image, one in self.deltas.items()
        )
        head = _FrozenHead(
            version=self.version, plan=self.plan, shards=self.shards, holder=self.holder, nbytes=self.nbytes,
            copy_out_seconds=self.copy_out_seconds, digest_seconds=self.digest_seconds, partials=partials,
            deltas=deltas, delta_region=self.delta_region,
        )  # fmt: skip
        tail = [part for one in self.partials.values() for part in (_u4(one.chunks), u8(one.digests))]
        return pack(head, [*tail, *(u8(one.digests) for one in self.deltas.values())])

    @staticmethod
    def from_bytes(data: bytes) -> Frozen:
        """Parse a source's answer.

        Raises:
            IntegrityError: it is malformed.
        """
        head, tail = unpack(_FrozenHead, data)
        partials = {
            row.image: Partial(tail.numbers("<u4", row.count), tail.digests(row.count)) for row in head.partials
        }
        deltas = {
            row.image: DeltaOffer(row.base, row.offset, row.nbytes, tail.digests(row.count)) for row in head.deltas
        }
        tail.end()
        if len(partials) != len(head.partials) or len(deltas) != len(head.deltas):
            raise malformed("it names an image twice")
        if any(np.any(one.chunks[1:] <= one.chunks[:-1]) for one in partials.values()):
            raise malformed("its chunks are not in order")
        return Frozen(
            head.version, head.plan, head.shards, head.holder, head.nbytes, head.copy_out_seconds, head.digest_seconds,
            partials, deltas, head.delta_region,
        )  # fmt: skip


class _RowsHead(Wire):
    image: Image
    place: Annotated[int, Field(ge=0, lt=1 << 20)]
    arenas: Arenas
    nbytes: Count


class _OutgoingHead(Wire):
    plan: Digest
    chunk_nbytes: ChunkNbytes
    rows: Annotated[tuple[_RowsHead, ...], Field(strict=False, max_length=MAX_IMAGES)]


class _PartialHead(Wire):
    image: Image
    count: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]


class _DeltaHead(Wire):
    image: Image
    base: Version
    offset: Count
    nbytes: Count
    count: Annotated[int, Field(ge=0, le=MAX_CHUNKS)]


class _FrozenHead(Wire):
    version: Version
    plan: Digest
    shards: Annotated[str, Field(pattern=r"^[0-9a-f]{32}:[0-9]{1,7}$")]
    holder: Holder
    nbytes: Count
    copy_out_seconds: Seconds
    digest_seconds: Seconds
    partials: Annotated[tuple[_PartialHead, ...], Field(strict=False, max_length=MAX_IMAGES)]
    deltas: Annotated[tuple[_DeltaHead, ...], Field(strict=False, max_length=MAX_IMAGES)]
    delta_region: RegionRecord | None


class Tail:
    """The binary end of a message, taken piece by piece; no piece is longer than what came."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._data):
            raise malformed("it is truncated")
        piece, self._data = self._data[:nbytes], self._data[nbytes:]
        return piece

    def numbers(self, dtype: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def digests(self, count: int) -> NDArray[np.uint64]:
        return self.numbers("<u8", 2 * count).reshape(count, 2)

    def end(self) -> None:
        if len(self._data):
            raise malformed("it has bytes to spare")


def pack(head: Wire, tail: list[bytes]) -> bytes:
    raw = head.to_bytes()
    return b"".join((_TAIL.pack(_MAGIC, len(raw)), raw, *tail))


def unpack(kind: type[M], data: bytes) -> tuple[M, Tail]:
    if not _TAIL.size <= len(data) <= LIMIT:
        raise malformed(f"it has {len(data)} bytes")
    magic, nbytes = _TAIL.unpack_from(data)
    if magic != _MAGIC or nbytes > len(data) - _TAIL.size:
        raise malformed("it is not of this version, or truncated")
    end = _TAIL.size + nbytes
    return kind.from_bytes(data[_TAIL.size : end]), Tail(memoryview(data)[end:])


def _u4(numbers: NDArray[np.uint32]) -> bytes:
    return numbers.astype("<u4", copy=False).tobytes()


def u8(numbers: NDArray[np.uint64]) -> bytes:
    return numbers.astype("<u8", copy=False).tobytes()


def malformed(why: str) -> IntegrityError:
    return IntegrityError(f"a message of weight sync is malformed: {why}", hint="run one version of raynixl everywhere")

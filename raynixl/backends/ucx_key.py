"""Sealed keys and addresses: UCX's own, wrapped so that a damaged, foreign or outdated one is found out here.

UCX takes whatever bytes it is given as a key or as the address of a worker, and aborts or crashes on many. The wrapping
says whose they are and, of a key, where its region lies and how long it is; it ends in a checksum over all of that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from raynixl.errors import IntegrityError

VERSION = 1
MAX_RAILS = 64
MAX_KEY_NBYTES = 4096
_KEYS, _WORKERS = b"RXKY", b"RXWA"
_HEAD = struct.Struct("<4sHHI16sQQQ")  # magic, version, parts, nbytes in all, incarnation, region, address, length
_LENGTH = struct.Struct("<H")
_DIGEST_NBYTES = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """What a peer needs to reach one region: its address at the owner, its length, and a key for each of its rails."""

    incarnation: str
    region: int
    address: int
    nbytes: int
    packed: tuple[bytes, ...]

    def seal(self) -> bytes:
        """Return them as bytes for a peer."""
        return _seal(_KEYS, self.incarnation, (self.region, self.address, self.nbytes), self.packed)

    @staticmethod
    def unseal(data: bytes, *, incarnation: str, region: int, nbytes: int) -> Keys:
        """Open sealed keys of the region of that number, owner and length.

        Raises:
            IntegrityError: they are damaged, malformed, or of something else.
        """
        owner, (number, address, length), packed = _open(_KEYS, data, "key")
        if (owner, number, length) != (incarnation, region, nbytes):
            raise IntegrityError(f"a key of region {number} of {length} bytes came for region {region} of {nbytes}")
        if address + length > 1 << 64:
            raise IntegrityError(f"a key of region {number} says that it ends beyond all memory")
        return Keys(incarnation, region, address, nbytes, packed)


def seal_workers(incarnation: str, addresses: Sequence[bytes]) -> bytes:
    """Return the addresses of an agent's workers, one for each of its rails, as bytes for a peer."""
    return _seal(_WORKERS, incarnation, (0, 0, 0), addresses)


def unseal_workers(data: bytes, *, incarnation: str) -> tuple[bytes, ...]:
    """Open the sealed addresses of the workers of that agent.

    Raises:
        IntegrityError: they are damaged, malformed, or of another.
    """
    owner, _, workers = _open(_WORKERS, data, "worker address")
    if owner != incarnation:
        raise IntegrityError("a worker address of another incarnation came")
    return workers


def _seal(magic: bytes, incarnation: str, numbers: tuple[int, int, int], parts: Sequence[bytes]) -> bytes:
    body = b"".join(_LENGTH.pack(len(part)) + part for part in parts)
    nbytes = _HEAD.size + len(body) + _DIGEST_NBYTES
    head = _HEAD.pack(magic, VERSION, len(parts), nbytes, bytes.fromhex(incarnation), *numbers)
    return head + body + xxhash.xxh3_128_digest(head + body)


def _open(wanted: bytes, data: bytes, what: str) -> tuple[str, tuple[int, int, int], tuple[bytes, ...]]:
    """Return the incarnation, the three numbers and the parts of what was sealed."""
    if len(data) < _HEAD.size + _DIGEST_NBYTES:
        raise IntegrityError(f"a {what} of {len(data)} bytes is truncated")
    magic, version, count, total, owner, *numbers = _HEAD.unpack_from(data)
    if magic != wanted or version != VERSION:
        raise IntegrityError(f"a {what} of version {version} is not understood", hint="run one version everywhere")
    if total != len(data) or xxhash.xxh3_128_digest(data[:-_DIGEST_NBYTES]) != data[-_DIGEST_NBYTES:]:
        raise IntegrityError(f"a {what} of {len(data)} bytes was damaged on its way")
    first, second, third = numbers
    return owner.hex(), (first, second, third), _split(data, count, what)


def _split(data: bytes, count: int, what: str) -> tuple[bytes, ...]:
    parts, at, end = [], _HEAD.size, len(data) - _DIGEST_NBYTES
    for _ in range(count):
        if at + _LENGTH.size > end:
            raise IntegrityError(f"a {what} lacks one of its rails")
        (nbytes,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        parts.append(data[at : at + nbytes])
        at += nbytes
    if at != end or not 0 < count <= MAX_RAILS or any(not part for part in parts):
        raise IntegrityError(f"a {what} of {count} rails is malformed")
    return tuple(parts)

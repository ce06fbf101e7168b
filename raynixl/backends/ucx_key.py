"""Sealed keys: UCX's keys of one region, wrapped so that a damaged, foreign or outdated one is found out here.

UCX takes whatever bytes it is given as a key and may crash on them. The wrapping says whose region it is, where it
lies and how long it is, and ends in a checksum over all of that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from raynixl.errors import IntegrityError

VERSION = 1
MAX_RAILS = 64
MAX_KEY_NBYTES = 4096
_MAGIC = b"RXKY"
_HEAD = struct.Struct("<4sHHI16sQQQ")  # magic, version, keys, nbytes in all, incarnation, region, address, length
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
        body = b"".join(_LENGTH.pack(len(key)) + key for key in self.packed)
        head = _HEAD.pack(
            _MAGIC, VERSION, len(self.packed), _HEAD.size + len(body) + _DIGEST_NBYTES, bytes.fromhex(self.incarnation),
            self.region, self.address, self.nbytes,
        )  # fmt: skip
        return head + body + xxhash.xxh3_128_digest(head + body)

    @staticmethod
    def unseal(data: bytes, *, incarnation: str, region: int, nbytes: int) -> Keys:
        """Open sealed keys of the region of that number, owner and length.

        Raises:
            IntegrityError: they are damaged, malformed, or of something else.
        """
        if len(data) < _HEAD.size + _DIGEST_NBYTES:
            raise IntegrityError(f"a key of {len(data)} bytes is truncated")
        magic, version, count, total, owner, number, address, length = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != VERSION:
            raise IntegrityError(f"a key of version {version} is not understood", hint="run one version everywhere")
        if total != len(data) or xxhash.xxh3_128_digest(data[:-_DIGEST_NBYTES]) != data[-_DIGEST_NBYTES:]:
            raise IntegrityError(f"a key of {len(data)} bytes was damaged on its way")
        if (owner.hex(), number, length) != (incarnation, region, nbytes):
            raise IntegrityError(f"a key of region {number} of {length} bytes came for region {region} of {nbytes}")
        if address + length > 1 << 64:
            raise IntegrityError(f"a key of region {number} says that it ends beyond all memory")
        return Keys(incarnation, region, address, nbytes, _split(data, count))


def _split(data: bytes, count: int) -> tuple[bytes, ...]:
    keys, at, end = [], _HEAD.size, len(data) - _DIGEST_NBYTES
    for _ in range(count):
        if at + _LENGTH.size > end:
            raise IntegrityError("a key lacks one of its rails")
        (nbytes,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        keys.append(data[at : at + nbytes])
        at += nbytes
    if at != end or not 0 < count <= MAX_RAILS or any(not key for key in keys):
        raise IntegrityError(f"a key of {count} rails is malformed")
    return tuple(keys)

"""Columns: the binary form of texts and integer arrays, with every count checked before memory is taken for it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from raynixl.errors import IntegrityError
from raynixl.weights.pieces import Ints

MAX_NBYTES = 128 << 20
MAX_AXES = 4
_VERSION = 1
_HEADER = struct.Struct("<4sHHH")  # magic, version, lists of texts, arrays
_ARRAY = struct.Struct("<BB4I")  # bytes of an integer, axes, size of each
_WIDTHS = (1, 2, 4, 8)


def pack_columns(magic: bytes, texts: Sequence[Sequence[str]], arrays: Sequence[Ints]) -> bytes:
    """Return texts and arrays as bytes; integers take as few as the largest of their array needs."""
    parts = [_HEADER.pack(magic, _VERSION, len(texts), len(arrays))]
    for text in texts:
        encoded = [one.encode(errors="surrogatepass") for one in text]
        parts += _pack_array(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        parts += encoded
    for array in arrays:
        parts += _pack_array(array)
    return b"".join(parts)


def _pack_array(array: Ints) -> list[bytes]:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    width = next(width for width in _WIDTHS if -(1 << 8 * width - 1) <= low and high < 1 << 8 * width - 1)
    sizes = (*array.shape, *(1,) * (MAX_AXES - array.ndim))
    return [_ARRAY.pack(width, array.ndim, *sizes), array.astype(f"<i{width}").tobytes()]


class Columns:
    """Reads what `pack_columns` wrote, in order.

    Raises:
        IntegrityError: truncated, too large, or of another kind or version; from all of its methods.
    """

    def __init__(self, data: bytes, magic: bytes, what: str, *, limit: int = MAX_NBYTES) -> None:
        self._data = data
        self._what = what
        self._at = _HEADER.size
        if not _HEADER.size <= len(data) <= limit:
            raise self.malformed(f"it has {len(data)} bytes")
        head, version, texts, arrays = _HEADER.unpack_from(data)
        if head != magic or version != _VERSION:
            raise self.malformed(f"it is of version {version}, not {_VERSION}")
        self._left = [texts, arrays]

    def malformed(self, why: str) -> IntegrityError:
        """Return the error of bytes that make no sense."""
        return IntegrityError(f"{self._what} is malformed: {why}", hint="it is truncated or not from this raynixl")

    def texts(self) -> list[str]:
        """Return the next list of texts."""
        self._take_one(0)
        lengths = self._array()
        if lengths.ndim != 1 or (lengths.size and int(lengths.min()) < 0):
            raise self.malformed("a text has an impossible length")
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        blob = self._bytes(total)
        try:
            bounds = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
            return [blob[first:last].decode(errors="surrogatepass") for first, last in bounds]
        except UnicodeDecodeError as exc:
            raise self.malformed(str(exc)) from exc

    def array(self, *shape: int | None, low: int = 0, high: int = 1 << 62) -> Ints:
        """Return the next array; each axis has the given size, or any for None, and values in [low, high)."""
        self._take_one(1)
        found = self._array()
        if found.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, found.shape, strict=True)):
            raise self.malformed(f"an array has shape {list(found.shape)}")
        if found.size and not (low <= int(found.min()) and int(found.max()) < high):
            raise self.malformed("a number is out of its range")
        return found

    def end(self) -> None:
        """Refuse bytes to spare."""
        if self._at != len(self._data) or any(self._left):
            raise self.malformed("it has bytes to spare")

    def _take_one(self, kind: int) -> None:
        if self._left[kind] < 1:
            raise self.malformed("it lacks a part")
        self._left[kind] -= 1

    def _array(self) -> Ints:
        width, axes, *sizes = _ARRAY.unpack(self._bytes(_ARRAY.size))
        if width not in _WIDTHS or not 1 <= axes <= MAX_AXES:
            raise self.malformed(f"an array has {axes} axes of integers of {width} bytes")
        count = int(np.prod(np.array(sizes[:axes], object)))
        raw = self._bytes(count * width)
        return np.frombuffer(raw, f"<i{width}").astype(np.int64).reshape(sizes[:axes])

    def _bytes(self, nbytes: int) -> bytes:
        if nbytes > len(self._data) - self._at:
            raise self.malformed("it is truncated")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

"""Wire: the binary form of a layout, with every count checked before memory is taken for it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import IntegrityError

Row = tuple[str, str, tuple[int, ...], int, int, int, tuple[int, ...]]
"""Name, dtype, shape, arena, offset, nbytes, sharing."""

_MAGIC = b"RXWL"
_VERSION = 1
_HEADER = struct.Struct("<4sHHIIQQ")  # magic, version, dtypes, arenas, entries, integers, bytes of names
MAX_ENTRIES = 1_000_000
MAX_ARENAS = 65_536
MAX_DIMS = 64
MAX_NAME_NBYTES = 4096
MAX_LAYOUT_NBYTES = 256 << 20
_FIXED = 7  # integers before an entry's shape: name length, dtype, dims, sharing length, arena, offset, nbytes


def pack_layout(arenas: Sequence[int], rows: Sequence[Row]) -> bytes:
    """Return arenas and rows as bytes."""
    dtypes = sorted({row[1] for row in rows})
    numbers = {dtype: number for number, dtype in enumerate(dtypes)}
    names, integers = [], list(arenas)
    for name, dtype, shape, arena, offset, nbytes, sharing in rows:
        text = name.encode(errors="surrogatepass")
        names.append(text)
        integers += (len(text), numbers[dtype], len(shape), len(sharing), arena, offset, nbytes, *shape, *sharing)
    blob = b"".join(names)
    kinds = "\n".join(dtypes).encode()
    header = _HEADER.pack(_MAGIC, _VERSION, len(kinds), len(arenas), len(rows), len(integers), len(blob))
    return b"".join((header, np.array(integers, "<i8").tobytes(), kinds, blob))


def unpack_layout(data: bytes) -> tuple[tuple[int, ...], list[Row]]:
    """Return arenas and rows; checks form, not meaning.

    Raises:
        IntegrityError: truncated, too large, or of another version.
    """
    if len(data) > MAX_LAYOUT_NBYTES or len(data) < _HEADER.size:
        raise _malformed(f"it has {len(data)} bytes")
    magic, version, kinds, arenas, entries, integers, names = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise _malformed(f"it has version {version}, not {_VERSION}")
    if entries > MAX_ENTRIES or arenas > MAX_ARENAS or integers < arenas + _FIXED * entries:
        raise _malformed(f"it claims {entries} tensors in {arenas} arenas")
    if len(data) != _HEADER.size + integers * 8 + kinds + names:
        raise _malformed(f"it has {len(data)} bytes")
    numbers = np.frombuffer(data, "<i8", integers, _HEADER.size)
    if numbers.size and int(numbers.min()) < 0:
        raise _malformed("it holds negative numbers")
    text = _HEADER.size + integers * 8
    try:
        dtypes = data[text : text + kinds].decode().split("\n")
        rows = _unpack_rows(numbers[arenas:], dtypes, data[text + kinds :], entries)
    except (UnicodeDecodeError, IndexError) as exc:
        raise _malformed(str(exc)) from exc
    return tuple(numbers[:arenas].tolist()), rows


def _unpack_rows(numbers: NDArray[np.int64], dtypes: list[str], names: bytes, entries: int) -> list[Row]:
    values: list[int] = numbers.tolist()
    rows: list[Row] = []
    at = text = 0
    for _ in range(entries):
        length, dtype, dims, shared, arena, offset, nbytes = values[at : at + _FIXED]
        if length > MAX_NAME_NBYTES or dims > MAX_DIMS or shared > MAX_DIMS + 2:
            raise _malformed(f"a tensor has {dims} dimensions and a name of {length} bytes")
        at += _FIXED
        end = at + dims + shared
        if end + _FIXED * (entries - len(rows) - 1) > len(values) or text + length > len(names):
            raise _malformed("it is truncated")
        shape, sharing = tuple(values[at : at + dims]), tuple(values[at + dims : end])
        name = names[text : text + length].decode(errors="surrogatepass")
        rows.append((name, dtypes[dtype], shape, arena, offset, nbytes, sharing))
        at, text = end, text + length
    if at != len(values) or text != len(names):
        raise _malformed("it has bytes to spare")
    return rows


def _malformed(why: str) -> IntegrityError:
    return IntegrityError(f"a layout is malformed: {why}", hint="it is truncated or not from this raynixl")

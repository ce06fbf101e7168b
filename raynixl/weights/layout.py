"""Layout: where every tensor of a model lies in the arenas that carry it, as a value that travels once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights.sharing import TensorSpec, find_sharing
from raynixl.weights.wire import pack_layout, unpack_layout

ALIGNMENT = 64
ARENA_NBYTES = 4 << 30
"""Tensors are spread over arenas of at most this size; one larger tensor gets an arena of its own."""
CHUNK_NBYTES = 8 << 20
DEVICE_CHUNK_NBYTES = 64 << 20
"""On a GPU, where a chunk of the other size is moved in less time than it takes to begin to."""

_ITEMSIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}  # fmt: skip


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a dtype, by torch's name for it.

    Raises:
        ConfigError: the dtype cannot be carried.
    """
    size = _ITEMSIZES.get(dtype)
    if size is None:
        raise ConfigError(f"dtype {dtype!r:.60} cannot be carried", hint=f"it must be one of {', '.join(_ITEMSIZES)}")
    return size


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: C-contiguous at `offset` of arena number `arena`. Tied tensors have the same place.

    `sharing` is empty, or (cluster, byte offset in it, byte strides...) of a tensor whose memory partly overlaps
    that of others, such as a transposed view: those travel apart, and their ties at the target are kept.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arena: int
    offset: int
    nbytes: int
    sharing: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, int]:
        """Where it lies; tied tensors are those in one place. Empty tensors lie nowhere."""
        return (self.arena, self.offset) if self.nbytes else (-1, -1)


@dataclass(frozen=True)
class Layout:
    """All tensors of a model, in order, and the sizes of the arenas that hold them. Equal layouts have one digest."""

    entries: tuple[Entry, ...]
    arenas: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.entries)} tensors, {self.nbytes / 1e6:,.1f} MB in {len(self.arenas)} arenas"

    @property
    def nbytes(self) -> int:
        """Bytes that one version moves, padding included."""
        return sum(self.arenas)

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        """The entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def digest(self) -> str:
        """What names this layout once it has travelled."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def chunks(self, chunk_nbytes: int) -> NDArray[np.int64]:
        """Return the (N, 3) table of chunks: arena, offset, length. No chunk spans two arenas."""
        rows = [
            (arena, offset, min(chunk_nbytes, nbytes - offset))
            for arena, nbytes in enumerate(self.arenas)
            for offset in range(0, nbytes, chunk_nbytes)
        ]
        return np.array(rows, np.int64).reshape(-1, 3)

    def to_bytes(self) -> bytes:
        """Return the layout as bytes for a peer."""
        return pack_layout(self.arenas, [_row(entry) for entry in self.entries])

    @staticmethod
    def from_bytes(data: bytes) -> Layout:
        """Parse a layout that a peer sent.

        Raises:
            IntegrityError: truncated, too large, of another version, or tensors outside their arenas.
        """
        arenas, rows = unpack_layout(data)
        try:
            layout = Layout(tuple(Entry(*row) for row in rows), arenas)
            _check(layout)
        except ConfigError as exc:
            raise IntegrityError(f"a layout is malformed: {exc.message}", hint="it is not from raynixl") from exc
        return layout


def build_layout(specs: Iterable[TensorSpec], *, arena_nbytes: int = ARENA_NBYTES) -> Layout:
    """Lay tensors out in order, each once: what shares memory exactly shares its place.

    Raises:
        ConfigError: a name is used twice, or a dtype cannot be carried.
    """
    specs = list(specs)
    sharing = find_sharing(specs, itemsize)
    packer = _Packer(arena_nbytes)
    placed: dict[int, tuple[int, int]] = {}
    entries = []
    for index, spec in enumerate(specs):
        nbytes = math.prod(spec.shape) * itemsize(spec.dtype)
        first = sharing.same_as[index]
        if first not in placed:
            placed[first] = packer.place(nbytes)
        arena, offset = placed[first]
        overlap = sharing.overlap.get(index, ())
        entries.append(Entry(spec.name, spec.dtype, tuple(spec.shape), arena, offset, nbytes, overlap))
    layout = Layout(tuple(entries), tuple(packer.sizes))
    if len(layout.by_name) != len(entries):
        raise ConfigError("two tensors have one name", hint="give each tensor its own name")
    return layout


class _Packer:
    """Gives places in arenas, one after the other."""

    def __init__(self, arena_nbytes: int) -> None:
        self.sizes: list[int] = []
        self._limit = arena_nbytes

    def place(self, nbytes: int) -> tuple[int, int]:
        if nbytes == 0:
            return 0, 0
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if not self.sizes or self.sizes[-1] + room > self._limit:
            self.sizes.append(0)
        offset = self.sizes[-1]
        self.sizes[-1] += room
        return len(self.sizes) - 1, offset


def _row(entry: Entry) -> tuple[str, str, tuple[int, ...], int, int, int, tuple[int, ...]]:
    return (entry.name, entry.dtype, entry.shape, entry.arena, entry.offset, entry.nbytes, entry.sharing)


def _check(layout: Layout) -> None:
    """Refuse what cannot have come from `build_layout`; a peer's word is not trusted."""
    if len(layout.by_name) != len(layout.entries):
        raise ConfigError("two tensors have one name")
    if any(not 0 < size < 1 << 62 for size in layout.arenas):
        raise ConfigError("an arena has an impossible size")
    ends: dict[tuple[int, int], int] = {}
    for entry in layout.entries:
        if entry.nbytes != math.prod(entry.shape) * itemsize(entry.dtype):
            raise ConfigError(f"tensor {entry.name!r:.80} has {entry.nbytes} bytes")
        if entry.nbytes == 0:
            continue
        outside = entry.arena >= len(layout.arenas) or entry.offset + entry.nbytes > layout.arenas[entry.arena]
        if outside or entry.offset % ALIGNMENT or ends.setdefault(entry.place, entry.nbytes) != entry.nbytes:
            raise ConfigError(f"tensor {entry.name!r:.80} lies outside its arena, or on another")
    _check_disjoint(ends)


def _check_disjoint(ends: dict[tuple[int, int], int]) -> None:
    places = sorted(ends)
    for place, following in itertools.pairwise(places):
        if place[0] == following[0] and place[1] + ends[place] > following[1]:
            raise ConfigError(f"tensors overlap in arena {place[0]} at {following[1]}")


def shape_text(dtype: str, shape: Sequence[int]) -> str:
    """Return a tensor's dtype and shape as people write them."""
    return f"{dtype} {list(shape)}"

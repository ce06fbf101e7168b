"""Converted shards: what a rank holds once its tensors are cast or quantised; pure, as shards are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError
from raynixl.weights.conversion import BLOCK, FP8, SCALE_SUFFIX, Conversion, scale_shape
from raynixl.weights.layout import Entry, Layout, build_layout, itemsize
from raynixl.weights.pieces import Ints, Pieces, TensorInfo
from raynixl.weights.shards import Shards, from_pieces
from raynixl.weights.sharing import TensorSpec
from raynixl.weights.table import Table


def converted(shards: Shards, conversion: Conversion) -> Shards:
    """Return the shards of what the tensors become.

    Raises:
        ConfigError: tensors that share a local tensor become different, or a shard is not made of whole blocks.
    """
    if conversion.is_nothing:
        return shards
    table = shards.table
    is_fp8 = np.array([conversion.is_quantised(info.name, info.dtype, info.shape) for info in table.tensors], np.bool_)
    infos = tuple(
        replace(info, dtype=FP8 if quantised else conversion.dtype(info.name, info.dtype))
        for info, quantised in zip(table.tensors, is_fp8.tolist(), strict=True)
    )
    cast = Shards(_retyped(table, infos), shards.rank)
    return _with_scales(cast, is_fp8) if is_fp8.any() else cast


def _retyped(table: Table, infos: Sequence[TensorInfo]) -> Table:
    """Return a table of the same pieces with other dtypes."""
    found: dict[int, TensorInfo] = {}
    for row in table.entry_of:
        for entry, info in zip(row.tolist(), infos, strict=True):
            first = found.setdefault(int(table.locals.tied[entry]) if entry >= 0 else -1, info)
            if entry >= 0 and first.dtype != info.dtype:
                raise ConfigError(
                    f"{first.name!r:.200} and {info.name!r:.200} share memory and become {first.dtype}, {info.dtype}",
                    hint="convert both in the same way",
                )
    old = table.locals.dtypes
    tied = table.locals.tied.tolist()
    dtypes = tuple(found[tied[entry]].dtype if tied[entry] in found else old[entry] for entry in range(len(old)))
    sharing = {
        entry: _scaled(numbers, itemsize(old[entry]), itemsize(dtypes[entry]))
        for entry, numbers in table.locals.sharing.items()
    }
    return replace(table, tensors=tuple(infos), locals=table.locals._replace(dtypes=dtypes, sharing=sharing))


def _scaled(sharing: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    """Return how a tensor overlaps others, whose bytes are as many times as large as its own."""
    return (sharing[0], *(number // old * new for number in sharing[1:]))


def _with_scales(shards: Shards, is_fp8: NDArray[np.bool_]) -> Shards:
    """Return shards that hold the scales of what is quantised too, under names of their own."""
    pieces, layout = shards.pieces, shards.layout
    own = pieces[is_fp8[pieces.tensor]]
    quantised = np.unique(own.entry).tolist()
    infos = list(shards.tensors)
    number_of = np.full(len(infos), -1, np.int64)
    for number in np.flatnonzero(is_fp8).tolist():
        number_of[number] = len(infos)
        infos.append(TensorInfo(infos[number].name + SCALE_SUFFIX, "float32", scale_shape(infos[number].shape)))
    entry_of = np.full(len(layout.entries), -1, np.int64)
    entry_of[quantised] = len(layout.entries) + np.arange(len(quantised))
    scales = _scale_pieces(shards, own, (number_of, entry_of))
    both = [np.concatenate(pair) for pair in zip(_columns(pieces), _columns(scales), strict=True)]
    return from_pieces(infos, _scale_layout(layout, quantised), Pieces(*both))


def _columns(pieces: Pieces) -> tuple[Ints, ...]:
    return pieces.tensor, pieces.start, pieces.size, pieces.entry, pieces.offset, pieces.stride


def _scale_pieces(shards: Shards, pieces: Pieces, numbers: tuple[Ints, Ints]) -> Pieces:
    """Return the boxes of scales that belong to boxes of quantised tensors."""
    number_of, entry_of = numbers
    entries = shards.layout.entries
    start, size, offset, stride = (
        array.copy() for array in (pieces.start, pieces.size, pieces.offset, pieces.stride)
    )  # fmt: skip
    for row in range(len(pieces)):
        entry, info = entries[int(pieces.entry[row])], shards.tensors[int(pieces.tensor[row])]
        dims = len(info.shape)
        if not _is_whole(info, entry, (start[row], size[row], int(offset[row]), stride[row])):
            raise ConfigError(
                f"{info.name!r:.200} is sharded inside blocks of {BLOCK} x {BLOCK} and cannot be quantised here",
                hint="shard it at multiples of the block, or leave it out by Fp8(select=...)",
            )
        high, wide = entry.shape[-2:]
        down, across = scale_shape((high, wide))
        matrix, place = divmod(int(offset[row]), high * wide)
        offset[row] = matrix * down * across + place // wide // BLOCK * across + place % wide // BLOCK
        stride[row, : dims - 2] = stride[row, : dims - 2] // (high * wide) * down * across
        stride[row, dims - 2 : dims] = across, 1
        start[row, dims - 2 : dims] //= BLOCK
        size[row, dims - 2 : dims] = -(-size[row, dims - 2 : dims] // BLOCK)
    return Pieces(number_of[pieces.tensor], start, size, entry_of[pieces.entry], offset, stride)


def _is_whole(info: TensorInfo, entry: Entry, piece: tuple[Ints, Ints, int, Ints]) -> bool:
    """Whether a box begins and ends on blocks, in the tensor and in the local one, whose last two dimensions it has."""
    start, size, offset, stride = piece
    dims = len(info.shape)
    if len(entry.shape) < 2:
        return False
    high, wide = entry.shape[-2:]
    place = (offset % (high * wide) // wide, offset % wide)
    for dim, whole, local, at, step in zip(
        (dims - 2, dims - 1), info.shape[-2:], (high, wide), place, (wide, 1), strict=True
    ):
        end = int(start[dim] + size[dim])
        local_end = at + int(size[dim])
        is_aligned = start[dim] % BLOCK == 0 and at % BLOCK == 0 and (end % BLOCK == 0 or end == whole)
        if not is_aligned or (local_end % BLOCK and local_end != local) or (size[dim] > 1 and stride[dim] != step):
            return False
    return all(size[dim] == 1 or stride[dim] % (high * wide) == 0 for dim in range(dims - 2))


def _scale_layout(layout: Layout, quantised: Sequence[int]) -> Layout:
    """Return a layout with an entry for the scales of each quantised one after all others; what is tied stays tied."""
    places: dict[tuple[int, int], int] = {}
    specs = [
        TensorSpec(entry.name, entry.dtype, entry.shape, address=_address(places, entry)) for entry in layout.entries
    ]
    for number in quantised:
        entry = layout.entries[number]
        name, shape = entry.name + SCALE_SUFFIX, scale_shape(entry.shape)
        specs.append(TensorSpec(name, "float32", shape, device="scales", address=_address(places, entry)))
    built = build_layout(specs)
    kept = [entry.sharing for entry in layout.entries] + [()] * len(quantised)
    entries = (replace(entry, sharing=sharing) for entry, sharing in zip(built.entries, kept, strict=True))
    return Layout(tuple(entries), built.arenas)


def _address(places: dict[tuple[int, int], int], entry: Entry) -> int:
    """Return a made-up address, the same for tied tensors and far from all others; 0 for what is empty."""
    return (places.setdefault(entry.place, len(places)) + 1) << 50 if entry.nbytes else 0

"""A second opinion on sharding: local tensors by plain slicing, ranges carried out by plain copying."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from raynixl.weights.declare import Concat, declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Flat, Owner, Replicate, Shard
from raynixl.weights.shards import Shards

DTYPES = {"uint8": np.uint8, "bfloat16": np.uint16, "float32": np.uint32, "int64": np.uint64}


@dataclass
class Side:
    """How one side holds a model, in the arguments of `declare`."""

    infos: list[TensorInfo]
    mesh: object
    placements: dict[str, tuple]
    fused: dict = field(default_factory=dict)
    renamed: dict = field(default_factory=dict)
    padded: dict = field(default_factory=dict)
    tied: dict = field(default_factory=dict)

    def shards(self) -> list[Shards]:
        """Those of all ranks."""
        first = declare(
            self.infos, self.mesh, self.placements, (0,) * len(self.mesh.dims),
            fused=self.fused, renamed=self.renamed, padded=self.padded, tied=self.tied,
        )  # fmt: skip
        return [Shards(first.table, rank) for rank in range(self.mesh.ranks)]


def number_elements(infos, tied):
    """Give every element of the model a number of its own; tied tensors have the same."""
    ids, following = {}, 0
    for info in infos:
        if info.name not in tied:
            count = int(np.prod(info.shape, dtype=np.int64))
            ids[info.name] = np.arange(following, following + count).reshape(info.shape)
            following += count
    return ids | {name: ids[other] for name, other in tied.items()}


def values_of(ids, dtype):
    """The value of each element, made from its number; what is -1 is zero."""
    mixed = np.atleast_1d(ids + 1).astype(np.uint64).reshape(ids.shape) * np.array(0x9E3779B97F4A7C15, np.uint64)
    return np.where(ids < 0, np.uint64(0), mixed ^ (mixed >> np.uint64(29))).astype(DTYPES[dtype])


def chunk_of(length, ranks, at):
    """The indices of a rank's chunk, as torch cuts it."""
    chunks = torch.chunk(torch.arange(length), ranks)
    return chunks[at].numpy() if at < len(chunks) else np.arange(0)


def locals_of(side, ids, coordinate):
    """The local tensors of a rank by name, as numbers of elements: -1 is padding."""
    found = {}
    home = {leaf: local for local, tree in side.fused.items() for leaf in names_in(tree)}
    for info in side.infos:
        local = home.get(info.name, side.renamed.get(info.name, info.name))
        if local not in found:
            tree = side.fused.get(local, info.name) if info.name in home else info.name
            found[local] = assembled(side, ids, tree, coordinate)
    return {name: value for name, value in found.items() if value is not None}


def names_in(tree):
    """The tensors of a local one."""
    return [tree] if isinstance(tree, str) else [name for part in tree.parts for name in names_in(part)]


def assembled(side, ids, tree, coordinate):
    """A local tensor, or None where the rank has none of it."""
    if isinstance(tree, str):
        return sliced(side, ids, tree, coordinate)
    parts = [part for part in (assembled(side, ids, part, coordinate) for part in tree.parts) if part is not None]
    if not parts:
        return None
    if not isinstance(tree, Concat):
        return np.stack(parts)
    joined = np.concatenate(parts, axis=tree.dim)
    if tree.length is None:
        return joined
    missing = list(joined.shape)
    missing[tree.dim] = tree.length - joined.shape[tree.dim]
    return np.concatenate((joined, np.full(missing, -1)), axis=tree.dim)


def sliced(side, ids, name, coordinate):
    """What a rank has of a tensor, by applying its placements one after the other."""
    value = ids[name]
    shape = side.padded.get(name, value.shape)
    if shape != value.shape:
        value = np.pad(value, [(0, new - old) for new, old in zip(shape, value.shape, strict=True)], constant_values=-1)
    for placement, (_, size), at in zip(side.placements[name], side.mesh.dims, coordinate, strict=True):
        if isinstance(placement, Owner) and at != placement.index:
            return None
        if isinstance(placement, Shard):
            value = np.take(value, indices_of(placement, value.shape[placement.dim], (size, at)), axis=placement.dim)
        if isinstance(placement, Flat):
            total = value.size if placement.total is None else placement.total
            line = np.full(-(-total // size) * size, -2)
            line[placement.start : placement.start + value.size] = value.reshape(-1)
            own = line.reshape(size, -1)[at]
            value = own[own != -2]
    return value


def indices_of(placement, length, place):
    """The indices that a rank has along the dimension of a Shard."""
    size, at = place
    if placement.units is None:
        return chunk_of(length, size, at)
    rows = np.arange(length).reshape(placement.units, -1)
    if placement.units < size:
        return rows[at // (size // placement.units)]
    return rows[chunk_of(placement.units, size, at)].reshape(-1)


def fill(shards, side, ids, coordinate):
    """The arenas of a source rank; what lies between tensors is rubbish that nobody may read."""
    arenas = [np.full(size, 0xAA, np.uint8) for size in shards.layout.arenas]
    own = locals_of(side, ids, coordinate)
    assert sorted(own) == sorted(shards.layout.by_name)
    for entry in shards.layout.entries:
        value = values_of(own[entry.name], entry.dtype)
        assert value.shape == entry.shape, entry
        raw = np.frombuffer(value.tobytes(), np.uint8)
        if entry.nbytes:
            arenas[entry.arena][entry.offset : entry.offset + entry.nbytes] = raw
    return arenas


def carry_out(ranges, sources, arenas):
    """Copy ranges from the arenas of parts into an image. Returns how often each byte was written."""
    images, counts = [np.zeros(size, np.uint8) for size in arenas], [np.zeros(size, np.int64) for size in arenas]
    for part, source_arena, source_offset, arena, offset, nbytes in ranges.expand().tolist():
        raw = sources[part][source_arena][source_offset : source_offset + nbytes]
        assert len(raw) == nbytes
        images[arena][offset : offset + nbytes] = raw
        counts[arena][offset : offset + nbytes] += 1
    return images, counts


def tensors_in(layout, images):
    """The tensors of an image by name."""
    return {
        entry.name: np.frombuffer(
            images[entry.arena][entry.offset : entry.offset + entry.nbytes].tobytes() if entry.nbytes else b"",
            DTYPES[entry.dtype],
        ).reshape(entry.shape)
        for entry in layout.entries
    }


def least_nbytes(side, own):
    """The bytes of the distinct elements in a rank's local tensors."""
    sizes = {info.name: np.dtype(DTYPES[info.dtype]).itemsize for info in side.infos}
    home = {local: names_in(tree)[0] for local, tree in side.fused.items()}
    back = {local: name for name, local in side.renamed.items()}
    groups = {}
    for local, value in own.items():
        size = sizes[home.get(local, back.get(local, local))]
        groups.setdefault(size, []).append(value.reshape(-1))
    return sum(size * int((np.unique(np.concatenate(values)) >= 0).sum()) for size, values in groups.items())


__all__ = [
    "Replicate",
    "Side",
    "carry_out",
    "fill",
    "least_nbytes",
    "locals_of",
    "number_elements",
    "tensors_in",
    "values_of",
]

"""DTensor: what this rank holds of a module whose parameters torch has sharded, or of a plain one."""

from __future__ import annotations

import functools
import graphlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raynixl.errors import ConfigError
from raynixl.weights.declare import declare
from raynixl.weights.layout import build_layout, itemsize
from raynixl.weights.pieces import Piece, Pieces, TensorInfo, row_major
from raynixl.weights.placement import MAX_RANKS, Mesh, Placement, Replicate, Shard, boxes
from raynixl.weights.shards import Shards, from_pieces, replicated
from raynixl.weights.sharing import find_sharing
from raynixl.weights.tensors import collect, describe, dtype_name, named_tensors

if TYPE_CHECKING:
    import torch

    from raynixl.weights.tensors import Model, Tensors


def shards_of(model: Model) -> Shards:
    """Return what this rank holds of a module or state dict, from the placements of its DTensors.

    Names are those of `state_dict()`; plain tensors count as whole. Ranks of one mesh get one table, so that it
    travels once for all of them. The local tensors that they speak of are those of `local_tensors`.

    Raises:
        ConfigError: a tensor is a partial sum, or has a placement that is not known.
    """
    tensors = named_tensors(model)
    local = local_tensors(model)
    spreads = {name: _spread(name, tensor) for name, tensor in tensors.items() if _is_dtensor(tensor)}
    if not spreads:
        return replicated(describe(local))
    infos = [TensorInfo(name, dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    _check(local, infos, spreads)
    mesh = _common(spreads.values())
    if mesh is None:
        return _alone(local, infos, spreads)
    placements = {info.name: _placements(spreads.get(info.name), mesh) for info in infos}
    at = {dim: own for one in spreads.values() for (dim, _), own in zip(one.dims, one.coordinate, strict=True)}
    return declare(infos, mesh, placements, [at[dim] for dim, _ in mesh.dims], tied=_ties(local, tensors))


def local_tensors(model: Model) -> Tensors:
    """Return the plain tensors that this rank has of a module or state dict, by name.

    Raises:
        ConfigError: one cannot be carried.
    """
    tensors = named_tensors(model)
    return collect({name: tensor.to_local() if _is_dtensor(tensor) else tensor for name, tensor in tensors.items()})  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Spread:
    """How one tensor is spread: the dimensions of its mesh in the order in which their placements apply."""

    dims: tuple[tuple[str, int], ...]
    coordinate: tuple[int, ...]
    placements: tuple[Placement, ...]

    def splits(self) -> Iterator[tuple[str, str]]:
        """Yield dimensions of the mesh that split the same dimension of the tensor, the first of them first."""
        for (one, own), (two, other) in itertools.combinations(zip(self.dims, self.placements, strict=True), 2):
            if isinstance(own, Shard) and own == other:
                yield one[0], two[0]


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second; without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def _spread(name: str, tensor: Any) -> _Spread:
    mesh = tensor.device_mesh
    at = mesh.get_coordinate()
    if at is None:
        raise ConfigError(f"{name!r:.200} lies on a mesh that this rank is not in", hint="publish from its ranks")
    dims = mesh.mesh_dim_names if mesh.mesh_dim_names is not None else tuple(f"dim{n}" for n in range(mesh.ndim))
    sizes, order = dict(zip(dims, mesh.shape, strict=True)), list(dims)
    found = {dim: _placement(name, own) for dim, own in zip(dims, tensor.placements, strict=True)}
    for number, own in reversed(list(enumerate(tensor.placements))):
        if _is_strided(own):  # what lies to its right has split the tensor before it
            right = [sizes[dim] for dim in dims[number + 1 :] if found[dim] == found[dims[number]]]
            if own.split_factor != math.prod(right):
                raise ConfigError(f"{name!r:.200} is split {own} on a mesh of {sizes}", hint="declare its shards")
            order.remove(dims[number])
            order.append(dims[number])
    where = dict(zip(dims, at, strict=True))
    in_order = [(dim, int(sizes[dim])) for dim in order]
    return _Spread(tuple(in_order), tuple(where[dim] for dim in order), tuple(found[dim] for dim in order))


def _is_strided(placement: Any) -> bool:
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def _placement(name: str, placement: Any) -> Placement:
    if placement.is_replicate():
        return Replicate()
    if placement.is_shard() or _is_strided(placement):
        return Shard(int(placement.dim))
    why = "a sum that is not done yet" if placement.is_partial() else "not known here"
    raise ConfigError(f"{name!r:.200} is {placement}: {why}", hint="redistribute it to Shard or Replicate")


def _common(spreads: Iterable[_Spread]) -> Mesh | None:
    """Return one mesh of which all tensors' meshes are parts, or None if there is none."""
    sizes: dict[str, int] = {}
    at: dict[str, int] = {}
    before: dict[str, set[str]] = {}
    for own in dict.fromkeys(spreads):
        for (dim, size), where in zip(own.dims, own.coordinate, strict=True):
            before.setdefault(dim, set())
            if (sizes.setdefault(dim, size), at.setdefault(dim, where)) != (size, where):
                return None
        for first, then in own.splits():
            before[then].add(first)
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError:
        return None
    return Mesh(tuple((dim, sizes[dim]) for dim in order)) if math.prod(sizes.values()) <= MAX_RANKS else None


def _placements(spread: _Spread | None, mesh: Mesh) -> tuple[Placement, ...]:
    own = {dim: found for (dim, _), found in zip(spread.dims, spread.placements, strict=True)} if spread else {}
    return tuple(own.get(dim, Replicate()) for dim, _ in mesh.dims)


def _ties(local: Tensors, tensors: Tensors) -> dict[str, str]:
    specs = describe(local)
    same = find_sharing(specs, itemsize).same_as
    pairs = ((specs[number].name, specs[first].name) for number, first in enumerate(same) if number != first)
    return {name: head for name, head in pairs if tensors[name].shape == tensors[head].shape}


@functools.lru_cache(maxsize=1024)
def _box(shape: tuple[int, ...], spread: _Spread | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and size of what this rank has of a tensor."""
    if spread is None:
        return (0,) * len(shape), shape
    mesh = Mesh(spread.dims)
    found, rank = boxes(shape, mesh, spread.placements), mesh.rank(spread.coordinate)
    return tuple(found.start[rank].tolist()), tuple(found.size[rank].tolist())


def _check(local: Tensors, infos: Sequence[TensorInfo], spreads: Mapping[str, _Spread]) -> None:
    for info in infos:
        _, size = _box(info.shape, spreads.get(info.name))
        if tuple(local[info.name].shape) != size:
            shape = list(local[info.name].shape)
            raise ConfigError(
                f"this rank has {shape} of {info.name!r:.200}, where its placements give it {list(size)}",
                hint="declare its shards",
            )


def _alone(local: Tensors, infos: Sequence[TensorInfo], spreads: Mapping[str, _Spread]) -> Shards:
    """Return the shards of this rank by themselves, for meshes that are not parts of one."""
    pieces = []
    for number, info in enumerate(infos):
        start, size = _box(info.shape, spreads.get(info.name))
        strides = row_major(np.array(size, np.int64)).tolist() if size else ()
        pieces.append(Piece(number, start, size, number, 0, tuple(strides)))
    return from_pieces(infos, build_layout(describe(local)), Pieces.of(pieces))

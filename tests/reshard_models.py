"""Random models, and random ways to hold them: FSDP, flat FSDP, TP, EP, PP, fused, tied, padded and renamed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from reshard_tools import DTYPES, Side

from raynixl.weights.declare import Concat, Stack
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Flat, Mesh, Owner, Replicate, Shard


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a small transformer, and its tensors."""

    layers: int
    heads: int
    kv_heads: int
    experts: int
    is_tied: bool
    infos: tuple[TensorInfo, ...]

    @property
    def tied(self):
        return {"head": "embed"} if self.is_tied else {}


def random_model(rng):
    """Draw a model."""
    layers, hidden, size = int(rng.integers(1, 3)), int(rng.integers(1, 7)), int(rng.integers(1, 4))
    kv_heads = int(rng.integers(1, 5))
    heads, inner, experts = kv_heads * int(rng.integers(1, 3)), int(rng.integers(1, 9)), int(rng.integers(0, 6))
    vocabulary = int(rng.integers(1, 18))
    dtype = str(rng.choice(list(DTYPES)))
    shapes = {"embed": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {
            f"{layer}.norm": (hidden,), f"{layer}.scale": (), f"{layer}.conv": (3, int(rng.integers(0, 4)), 2),
            f"{layer}.q": (heads * size, hidden), f"{layer}.k": (kv_heads * size, hidden),
            f"{layer}.v": (kv_heads * size, hidden), f"{layer}.o": (hidden, heads * size),
            f"{layer}.gate": (inner, hidden), f"{layer}.up": (inner, hidden), f"{layer}.down": (hidden, inner),
        }  # fmt: skip
        for expert in range(experts):
            shapes |= {f"{layer}.experts.{expert}.{name}": (inner, hidden) for name in ("gate", "up")}
            shapes[f"{layer}.experts.{expert}.down"] = (hidden, inner)
    shapes["head"] = (vocabulary, hidden)
    kinds = {name: str(rng.choice(list(DTYPES))) for name in ("norm", "scale", "conv")}
    infos = tuple(TensorInfo(name, kinds.get(name.split(".")[-1], dtype), shape) for name, shape in shapes.items())
    return Model(layers, heads, kv_heads, experts, bool(rng.random() < 0.3), infos)


def random_side(model, rng, *, is_tied):
    """Draw a mesh, and how the model lies on it. Whoever is tied says so."""
    names = [str(name) for name in rng.permutation(["dp", "pp", "tp", "ep", "fsdp"])[: int(rng.integers(0, 4))]]
    if rng.random() < 0.25:
        names.append("flat")
    largest = {0: 1, 1: 6, 2: 3}.get(len(names), 2)
    mesh = Mesh(tuple((name, int(rng.integers(1, largest + 1))) for name in names))
    infos = [model.infos[at] for at in rng.permutation(len(model.infos))] if rng.random() < 0.3 else list(model.infos)
    draw = _Draw(model, mesh, rng)
    side = Side(infos, mesh, {info.name: draw.placements(info) for info in infos})
    if "flat" in names:
        if rng.random() < 0.5:
            _join_flat(side, model, rng)
    else:
        _fuse(side, model, rng)
        _pad(side, model, rng)
    loose = [info.name for info in infos if not any(info.name in str(tree) for tree in side.fused.values())]
    side.renamed = {name: f"local.{name}" for name in loose if rng.random() < 0.2}
    side.tied = dict(model.tied) if is_tied else {}
    return side


class _Draw:
    """Draws the placement of each tensor; tensors that may be fused have the same."""

    def __init__(self, model, mesh, rng):
        self.model, self.mesh, self.rng = model, mesh, rng
        self.odd = rng.random() < 0.3
        self.known = {}

    def placements(self, info):
        return tuple(self._one(name, size, info) for name, size in self.mesh.dims)

    def _one(self, name, size, info):
        layer, _, rest = info.name.partition(".")
        kind = info.name.split(".")[-1]
        if name == "pp":
            stage = {"embed": 0, "head": size - 1}.get(info.name)
            return Owner(int(layer) * size // self.model.layers if stage is None else stage)
        if name == "ep":
            if "experts" not in info.name:
                return Replicate()
            return Owner(int(rest.split(".")[1]) * size // self.model.experts)
        if name == "flat":
            return Flat()
        if name == "dp" or not info.shape:
            return Replicate()
        return self._shard(name, size, (kind, info))

    def _shard(self, name, size, what):
        kind, info = what
        same = {"head": "embed"}.get(kind, kind)  # when tied, they lie alike
        if self.odd and kind in ("embed", "o", "down", "conv", "norm", "head"):
            key = (name, same)
            if key not in self.known:
                self.known[key] = Shard(int(self.rng.integers(0, len(info.shape))))
            return self.known[key]
        if name == "fsdp":
            return Shard(0)
        if kind in ("norm", "conv"):
            return Replicate()
        if kind in ("q", "k", "v"):
            units = self.model.heads if kind == "q" else self.model.kv_heads
            is_apart = name == "tp" and not self._splits_before(name)
            return Shard(0, units) if is_apart and (units >= size or size % units == 0) else Shard(0)
        return Shard(1 if kind in ("o", "down") else 0)

    def _splits_before(self, name):
        """Whether another dimension has split the tensor first, so that heads are no longer whole."""
        order = [own for own, _ in self.mesh.dims]
        return "fsdp" in order[: order.index(name)]


def _fuse(side, model, rng):
    for layer in range(model.layers):
        if rng.random() < 0.5:
            side.fused[f"{layer}.qkv"] = Concat(0, tuple(f"{layer}.{name}" for name in "qkv"))
        if rng.random() < 0.5:
            side.fused[f"{layer}.gate_up"] = Concat(int(rng.integers(0, 2)), (f"{layer}.gate", f"{layer}.up"))
        if model.experts and rng.random() < 0.5:
            names = [f"{layer}.experts.{expert}" for expert in range(model.experts)]
            side.fused[f"{layer}.w13"] = Stack(tuple(Concat(0, (f"{name}.gate", f"{name}.up")) for name in names))
            side.fused[f"{layer}.w2"] = Stack(tuple(f"{name}.down" for name in names))


def _pad(side, model, rng):
    for info in side.infos:
        if info.name in ("embed", "head") and rng.random() < 0.5:
            shape = (info.shape[0] + int(rng.integers(0, 9)), *info.shape[1:])
            side.padded |= {name: shape for name in ("embed", "head") if model.is_tied or name == info.name}


def _join_flat(side, model, rng):
    """Make a flat parameter of every layer, as FSDP does, with alignment before some tensors."""
    sizes = dict(side.mesh.dims)
    if len(sizes) > 1 and any(size > 1 for name, size in sizes.items() if name not in ("dp", "pp", "flat")):
        return  # what is flattened differs in size from rank to rank
    for layer in range(model.layers):
        kinds = {}
        for info in side.infos:
            if info.name.startswith(f"{layer}."):
                kinds.setdefault(info.dtype, []).append(info)
        for dtype, infos in kinds.items():
            counts = [math.prod(info.shape) for info in infos]
            starts = np.cumsum([0, *counts[:-1]]).tolist()
            for info, start in zip(infos, starts, strict=True):
                flat = Flat(start, sum(counts))
                side.placements[info.name] = (*side.placements[info.name][:-1], flat)
            per = -(-sum(counts) // sizes["flat"])
            side.fused[f"{layer}.flat.{dtype}"] = Concat(0, tuple(info.name for info in infos), length=per)

"""Meshes: how trainers and engines spread a public model, from texts as fsdp=256 and tp=8,ep=16,replicas=16."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from raynixl.errors import ConfigError
from raynixl.weights.architecture import Parameter, Split
from raynixl.weights.declare import declare
from raynixl.weights.fused import Concat, Stack
from raynixl.weights.placement import Flat, Mesh, Owner, Placement, Replicate, Shard
from raynixl.weights.shards import Shards

VOCABULARY_UNIT = 64
"""Engines pad their vocabulary to a multiple of this."""

SOURCE_WORDS = ("replicas", "pp", "tp", "ep", "fsdp", "flat")
TARGET_WORDS = ("replicas", "pp", "tp", "ep")

_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}  # fmt: skip
_STACKED = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def parse_mesh(text: str, words: Sequence[str]) -> dict[str, int]:
    """Read sizes as tp=8,replicas=16; what is not named is 1.

    Raises:
        ConfigError: it is no such text.
    """
    sizes = dict.fromkeys(words, 1)
    named = set()
    for part in text.split(","):
        word, _, number = part.strip().partition("=")
        if word not in sizes:
            raise ConfigError(f"{part!r:.60} is no size of a mesh", hint=f"give some of {', '.join(words)}, as tp=8")
        if word in named:
            raise ConfigError(f"{word} is given twice in {text!r:.100}")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise ConfigError(f"{part!r:.60} is no size of a mesh", hint=f"give a number from 1 on, as {word}=8")
        named.add(word)
        sizes[word] = int(number)
    return sizes


def source_shards(parameters: Sequence[Parameter], text: str) -> tuple[Shards, ...]:
    """Return what each rank of a trainer has: tensors by their own names, whole or sharded.

    fsdp splits each tensor's first dimension, after tp; flat splits each flattened layer instead; ep of the fsdp ranks
    share out the experts; pp gives each rank a run of layers; replicas have the same.

    Raises:
        ConfigError: the text is none of a mesh, or the model does not fit it.
    """
    sizes = parse_mesh(text, SOURCE_WORDS)
    ep, fsdp, flat = sizes["ep"], sizes["fsdp"], sizes["flat"]
    if flat > 1 and max(sizes["tp"], ep, fsdp) > 1:
        raise ConfigError(f"flat goes with replicas and pp alone, not as in {text!r:.100}", hint="or use fsdp")
    if fsdp % ep:
        raise ConfigError(f"ep={ep} does not divide fsdp={fsdp}", hint="the ep ranks are some of the fsdp ranks")
    spread = _Spread(parameters, sizes)
    flats = _flats(parameters) if flat > 1 else {}
    placements: dict[str, tuple[Placement, ...]] = {}
    for one in parameters:
        is_owned = one.expert is not None and ep > 1
        inner: tuple[Placement, ...] = (Owner(spread.expert_rank(one)) if is_owned else Shard(0), Shard(0))
        if flat > 1:
            inner = (Replicate(), flats[one.info.name])
        placements[one.info.name] = (*spread.outer(one), spread.tensor(one), *inner)
    mesh = Mesh((*((word, sizes[word]) for word in ("replicas", "pp", "tp", "ep")), ("fsdp", max(flat, fsdp // ep))))
    return _all_ranks(declare([one.info for one in parameters], mesh, placements, (0,) * len(mesh.dims)))


def target_shards(parameters: Sequence[Parameter], text: str) -> tuple[Shards, ...]:
    """Return what each rank of the engines has, fused as vLLM fuses: qkv, gate_up, stacked experts.

    ep ranks share out the experts; it is a multiple of tp: the ranks of several tp groups, which have the rest alike.
    Without ep, tp splits each expert. A replica has the larger of tp and ep ranks, for each stage of pp.

    Raises:
        ConfigError: the text is none of a mesh, or the model does not fit it.
    """
    sizes = parse_mesh(text, TARGET_WORDS)
    tp, ep = sizes["tp"], sizes["ep"]
    if ep > 1 and ep % tp:
        raise ConfigError(f"ep={ep} is no multiple of tp={tp}", hint=f"try ep={math.lcm(ep, tp)}, or leave ep out")
    spread = _Spread(parameters, sizes)
    if sizes["pp"] > 1 and not any(one.info.name == "lm_head.weight" for one in parameters):
        raise ConfigError("the head of this model is its embedding: two stages would need it", hint="leave pp out")
    placements: dict[str, tuple[Placement, ...]] = {}
    for one in parameters:
        if one.expert is not None and ep > 1:
            group, rank = divmod(spread.expert_rank(one), tp)
            inner: tuple[Placement, ...] = (Owner(group), Owner(rank))
        else:
            inner = (Replicate(), spread.tensor(one))
        placements[one.info.name] = (*spread.outer(one), *inner)
    mesh = Mesh((("replicas", sizes["replicas"]), ("pp", sizes["pp"]), ("dp", max(1, ep // tp)), ("tp", tp)))
    infos, joined, padded = [one.info for one in parameters], put_together(parameters), _padded(parameters, tp)
    return _all_ranks(declare(infos, mesh, placements, (0,) * len(mesh.dims), fused=joined, padded=padded))


def ranks_of_replica(text: str) -> int:
    """Return how many ranks of engines flip together.

    Raises:
        ConfigError: the text is none of a mesh.
    """
    sizes = parse_mesh(text, TARGET_WORDS)
    return sizes["pp"] * max(sizes["tp"], sizes["ep"])


def _padded(parameters: Sequence[Parameter], tp: int) -> dict[str, tuple[int, int]]:
    """Return the padded shapes of embeddings and heads."""
    unit = math.lcm(VOCABULARY_UNIT, tp)
    shapes = {one.info.name: one.info.shape for one in parameters if one.split is Split.VOCABULARY}
    return {name: (-(-words // unit) * unit, hidden) for name, (words, hidden) in shapes.items()}


def put_together(parameters: Sequence[Parameter]) -> dict[str, Concat | Stack]:
    """Return the local tensors of an engine that are put together from several of a checkpoint."""
    joined: dict[str, list[str]] = defaultdict(list)
    experts: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in parameters:
        name = one.info.name
        prefix, leaf, kind = name.rsplit(".", 2) if name.count(".") > 2 else ("", "", "")
        if one.expert is not None:
            local = f"{prefix.rsplit('.', 1)[0]}.{_STACKED[leaf]}_{kind}"
            experts[local][one.expert].append(name)
        elif leaf in _FUSED:
            joined[f"{prefix}.{_FUSED[leaf]}.{kind}"].append(name)
    found: dict[str, Concat | Stack] = {local: Concat(0, tuple(parts)) for local, parts in joined.items()}
    for local, members in experts.items():
        found[local] = Stack(
            tuple(Concat(0, tuple(parts)) if len(parts) > 1 else parts[0] for parts in members.values())
        )
    return found


class _Spread:
    """A model on a mesh of some sizes: what trainers and engines have in common."""

    def __init__(self, parameters: Sequence[Parameter], sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.experts = max((one.expert + 1 for one in parameters if one.expert is not None), default=0)
        layers = max(one.layer + 1 for one in parameters if one.layer is not None)
        self._first = {one.info.name for one in parameters if one.layer is None and "embed_tokens" in one.info.name}
        self._layers = layers
        if sizes["ep"] > max(1, self.experts):
            has = f"{self.experts} experts" if self.experts else "no experts"
            raise ConfigError(f"ep={sizes['ep']}, but the model has {has}", hint="give a smaller ep, or none")
        if sizes["pp"] > layers:
            raise ConfigError(f"pp={sizes['pp']}, but the model has {layers} layers", hint="give a smaller pp")

    def outer(self, one: Parameter) -> tuple[Placement, Placement]:
        """Return the placements of a parameter on replicas and stages, which come first in each mesh."""
        stages = self.sizes["pp"]
        if one.layer is None:
            return Replicate(), Owner(0 if one.info.name in self._first else stages - 1)
        return Replicate(), Owner(one.layer * stages // self._layers)

    def expert_rank(self, one: Parameter) -> int:
        """Return which of the ep ranks has an expert: each has a run of them, as long as the others' or shorter."""
        assert one.expert is not None
        return one.expert // -(-self.experts // self.sizes["ep"])

    def tensor(self, one: Parameter) -> Placement:
        """Return the placement of a parameter on tp ranks."""
        tp, info = self.sizes["tp"], one.info
        if one.split is Split.WHOLE or tp == 1:
            return Replicate()
        dim = 1 if one.split is Split.ROW else 0
        if one.split is Split.VOCABULARY:
            return Shard(dim)
        units = info.shape[dim] if one.units is None else one.units
        if units % tp and (one.units is None or tp % units):
            what = f"a dimension of {units}" if one.units is None else f"{units} heads"
            raise ConfigError(f"tp={tp} does not divide {info.name}: {what}", hint="choose a tp that divides it")
        return Shard(dim, one.units)


def _flats(parameters: Sequence[Parameter]) -> dict[str, Flat]:
    """Return where each parameter lies in the flat one of its layer; what is in no layer makes one, too."""
    totals: dict[int | None, int] = defaultdict(int)
    starts: dict[str, int] = {}
    for one in parameters:
        starts[one.info.name] = totals[one.layer]
        totals[one.layer] += math.prod(one.info.shape)
    return {one.info.name: Flat(starts[one.info.name], totals[one.layer]) for one in parameters}


def _all_ranks(first: Shards) -> tuple[Shards, ...]:
    return tuple(Shards(first.table, rank) for rank in range(first.table.ranks))

"""What expert parallelism must return, computed for all ranks at once by plain torch: slow, and easy to believe.

    setting = Setting(world=4, holders=[0, 0, 1, 1, 2, 2, 3, 3], max_tokens=64)
    arrived = dispatch(setting, tokens)                          # tokens[rank] = Tokens(x, topk_idx, topk_weights)
    ys = [run_experts(setting, rank, each, expert, torch.bfloat16) for rank, each in enumerate(arrived)]
    outs = combine(setting, tokens, ys)

`ExpertParallel` returns the very same bits. `dense` is what both are an approximation of: the sum in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raynixl.moe.grid import Grid
from raynixl.moe.quantising import dequantise

Expert = Callable[[int, Tensor], Tensor]
"""expert(physical id, rows) -> rows of what it computes."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What one rank gives to a dispatch."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What all ranks agree on. `holders[physical expert]` is a rank; a rank that is `lost` gives and takes nothing."""

    world: int
    holders: Sequence[int]
    max_tokens: int
    layout: str = "tokens"
    alignment: int = 1
    weights_at: str = "holder"
    lost: frozenset[int] = field(default_factory=frozenset)
    renormalise: bool = False
    grid: Grid | None = None
    """Over which rows go in two stages, if they do: their order is another, and each group's sum is rounded."""

    @property
    def active(self) -> list[int]:
        """The ranks that are not lost, ascending."""
        return [rank for rank in range(self.world) if rank not in self.lost]

    def sources_at(self, holder: int) -> list[int]:
        """The active ranks in the order in which their rows lie at a holder."""
        if self.grid is None or self.layout == "slots":
            return self.active
        groups = [[rank for rank in group if rank not in self.lost] for group in self.grid.groups]
        members = next(len(group) for group in groups if holder in group)
        places = {rank: (local, number) for number, group in enumerate(groups) for local, rank in enumerate(group)}
        # who forwards has the local index of the column modulo the members
        return sorted(self.active, key=lambda rank: (places[rank][0] % members, *places[rank]))

    def experts_of(self, rank: int) -> list[int]:
        """The physical experts of a rank, in the order of their local ids."""
        return [expert for expert, holder in enumerate(self.holders) if holder == rank]


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """What a dispatch returns on one rank; the fields are those of `Dispatched`."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None
    counts: Tensor
    offsets: Tensor | None
    sources: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class _Row:
    """One token of one source at one holder, with its local ids there."""

    source: int
    token: int
    ids: tuple[int, ...]


def dispatch(setting: Setting, tokens: Sequence[Tokens]) -> list[Arrived]:
    """Return what each rank gets; a lost one gets nothing."""
    return [_arrive(setting, tokens, rank) for rank in range(setting.world)]


def run_experts(setting: Setting, rank: int, arrived: Any, expert: Expert, dtype: torch.dtype) -> Tensor:
    """Return what the experts of `rank` make of a dispatch's result, `Arrived` or `Dispatched`, in the layout that
    `combine` expects of it.

    With layouts other than "experts" and weights at the holder that is each row's weighted sum, by the recipe of
    `combine`. Rows that no token fills are NaN: nobody may use them.
    """
    width = arrived.x.shape[-1]
    rows = as_rows(arrived.x.reshape(-1, width), _flat(arrived.scales), dtype)
    names = setting.experts_of(rank)
    if setting.layout == "experts":
        y = torch.full((len(rows), width), float("nan"), dtype=dtype)
        for local, name in enumerate(names):
            start = int(arrived.offsets[local])
            here = slice(start, start + int(arrived.counts[local]))
            y[here] = expert(name, rows[here])
        return y
    ids = arrived.topk_idx.reshape(-1, arrived.topk_idx.shape[-1])
    made = _each_pair(ids, names, rows, expert)
    if setting.weights_at == "source":
        return made[ids >= 0]
    weights = None if arrived.topk_weights is None else arrived.topk_weights.reshape(ids.shape)
    y = _sum_pairs(made, ids >= 0, weights)
    y[(ids < 0).all(1)] = float("nan")
    return y.reshape(arrived.x.shape)


def combine(
    setting: Setting,
    tokens: Sequence[Tokens],
    ys: Sequence[Tensor],
    *,
    biases: Sequence[Sequence[Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return what each rank's combine returns of `ys`, in `dtype` or that of its `y`; `biases[rank]` has up to two."""
    routed = {rank: _route(setting, tokens, rank) for rank in setting.active}
    backs = {rank: _back(setting, tokens, rows, ys[rank]) for rank, rows in routed.items()}
    outs = []
    for rank in range(setting.world):
        added = [] if biases is None else list(biases[rank])
        kind = ys[rank].dtype if dtype is None else dtype
        outs.append(_sum_source(setting, tokens[rank], rank, backs, added, kind))
    return outs


def combine_weights(setting: Setting, tokens: Sequence[Tokens], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return for each rank the sums [tokens, topk] of the weights [rows, topk] that come back from holders."""
    outs = [torch.zeros(given.topk_idx.shape, dtype=torch.float32) for given in tokens]
    for holder in setting.active:
        for place, row in enumerate(_route(setting, tokens, holder)):
            outs[row.source][row.token] += weights[holder][place]
    return outs


def dense(setting: Setting, given: Tokens, expert: Expert) -> Tensor:
    """Return y_t = sum over k of w_tk f_k(x_t) in float64, as one rank that holds all experts would."""
    rows = as_rows(given.x, given.scales, torch.float64)
    out = torch.zeros(rows.shape, dtype=torch.float64)
    for token, ids in enumerate(given.topk_idx.tolist()):
        for k, name in enumerate(ids):
            if name >= 0 and setting.holders[name] not in setting.lost:
                weight = 1.0 if given.topk_weights is None else float(given.topk_weights[token, k])
                out[token] += weight * expert(name, rows[token : token + 1])[0]
    return out


def as_rows(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return rows as numbers of `dtype`, by their scales if they have any."""
    return x.to(dtype) if scales is None else dequantise(x, scales, dtype)


def _route(setting: Setting, tokens: Sequence[Tokens], rank: int) -> list[_Row]:
    """List the rows that a rank gets: by source, then by token, one for each token that has an expert there."""
    local = {name: number for number, name in enumerate(setting.experts_of(rank))}
    rows = []
    for source in setting.sources_at(rank):
        for token, ids in enumerate(tokens[source].topk_idx.tolist()):
            row = _Row(source, token, tuple(local.get(name, -1) for name in ids))
            if max(row.ids, default=-1) >= 0:
                rows.append(row)
    return rows


def _arrive(setting: Setting, tokens: Sequence[Tokens], rank: int) -> Arrived:
    rows = _route(setting, tokens, rank) if rank in setting.active else []
    own = tokens[rank]
    ids = torch.tensor([row.ids for row in rows], dtype=own.topk_idx.dtype).reshape(len(rows), own.topk_idx.shape[1])
    weights = None
    if own.topk_weights is not None and setting.weights_at == "holder":
        weights = _gather([given.topk_weights for given in tokens], rows)
        weights = torch.where(ids >= 0, weights, torch.zeros(()))
    held = len(setting.experts_of(rank))
    counts = torch.tensor([int((ids == local).sum()) for local in range(held)], dtype=torch.int64)
    sources = torch.tensor([row.source for row in rows], dtype=torch.int32)
    places = torch.tensor([row.token for row in rows], dtype=torch.int32)
    x = _gather([given.x for given in tokens], rows)
    scales = None if own.scales is None else _gather([given.scales for given in tokens], rows)
    plain = Arrived(x, scales, ids, weights, counts, None, sources, places)
    if setting.layout == "experts":
        return _by_expert(setting, plain, rows)
    return _by_slot(setting, plain, rows) if setting.layout == "slots" else plain


def _gather(given: Sequence[Tensor | None], rows: Sequence[_Row]) -> Tensor:
    some = next(one for one in given if one is not None)
    picked = [_bits(tensor[row.token]) for row in rows if (tensor := given[row.source]) is not None]
    if not picked:
        return some.new_empty((0, some.shape[1]))
    return torch.stack(picked).view(some.dtype)


def _bits(row: Tensor) -> Tensor:
    return torch.empty(row.shape, dtype=row.dtype).copy_(row).view(torch.uint8)  # NaNs keep their bits


def _by_expert(setting: Setting, plain: Arrived, rows: Sequence[_Row]) -> Arrived:
    """Lay one row for each pair by expert, from starts that are multiples of the alignment, with zeros between."""
    starts = [0]
    for count in plain.counts.tolist():
        starts.append(starts[-1] + -(-count // setting.alignment) * setting.alignment)
    origins, pairs = torch.full((starts[-1],), -1), dict(_pairs_by_expert(rows, starts))
    x = _empty_like_rows(plain.x, starts[-1])
    scales = None if plain.scales is None else _empty_like_rows(plain.scales, starts[-1])
    weights = None if plain.topk_weights is None else torch.zeros(starts[-1])
    for (row, k), place in pairs.items():
        origins[place] = row
        x.view(torch.uint8)[place] = plain.x.view(torch.uint8)[row]
        if scales is not None and plain.scales is not None:
            scales[place] = plain.scales[row]
        if weights is not None and plain.topk_weights is not None:
            weights[place] = plain.topk_weights[row, k]
    offsets = torch.tensor(starts, dtype=torch.int64)
    return Arrived(x, scales, plain.topk_idx, weights, plain.counts, offsets, plain.sources, plain.tokens)


def _pairs_by_expert(rows: Sequence[_Row], starts: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Give each pair (row, k) its place: by expert, then by row, then by k."""
    for local in range(len(starts) - 1):
        place = starts[local]
        for number, row in enumerate(rows):
            for k, name in enumerate(row.ids):
                if name == local:
                    yield (number, k), place
                    place += 1


def _empty_like_rows(rows: Tensor, count: int) -> Tensor:
    nbytes = rows.shape[1] * rows.element_size()
    return torch.zeros((count, nbytes), dtype=torch.uint8).view(rows.dtype)


def _by_slot(setting: Setting, plain: Arrived, rows: Sequence[_Row]) -> Arrived:
    """Lay the rows of each source in a place of its own; what no row fills has ids of -1."""
    places = [at for at, _ in _slot_places(setting, rows)]
    shape = (setting.world, setting.max_tokens)
    total = shape[0] * shape[1]

    def spread(tensor: Tensor, filler: int) -> Tensor:
        nbytes = tensor.shape[1] * tensor.element_size()
        out = torch.full((total, nbytes), filler, dtype=torch.uint8)
        if places:
            out[places] = tensor.view(torch.uint8)
        return out.view(tensor.dtype).reshape(*shape, tensor.shape[1])

    scales = None if plain.scales is None else spread(plain.scales, 0)
    weights = None if plain.topk_weights is None else spread(plain.topk_weights, 0)
    ids = spread(plain.topk_idx, 255)
    return Arrived(spread(plain.x, 0), scales, ids, weights, plain.counts, None, plain.sources, plain.tokens)


def _slot_places(setting: Setting, rows: Sequence[_Row]) -> Iterator[tuple[int, _Row]]:
    seen = [0] * setting.world
    for row in rows:
        yield row.source * setting.max_tokens + seen[row.source], row
        seen[row.source] += 1


def _each_pair(ids: Tensor, names: Sequence[int], rows: Tensor, expert: Expert) -> Tensor:
    """Return what the experts make of each pair, [rows, topk, hidden]."""
    made = torch.zeros((*ids.shape, rows.shape[1]), dtype=rows.dtype)
    for local, name in enumerate(names):
        row, k = (ids == local).nonzero(as_tuple=True)
        made[row, k] = expert(name, rows[row])
    return made


def _sum_pairs(made: Tensor, present: Tensor, weights: Tensor | None) -> Tensor:
    """Sum each row's pairs, weighted, in the order of k in float32 (float64 for its like), and round once."""
    wide = _wide(made.dtype)
    total = torch.zeros((made.shape[0], made.shape[2]), dtype=wide)
    for k in range(made.shape[1]):
        term = made[:, k].to(wide)
        if weights is not None:
            term = weights[:, k, None].to(wide) * term
        total = torch.where(present[:, k, None], total + term, total)
    return total.to(made.dtype)


def _back(
    setting: Setting, tokens: Sequence[Tokens], rows: Sequence[_Row], y: Tensor
) -> Mapping[tuple[int, int, int], Tensor]:
    """Return what one holder sends back, by (source, token, k); one sum for all k has -1 in its place."""
    flat = y.reshape(-1, y.shape[-1])
    if setting.layout == "experts":
        return _back_by_expert(setting, tokens, rows, flat)
    if setting.weights_at == "source":
        pairs = [(row.source, row.token, k) for row in rows for k, name in enumerate(row.ids) if name >= 0]
        return dict(zip(pairs, flat, strict=True))
    if setting.layout == "slots":
        return {(row.source, row.token, -1): flat[at] for at, row in _slot_places(setting, rows)}
    return {(row.source, row.token, -1): each for row, each in zip(rows, flat, strict=True)}


def _back_by_expert(
    setting: Setting, tokens: Sequence[Tokens], rows: Sequence[_Row], flat: Tensor
) -> Mapping[tuple[int, int, int], Tensor]:
    count = 1 + max((name for row in rows for name in row.ids), default=-1)
    starts = [0]
    for local in range(count):
        pairs = sum(row.ids.count(local) for row in rows)
        starts.append(starts[-1] + -(-pairs // setting.alignment) * setting.alignment)
    places = dict(_pairs_by_expert(rows, starts))
    if setting.weights_at == "source":
        return {(rows[row].source, rows[row].token, k): flat[at] for (row, k), at in places.items()}
    back = {}
    for number, row in enumerate(rows):
        ks = [k for k, name in enumerate(row.ids) if name >= 0]
        made = torch.stack([flat[places[number, k]] for k in ks])[None]
        given = tokens[row.source].topk_weights
        weights = None if given is None else given[row.token, ks][None]
        back[row.source, row.token, -1] = _sum_pairs(made, torch.ones((1, len(ks)), dtype=torch.bool), weights)[0]
    return back


def _sum_source(
    setting: Setting,
    given: Tokens,
    rank: int,
    backs: Mapping[int, Mapping[tuple[int, int, int], Tensor]],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Sum what has come back for each token of a rank: over holders ascending, or over k; then biases; round once."""
    width = given.x.shape[1]
    some = next((row for back in backs.values() for row in back.values()), None)
    wide = _wide(dtype if some is None else some.dtype)
    total = torch.zeros((len(given.x), width), dtype=wide)
    for token, ids in enumerate(given.topk_idx.tolist()):
        acc = torch.zeros(width, dtype=wide)
        if setting.weights_at == "source":
            for k, name in enumerate(ids):
                row = None if name < 0 else backs.get(setting.holders[name], {}).get((rank, token, k))
                if row is not None:
                    weight = 1.0 if given.topk_weights is None else given.topk_weights[token, k].to(wide)
                    acc = acc + weight * row.to(wide)
        else:
            for row in _sums(setting, [back.get((rank, token, -1)) for back in backs.values()], list(backs)):
                acc = acc + row.to(wide)
        total[token] = acc * _share(setting, given, token)
    for bias in biases:
        total = total + bias.to(wide)
    return total.to(dtype)


def _sums(setting: Setting, rows: Sequence[Tensor | None], holders: Sequence[int]) -> Iterator[Tensor]:
    """Give what a source adds up: the rows of holders, or in two stages each group's sum of them, rounded once."""
    given = {holder: row for holder, row in zip(holders, rows, strict=True) if row is not None}
    if setting.grid is None:
        yield from given.values()
        return
    for group in setting.grid.groups:
        of_group = [given[holder] for holder in group if holder in given]
        if of_group:
            wide = _wide(of_group[0].dtype)
            total = torch.zeros(of_group[0].shape, dtype=wide)
            for row in of_group:
                total = total + row.to(wide)
            yield total.to(of_group[0].dtype)


def _share(setting: Setting, given: Tokens, token: int) -> Tensor:
    """Return what the sum is multiplied by: the weight of all experts over that of those which are there."""
    everything = present = torch.zeros(())
    for k, name in enumerate(given.topk_idx[token].tolist()):
        weight = torch.ones(()) if given.topk_weights is None else given.topk_weights[token, k].float()
        if name >= 0:
            everything = everything + weight
            present = present if setting.holders[name] in setting.lost else present + weight
    if not setting.renormalise or present in (everything, 0):
        return torch.ones(())
    return everything / present


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.reshape(-1, scales.shape[-1])

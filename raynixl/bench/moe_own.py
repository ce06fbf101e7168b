"""Ours in the MoE benchmark, and the floor under every way: the gather copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from raynixl.bench.moe_load import Load, Received, Tokens, run_expert, run_experts
from raynixl.bench.moe_packed import Buffer, rows_of
from raynixl.config import from_env
from raynixl.moe.routing import Routing, route
from raynixl.native import load as load_core

if TYPE_CHECKING:
    import torch

    from raynixl.collectives import Group

GATHERS = ("index_select", "put_rows")
"""Who copies the rows of the floor: torch, or our core as it does when rows go to a peer."""


class OwnWay:
    """raynixl's expert parallelism."""

    def __init__(self, group: Group, load: Load, buffer: Buffer) -> None:
        from raynixl.moe.parallel import ExpertParallel

        self._load, self._rank, self._buffer = load, group.rank, buffer
        self._parallel = ExpertParallel(
            group, experts=load.experts, hidden=load.hidden, topk=load.topk, max_tokens=load.tokens,
            dtype=load.torch_dtype, placement=load.holders().tolist(), name=f"bench-{load.tokens}",
        )  # fmt: skip
        self._out = rows_of(load, load.tokens)
        self._dispatched: Any = None
        self._y: Any = None

    def dispatch(self, tokens: Tokens) -> None:
        """Bring rows, ids and weights to the ranks that hold the experts."""
        self._dispatched = self._parallel.dispatch(tokens.x, tokens.ids, tokens.weights, layout=self._load.layout)

    def received(self) -> Received:
        """Return what came, in order of source and token."""
        made = self._dispatched
        x, ids, weights = made.x, made.topk_idx, made.topk_weights
        if self._load.layout == "slots":
            rows = made.sources.long() * self._load.tokens + _ordinals(made.sources)
            x, ids, weights = (each.flatten(0, 1)[rows] for each in (x, ids, weights))
        elif self._load.layout == "experts":
            x, weights = rows_of_pairs(made)
        return Received(x, ids, weights, made.counts)

    def compute(self) -> int:
        """Let the experts work; return how many rows they got."""
        made, load = self._dispatched, self._load
        x = made.x.flatten(0, -2)
        y = self._buffer.rows(len(x))
        if load.layout == "experts":
            starts = made.offsets.tolist()
            for expert, start, end in zip(load.held(self._rank).tolist(), starts, starts[1:], strict=False):
                run_expert(load, expert, x[start:end], y[start:end])
        else:
            ids, weights = made.topk_idx.flatten(0, -2), made.topk_weights.flatten(0, -2)
            run_experts(load, self._rank, Received(x, ids, weights, made.counts), y)
        self._y = y.view(made.x.shape)
        return len(made.sources)

    def combine(self) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token; what was dispatched is let go of."""
        handle, self._dispatched = self._dispatched.handle, None
        out: torch.Tensor = self._parallel.combine(self._y, handle, out=self._out)
        return out

    def sent(self) -> list[int]:
        """Return how many messages have gone to each other rank so far: puts of rows, and lines."""
        return [peer.puts + peer.lines for peer in self._parallel.statistics().peers]

    def close(self) -> None:
        """Let go of its memory."""
        self._dispatched = None
        self._parallel.close()


def _ordinals(sources: torch.Tensor) -> torch.Tensor:
    """Return the number of each row among those of its source."""
    import torch

    counts = torch.bincount(sources)
    return torch.arange(len(sources), device=sources.device) - (counts.cumsum(0) - counts)[sources.long()]


def rows_of_pairs(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return from rows that lie expert by expert each row once, and its weights by k."""
    import torch

    ids = made.topk_idx
    order, ks = (ids >= 0).nonzero(as_tuple=True)
    expert = ids[order, ks].long()
    by_expert = torch.argsort(expert, stable=True)
    places = torch.empty_like(order)
    places[by_expert] = made.offsets[expert[by_expert]] + _ordinals(expert[by_expert])
    x = made.x.new_zeros(len(ids), made.x.shape[1])
    x[order] = made.x[places]
    weights = torch.zeros(ids.shape, device=ids.device)
    weights[order, ks] = made.topk_weights[places]
    return x, weights


class Gather:
    """Copies the rows that go to each rank into touched memory of this process's own, one rank after another."""

    def __init__(self, load: Load, rank: int, tokens: Tokens) -> None:
        self._core, self._load, self._x = load_core(from_env().native), load, tokens.x
        ids, weights, holders, local = tokens.ids.numpy(), tokens.weights.numpy(), load.holders(), load.local_ids()
        self._routed: Routing = route(self._core, ids, weights, holders=holders, local=local, ranks=load.ranks)
        self._into = rows_of(load, len(self._routed.order))
        self._turn = [(rank + 1 + step) % load.ranks for step in range(load.ranks)]

    def by(self, name: str) -> Callable[[], None]:
        """Return what copies once."""
        return self._select if name == "index_select" else self._put

    def _select(self) -> None:
        import torch

        for rank in self._turn:
            rows = self._routed.rows_of(rank)
            torch.index_select(self._x, 0, torch.from_numpy(self._routed.order[rows]), out=self._into[rows])

    def _put(self) -> None:
        nbytes, x = self._load.row_nbytes, self._x.data_ptr()
        for rank in self._turn:
            rows = self._routed.rows_of(rank)
            index = np.ascontiguousarray(self._routed.order[rows])
            at = self._into.data_ptr() + rows.start * nbytes
            self._core.put_rows(x, nbytes, nbytes, index, at, [], len(index))

"""Ours in the MoE benchmark, and the floor under every way: the gather copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from raynixl.bench.moe_load import Load, Received, Tokens
from raynixl.bench.moe_packed import rows_of
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

    def __init__(self, group: Group, load: Load) -> None:
        from raynixl.moe.parallel import ExpertParallel

        self._parallel = ExpertParallel(
            group, experts=load.experts, hidden=load.hidden, topk=load.topk, max_tokens=load.tokens,
            dtype=load.torch_dtype, placement=load.holders().tolist(), name=f"bench-{load.tokens}",
        )  # fmt: skip
        self._out = rows_of(load, load.tokens)
        self._dispatched: Any = None

    def dispatch(self, tokens: Tokens) -> Received:
        """Bring rows, ids and weights to the ranks that hold the experts."""
        made = self._dispatched = self._parallel.dispatch(tokens.x, tokens.ids, tokens.weights)
        return Received(made.x, made.topk_idx, made.topk_weights, made.counts)

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token; what was dispatched is let go of."""
        handle, self._dispatched = self._dispatched.handle, None
        out: torch.Tensor = self._parallel.combine(y, handle, out=self._out)
        return out

    def count_messages(self) -> dict[int, int]:
        """Return what has been sent to each rank so far."""
        return {}

    def close(self) -> None:
        """Let go of its memory."""
        self._dispatched = None
        self._parallel.close()


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

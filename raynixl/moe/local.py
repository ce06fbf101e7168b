"""Expert parallelism of one process: every expert is here, and plain torch stands in for the transfers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raynixl.errors import ConfigError, RangeError
from raynixl.moe.result import Dispatched


@dataclass(frozen=True, slots=True, eq=False)
class LocalHandle:
    """What a dispatch leaves for its combine: who is where, and the weights of the sum."""

    topk_idx: Tensor
    weights: Tensor | None
    weights_at: str
    layout: str
    alignment: int
    tokens: Tensor
    """The token of each row: those that have an expert at all."""
    places: Tensor
    """Where each pair [rows, topk] lies among the pairs in the order of `layout`; -1 for none."""
    offsets: Tensor
    """Where each expert's rows start in layout "experts"."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """By source, of which there is one: how many rows came from there."""
        return np.array([len(self.tokens)])

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from."""
        return torch.zeros(len(self.tokens), dtype=torch.int32, device=self.tokens.device)

    def plain(self) -> LocalHandle:
        """Return the same without weights: combine adds up what it gets as it is."""
        return dataclasses.replace(self, weights=None)


class LocalParallel:
    """What `ExpertParallel` does, for the only rank there is: the same results, bit for bit.

    With `weights_at="source"` these are the bits of any number of ranks, if experts see the same rows in the same
    order. It has no limit of tokens and no peers, so nothing is ever lost.
    """

    rank, world, active = 0, 1, (0,)

    def __init__(self, *, experts: int, hidden: int, topk: int) -> None:
        self.experts, self.hidden, self.topk = experts, hidden, topk
        self.local_experts = tuple(range(experts))

    def __repr__(self) -> str:
        return f"LocalParallel({self.experts} experts, top {self.topk} of them)"

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: LocalHandle | None = None,
        layout: str = "tokens",
        alignment: int = 1,
        weights_at: str = "holder",
    ) -> Dispatched:
        """Return the rows as the experts want them."""
        if (topk_idx is None) == (handle is None):
            raise ConfigError("a dispatch needs topk_idx or a handle", hint="give one of them")
        if handle is not None:
            topk_weights = handle.weights if topk_weights is None else topk_weights
            topk_idx = handle.topk_idx
        assert topk_idx is not None
        self._check(x, topk_idx)
        handle = self._route(topk_idx, topk_weights, layout, alignment, weights_at)
        ids = topk_idx[handle.tokens]
        weights = _row_weights(handle) if weights_at == "holder" else None
        counts = torch.bincount(ids[ids >= 0].long(), minlength=self.experts)
        rows = x[handle.tokens]
        if layout == "experts":
            rows, weights = self._by_expert(rows, weights, handle)
        offsets = handle.offsets if layout == "experts" else None
        return Dispatched(
            rows, None, ids, weights, counts, offsets, handle.tokens.int(), extra=(), lost=(), handle=cast(Any, handle)
        )

    def combine(self, y: Tensor, handle: LocalHandle) -> Tensor:
        """Return the sum for each token, in the order of k in float32 (float64 for its like), rounded once."""
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        if handle.layout == "tokens" and handle.weights_at == "holder":
            total = y
        else:
            total = self._sum_pairs(y.to(wide), handle)
        out = torch.zeros((len(handle.topk_idx), self.hidden), dtype=y.dtype, device=y.device)
        out[handle.tokens] = total.to(y.dtype)
        return out

    def combine_weights(self, y: Tensor, weights: Tensor, handle: LocalHandle) -> tuple[Tensor, Tensor]:
        """Return the sums, and the weights [rows, topk] back at their tokens."""
        back = weights.new_zeros(handle.topk_idx.shape)
        back[handle.tokens] = weights
        return self.combine(y, handle), back

    def _sum_pairs(self, y: Tensor, handle: LocalHandle) -> Tensor:
        total = y.new_zeros((len(handle.tokens), self.hidden))
        weights = None if handle.weights is None else handle.weights[handle.tokens].to(y.dtype)
        present = handle.places >= 0
        begun = present.cumsum(1) > 1
        for k in range(present.shape[1]):
            (rows,) = present[:, k].nonzero(as_tuple=True)
            terms = y[handle.places[rows, k]]
            if weights is not None:
                terms = weights[rows, k, None] * terms
            # A sum starts with its first term: zero plus -0.0 would be another zero.
            total[rows] = torch.where(begun[rows, k, None], total[rows] + terms, terms)
        return total

    def _check(self, x: Tensor, topk_idx: Tensor) -> None:
        if x.shape != (len(topk_idx), self.hidden) or topk_idx.shape[1] != self.topk:
            raise ConfigError(
                f"x {list(x.shape)} and topk_idx {list(topk_idx.shape)} do not fit each other, or this layer",
                hint=f"give x [tokens, {self.hidden}] and topk_idx [tokens, {self.topk}]",
            )
        if topk_idx.numel() and not -1 <= int(topk_idx.min()) <= int(topk_idx.max()) < self.experts:
            raise RangeError(
                f"topk_idx lies in {int(topk_idx.min())}..{int(topk_idx.max())}",
                hint=f"experts are 0..{self.experts - 1}, and -1 is none",
            )

    def _route(
        self, topk_idx: Tensor, weights: Tensor | None, layout: str, alignment: int, weights_at: str
    ) -> LocalHandle:
        (tokens,) = (topk_idx >= 0).any(1).nonzero(as_tuple=True)
        ids = topk_idx[tokens]
        counts = torch.bincount(ids[ids >= 0].long(), minlength=self.experts)
        offsets = torch.zeros(self.experts + 1, dtype=torch.int64, device=ids.device)
        offsets[1:] = (-(-counts // alignment) * alignment).cumsum(0)
        places = torch.full(ids.shape, -1, dtype=torch.int64, device=ids.device)
        if layout == "experts":
            places[ids >= 0] = expert_places(ids, offsets)
        else:
            places[ids >= 0] = torch.arange(int(counts.sum()), device=ids.device)
        weights = None if weights is None else weights.float()
        return LocalHandle(topk_idx, weights, weights_at, layout, alignment, tokens, places, offsets)

    def _by_expert(self, rows: Tensor, weights: Tensor | None, handle: LocalHandle) -> tuple[Tensor, Tensor | None]:
        total = int(handle.offsets[-1])
        row, k = (handle.places >= 0).nonzero(as_tuple=True)
        place = handle.places[row, k]
        x = rows.new_zeros((total, rows.shape[1]))
        x[place] = rows[row]
        if weights is None:
            return x, None
        spread = torch.zeros(total, device=x.device)
        spread[place] = weights[row, k]
        return x, spread


def expert_places(ids: Tensor, offsets: Tensor) -> Tensor:
    """Return where each pair of (ids >= 0).nonzero() lies in layout "experts": by expert, then by row, then by k."""
    experts = ids[ids >= 0].long()
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=len(offsets) - 1)
    firsts = counts.cumsum(0) - counts
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=ids.device) + (offsets[:-1] - firsts).repeat_interleave(counts)
    return places


def _row_weights(handle: LocalHandle) -> Tensor | None:
    if handle.weights is None:
        return None
    return torch.where(handle.topk_idx >= 0, handle.weights, 0)[handle.tokens]

"""Results: what a dispatch returns, and the handle that its combine needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raynixl.moe.routing import Routing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raynixl.moe.major import Major


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """The layout of one dispatch: what its combine needs, and a cached dispatch. A value; it holds no slots."""

    layout: str
    weights_at: str
    alignment: int
    routing: Routing
    weights: npt.NDArray[np.float32] | None
    """The source's weights [tokens, topk], if any."""
    placement: int
    """The digest of the placement that it was made under."""
    topk: int
    offsets: npt.NDArray[np.int64]
    """By rank: the row at which our rows begin there; -1 where the rank says it anew each time."""
    extent: npt.NDArray[np.int64]
    """By rank: how many rows it gets in all, if the offsets are known."""
    backs: npt.NDArray[np.int64]
    """By source: where it wants the rows that go back from here to begin."""
    totals: npt.NDArray[np.int64]
    """By source: how many rows come back to it in all."""
    counts: npt.NDArray[np.int64]
    """By source: how many rows came from there."""
    row_ids: npt.NDArray[np.int32]
    """By row that came and k: the local id of the expert, or -1."""
    row_weights: npt.NDArray[np.float32] | None
    tokens: npt.NDArray[np.int32]
    """By row that came: its token at its source."""
    major: Major | None
    ids_dtype: torch.dtype
    chosen: npt.NDArray[np.bool_]
    """By token and k: whether the source named an expert."""
    world: int
    max_tokens: int
    number: int
    """The phase that ended its dispatch, the same on all ranks; or that of the last one that brought other weights."""
    session: int
    """The key of the session that it was made in: rows of another layer, or of a former session, lie elsewhere."""
    arriving: npt.NDArray[np.int64]
    """By source: the row at which its rows begin here; other than in `begins`, those that were lost have theirs."""
    lost: tuple[int, ...] = ()

    @property
    def begins(self) -> npt.NDArray[np.int64]:
        """By source: the first of its rows here, and one more at the end."""
        begins = np.zeros(len(self.counts) + 1, np.int64)
        self.counts.cumsum(out=begins[1:])
        return begins

    @property
    def rows(self) -> int:
        """How many rows came."""
        return len(self.row_ids)

    @property
    def slot_rows(self) -> npt.NDArray[np.int32]:
        """By row that came: where it lies among fixed slots."""
        sources = sources_of(self.counts).astype(np.int64)
        rows = sources * self.max_tokens + np.arange(self.rows) - self.begins[sources]
        return rows.astype(np.int32)

    @property
    def is_whole(self) -> bool:
        """Whether every expert that the source named has a holder that got the row."""
        return int(self.chosen.sum()) == int((self.routing.row_ids >= 0).sum())

    @property
    def sources(self) -> Tensor:
        """By row that came: the rank that it came from."""
        import torch

        return torch.from_numpy(sources_of(self.counts))

    def routing_with(self, weights: npt.NDArray[np.float32] | None) -> Routing:
        """Return the routing with these weights [tokens, topk] for the rows to take along."""
        rows = None if weights is None else self.routing.weights_by_row(weights)
        return replace(self.routing, row_weights=rows)

    def plain(self) -> Handle:
        """Return the same layout without weights: combine adds up what it is given."""
        return replace(self, weights=None, row_weights=None)


@dataclass(frozen=True, slots=True, eq=False)
class Dispatched:
    """The rows that came to this rank. `x` is a view of registered memory, which it holds for as long as it lives.

    x: layout "tokens": [rows, hidden], in order of (source, token). "experts": [padded rows, hidden], each local
        expert's rows together, at `offsets`; padding is zero. "slots": [world, max_tokens, hidden], by source.
    scales: float32 [.., hidden / 128] if x came with scales.
    topk_idx: local ids [rows, topk], -1 where the expert is elsewhere or none; "slots": [world, max_tokens, topk].
    topk_weights: float32 of the same form, 0 where there is no id; "experts": [padded rows]. None if none came.
    counts: int64 [local experts], the (row, k) pairs of each.
    sources, tokens: int32 [rows], where each row came from.
    extra: what was sent beside, by row.
    lost: ranks whose rows did not come.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None
    counts: Tensor
    offsets: Tensor | None
    tokens: Tensor
    extra: tuple[Tensor, ...]
    lost: Sequence[int]
    handle: Handle

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from."""
        return self.handle.sources


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """What came back to the source. `topk_weights` [tokens, topk] if weights travelled."""

    out: Tensor
    topk_weights: Tensor | None
    lost: Sequence[int]


def no_handle(ranks: int) -> Handle:
    """Return the handle of nothing, for who takes part in an exchange with nothing."""
    import torch

    none = np.zeros(ranks, np.int64)
    ids = np.zeros((0, 1), np.int32)
    rows = np.zeros(0, np.int32)
    routing = Routing(0, rows, none, np.zeros(ranks + 1, np.int64), np.zeros(1, np.int64), rows, ids, None)
    return Handle(
        "tokens", "holder", 1, routing, None, 0, 1, none, none, none, none, none, ids, None, rows, None, torch.int64,
        np.zeros((0, 1), np.bool_), 1, 1, 0, 0, none,
    )  # fmt: skip


def sources_of(counts: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return the source of each row that came."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

"""Calls on a GPU: one dispatch or combine there, checked as far as that needs no look at bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raynixl.moe.calls import Columns, number_of, with_handle
from raynixl.moe.cuda_frame import fields_at
from raynixl.moe.cuda_need import Need
from raynixl.moe.cuda_result import CudaHandle
from raynixl.moe.cuda_structs import NOWHERE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where the fields of a row lie."""

    columns_at: tuple[int, ...]
    ids_at: int
    weights_at: int
    token_at: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CudaDispatchCall:
    """One dispatch, checked. `columns` are x, its scales if any, and what is sent beside."""

    columns: tuple[Columns, ...]
    has_scales: bool
    tokens: int
    ids: Tensor | None
    """int32 or int64 [tokens, topk], contiguous; None for who takes part with nothing."""
    weights: Tensor | None
    """float32 [tokens, topk], contiguous."""
    handle: CudaHandle | None
    layout: str
    alignment: int
    weights_at: str
    has_other_weights: bool = False
    """Whether it has a handle, and other weights than that."""
    waited: Tensor | None = None
    """float64 by rank, contiguous: the seconds are added that we wait for it."""

    @property
    def sends_weights(self) -> bool:
        """Whether weights travel with the rows."""
        return self.weights is not None and self.weights_at == "holder"

    def plan(self, topk: int) -> RowPlan:
        """Return how a row is made up."""
        ids_nbytes = 4 * topk
        fields = [column.nbytes for column in self.columns]
        starts, nbytes = fields_at([*fields, ids_nbytes, ids_nbytes * self.sends_weights, 4])
        *columns, ids, weights, token = starts
        return RowPlan(tuple(columns), ids, weights if self.sends_weights else NOWHERE, token, nbytes)

    def need(self, topk: int, experts: int) -> Need:
        """Return what it wants of windows."""
        return Need(row_nbytes=self.plan(topk).nbytes, experts=experts)

    def signature(self, placement: int) -> int:
        """Return what must be alike on all ranks, as a number."""
        kinds = tuple((column.tensor.dtype, column.tensor.shape[1:]) for column in self.columns)
        assert self.ids is not None
        same = number_of((
            "cuda dispatch", kinds, self.ids.dtype, self.sends_weights, self.handle is None, self.layout,
            self.alignment, self.weights_at, placement,
        ))  # fmt: skip
        return same if self.handle is None else with_handle(same, self.handle)

    def kept(self) -> CudaDispatchCall:
        """Return what a handle keeps of it."""
        return replace(self, columns=(), handle=None, waited=None)


@dataclass(frozen=True, slots=True, eq=False)
class CudaCombineCall:
    """One combine, checked: y as layout and weights of the handle want it."""

    y: Tensor | None
    """None for who takes part with nothing."""
    handle: CudaHandle | None
    weights: Tensor | None
    biases: tuple[Tensor, ...]
    out: Tensor | None
    """Where the sums go, if the caller says so."""
    is_summed: bool
    waited: Tensor | None = None
    """float64 by rank, contiguous: the seconds are added that we wait for it."""

    @property
    def by_pair(self) -> bool:
        """Whether pairs go back, rather than rows."""
        return self.handle is not None and self.handle.weights_at == "source"

    def items(self) -> tuple[int, int]:
        """Return where what travels beside begins in an item that goes back, and how long an item is."""
        if self.y is None or self.handle is None:
            return NOWHERE, 16
        hidden_nbytes = self.y.shape[-1] * self.y.element_size()
        if self.weights is None:
            return NOWHERE, fields_at([hidden_nbytes])[1]
        (_, beside), nbytes = fields_at([hidden_nbytes, 4 if self.by_pair else 4 * self.handle.topk])
        return beside, nbytes

    def need(self, capacity: int, topk: int) -> Need:
        """Return what it wants of windows."""
        return Need(item_nbytes=self.items()[1], items=capacity * (topk if self.by_pair else 1))

    def signature(self) -> int:
        """Return what must be alike on all ranks, as a number."""
        handle = self.handle
        assert handle is not None
        assert self.y is not None
        same = number_of((
            "cuda combine", self.y.dtype, self.y.shape[-1], handle.layout, handle.weights_at, handle.alignment,
            handle.placement, self.weights is None, self.is_summed,
        ))  # fmt: skip
        return with_handle(same, handle)

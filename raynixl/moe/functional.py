"""Dispatch and combine as functions that autograd goes back through: each one's gradient is the other.

    r = moe.dispatch(ep, x, topk_idx, topk_weights, layout="experts")
    y = run_experts(r.x, r.counts)
    out = moe.combine(ep, y, r.handle)
    loss(out).backward()

**Backward is collective, as forward is.** All ranks of `ep` call dispatch and combine alike, and all of them run
backward; autograd then comes to the combines and dispatches in the reverse order on every rank. It does so on the
thread that called backward (on a GPU: autograd's own), one operation after the other, so each rank is a process of its
own, or at least a thread with an agent of its own. With gradients enabled each combine and each dispatch takes part in
backward whatever requires a gradient on this rank: a rank without tokens, or without rows, does not keep the others
waiting. What it must do itself: its loss depends on what its last combine returned, if only as `out.sum() * 0`, and it
calls `backward()`, not `torch.autograd.grad` of a few inputs, which leaves out what these do not need.

In dtypes of at most 32 bits each gradient is summed in float32 and rounded once, as the values are. With
`weights_at="source"` and layout "experts" it has the same bits for any number of ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raynixl.errors import ConfigError
from raynixl.moe.local import expert_places

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from raynixl.moe.local import LocalParallel
    from raynixl.moe.parallel import ExpertParallel
    from raynixl.moe.result import Dispatched

    Parallel: TypeAlias = ExpertParallel | LocalParallel

_LAYOUTS = ("tokens", "experts")


@dataclass(frozen=True, slots=True, eq=False)
class TracedHandle:
    """A dispatch's handle, and what its combine needs to find the way back."""

    handle: Any
    layout: str
    alignment: int
    weights_at: str
    given: Tensor | None
    """The weights of this rank's own tokens."""
    topk_idx: Tensor
    """The local ids of this rank's rows."""
    places: Tensor
    """Where each pair of (topk_idx >= 0).nonzero() lies in r.x and y."""
    weights: Tensor | None
    """r.topk_weights, with their gradients."""
    link: Tensor
    """Ties combine to dispatch in the graph, and brings it the gradients of weights that stayed at the source."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """By source: how many rows came from there."""
        counts: npt.NDArray[np.int64] = self.handle.counts
        return counts

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from."""
        sources: Tensor = self.handle.sources
        return sources


def dispatch(
    ep: Parallel,
    x: Tensor,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    *,
    handle: Any = None,
    layout: str | None = None,
    alignment: int | None = None,
    weights_at: str | None = None,
) -> Dispatched:
    """Dispatch as `ep.dispatch` does; gradients of r.x and r.topk_weights come back to x and topk_weights.

    The result is that of `ep.dispatch`, whose handle is for `combine` of this module. With `handle`, of an earlier
    dispatch by this module, rows go the same way; without weights of their own they have that one's, as constants.

    Raises:
        ConfigError: x are quantised rows with scales, the layout has no gradient, or the handle is none of this module.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ConfigError("rows in eight bits have no gradient", hint="call ep.dispatch, or give x in a floating dtype")
    earlier = None if handle is None else _traced(handle)
    layout = (earlier.layout if earlier else "tokens") if layout is None else layout
    alignment = (earlier.alignment if earlier else 1) if alignment is None else alignment
    weights_at = (earlier.weights_at if earlier else "holder") if weights_at is None else weights_at
    if layout not in _LAYOUTS:
        raise ConfigError(f"layout {layout!r} has no gradient", hint=f"known here are {', '.join(_LAYOUTS)}")
    given = topk_weights.detach() if topk_weights is not None else earlier.given if earlier else None
    call = _Call(ep, topk_idx, earlier.handle if earlier else None, layout, alignment, weights_at)
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    rows, weights, link = cast(Any, _Dispatch).apply(anchor, x, topk_weights, call)
    r = call.result
    places = _places(r, layout)
    traced = TracedHandle(r.handle, layout, alignment, weights_at, given, r.topk_idx, places, weights, link)
    result: Dispatched = dataclasses.replace(r, x=rows, topk_weights=weights, handle=cast(Any, traced))
    return result


def combine(ep: Parallel, y: Tensor, handle: Any) -> Tensor:
    """Combine as `ep.combine` does; the gradient comes back to y, and to the weights where combine multiplies by them.

    In layout "tokens" with weights at the holder these are the caller's to use, as r.topk_weights.
    """
    handle = _traced(handle)
    weights = handle.weights if handle.layout == "experts" else None
    out: Tensor = cast(Any, _Combine).apply(handle.link, y, weights, ep, handle)
    return out


@dataclass(slots=True, eq=False)
class _Call:
    """One call of dispatch: what is no tensor of autograd's, on its way in and out."""

    ep: Parallel
    topk_idx: Tensor | None
    handle: Any
    layout: str
    alignment: int
    weights_at: str
    result: Any = None


class _Dispatch(torch.autograd.Function):
    """Rows go to holders; their gradients come back and are summed, and those of the weights with them."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, topk_weights: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        r = call.result = call.ep.dispatch(
            x, call.topk_idx, topk_weights,
            handle=call.handle, layout=call.layout, alignment=call.alignment, weights_at=call.weights_at,
        )  # fmt: skip
        ctx.ep, ctx.handle, ctx.topk_idx, ctx.places = call.ep, r.handle, r.topk_idx, _places(r, call.layout)
        ctx.by_row = call.layout == "tokens" and call.weights_at == "source"
        ctx.weights_dtype = None if topk_weights is None else topk_weights.dtype
        link = x.new_zeros(r.topk_idx.shape, dtype=torch.float32)
        weights = None if r.topk_weights is None else r.topk_weights.detach()
        return r.x.detach(), weights, link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dweights: Tensor | None, dlink: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.by_row:
            dx = _at_first_pairs(dx, ctx.topk_idx)
        plain = ctx.handle.plain()
        if ctx.weights_dtype is None:
            return None, ctx.ep.combine(dx, plain), None, None
        if dweights is not None:
            of_pairs = dweights if dweights.ndim == 2 else _by_row(dweights, ctx.topk_idx, ctx.places)
            dlink = torch.where(ctx.topk_idx >= 0, of_pairs, 0)  # elsewhere a weight is zero, and stays so
        total, back = ctx.ep.combine_weights(dx.contiguous(), dlink.contiguous(), plain)
        return None, total, back.to(ctx.weights_dtype), None


class _Combine(torch.autograd.Function):
    """Sums go home; their gradients are dispatched to the rows that were summed."""

    @staticmethod
    def forward(
        ctx: Any, link: Tensor, y: Tensor, weights: Tensor | None, ep: Parallel, handle: TracedHandle
    ) -> Tensor:
        ctx.ep, ctx.handle, ctx.dtype = ep, dataclasses.replace(handle, weights=None, link=link.detach()), y.dtype
        ctx.at_source = handle.weights_at == "source" and handle.given is not None
        ctx.save_for_backward(y if ctx.at_source or weights is not None else None, weights)
        out: Tensor = ep.combine(y, handle.handle)
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        handle: TracedHandle = ctx.handle
        r = ctx.ep.dispatch(
            g.contiguous(), topk_weights=handle.given if ctx.at_source else None, handle=handle.handle,
            layout=handle.layout, alignment=handle.alignment, weights_at="holder",
        )  # fmt: skip
        rows = r.x
        if handle.weights_at == "source" and handle.layout == "tokens":
            row, k = (handle.topk_idx >= 0).nonzero(as_tuple=True)
            rows, weights = r.x[row], r.topk_weights[row, k] if ctx.at_source else None
        elif ctx.at_source:
            weights = r.topk_weights
        if weights is None:
            return torch.zeros_like(handle.link), rows.to(ctx.dtype), None, None, None
        dy, dweights = _times(rows, weights, y)
        if ctx.at_source:
            return _by_row(dweights, handle.topk_idx, handle.places), dy, None, None, None
        return torch.zeros_like(handle.link), dy, dweights, None, None


def _traced(handle: Any) -> TracedHandle:
    if not isinstance(handle, TracedHandle):
        raise ConfigError(f"{handle!r:.80} has no gradient", hint="give the handle of raynixl.moe.dispatch")
    return handle


def _times(rows: Tensor, weights: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and of its rows' weights, where `rows` are the gradients of weights times y."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows = rows.to(wide)
    return (weights[:, None].to(wide) * rows).to(y.dtype), (rows * y.to(wide)).sum(1).float()


def _places(r: Any, layout: str) -> Tensor:
    """Return where each pair lies among r.x; for layout "tokens" where it lies among all pairs."""
    if layout == "experts":
        return expert_places(r.topk_idx, r.offsets)
    return torch.arange(int((r.topk_idx >= 0).sum()), device=r.topk_idx.device)


def _by_row(of_pairs: Tensor, topk_idx: Tensor, places: Tensor) -> Tensor:
    """Return one number for each pair as [rows, topk], zero where there is no pair."""
    table = of_pairs.new_zeros(topk_idx.shape)
    table[topk_idx >= 0] = of_pairs[places]
    return table


def _at_first_pairs(rows: Tensor, topk_idx: Tensor) -> Tensor:
    """Return rows as pairs that add up to them: each row's first pair has it, the others are zero."""
    present = topk_idx >= 0
    first = present & (present.cumsum(1) == 1)
    pairs = rows.new_zeros((int(present.sum()), rows.shape[1]))
    pairs[first[present]] = rows
    return pairs

"""The low-latency mode on tensors of a GPU: the same results, put on the current stream; the host takes no part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.events import EventHandle, EventOverlap
from raynixl.compat.deep_ep.layout import counted
from raynixl.compat.deep_ep.packing import COUNT_BITS, Form
from raynixl.compat.deep_ep.utils import pack_scales
from raynixl.errors import ConfigError

if TYPE_CHECKING:
    from raynixl.moe.result import Dispatched


def left(gpu: int, is_async: bool, has_hook: bool) -> tuple[EventOverlap, Callable[[], None] | None]:
    """Return the event and the hook of an operation that is on the stream: there is nothing left for the hook."""
    event = EventOverlap(EventHandle(gpu=gpu)) if is_async else EventOverlap()
    return event, (lambda: None) if has_hook else None


class PackedRows:
    """Rows by expert, then source, then token, in a fixed block for each expert; and the handle that goes with them."""

    def __init__(self, arrived: Dispatched, form: Form, *, experts: int, most: int, world: int) -> None:
        room = most * world
        ids = arrived.topk_idx.flatten().long()
        place, self._order = _places(ids, experts, room)
        counts = counted(ids, experts)
        rows = self._order // arrived.topk_idx.shape[-1]
        self.x = _spread(arrived.x.flatten(0, 1), rows, place, (experts, room))
        self.counts = counts.int()
        self.src_info = _spread(arrived.tokens.flatten()[:, None], rows, place, (experts, room))[..., 0]
        self.scales = (
            None if arrived.scales is None else self._scales(arrived.scales, form, rows, place, (experts, room))
        )
        by_source = counted(torch.where(ids >= 0, ids * world + _sources(arrived, ids), -1), experts * world)
        by_source = by_source.view(experts, world)
        self.layout_range = by_source.cumsum(1) - by_source << COUNT_BITS | by_source
        self.handle = self._placed(arrived.handle, place, experts * room)

    def _scales(self, scales: Tensor, form: Form, rows: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
        found = scales.flatten(0, 1)
        if form.scales_dtype == torch.int32:
            found = pack_scales(found)
        return _spread(found, rows, place, shape).transpose(1, 2).contiguous().transpose(1, 2)

    def _placed(self, handle: Any, place: Tensor, count: int) -> Any:
        """Return the handle for a y whose pairs lie at their places."""
        positions = torch.empty_like(place, dtype=torch.int32)
        positions[self._order] = torch.where(place < count, place, -1).int()
        call = replace(handle.call, layout="experts")
        return replace(
            handle, call=call, positions=positions.view(handle.row_ids.shape), padded=count, is_packed=False, loads=None
        )


def weights_of(topk_idx: Tensor, topk_weights: Tensor, dispatched: Tensor) -> Tensor:
    """Return the weights of a combine; those of pairs that the caller has taken out since are 0."""
    if topk_idx.shape != dispatched.shape or topk_weights.shape != dispatched.shape:
        raise ConfigError("topk_idx or topk_weights are not those of the dispatch", hint="give the same ids")
    return topk_weights.detach().float().masked_fill(topk_idx != dispatched, 0).contiguous()


def _places(ids: Tensor, experts: int, room: int) -> tuple[Tensor, Tensor]:
    """Return where each pair goes, by expert and then in order, and which pair that is; behind all if it has none."""
    known = torch.where(ids >= 0, ids, experts)
    order = torch.argsort(known, stable=True)
    counts = counted(ids, experts + 1)
    counts[experts] = 0
    starts = counts.cumsum(0) - counts
    sorted_ids = known[order]
    inside = torch.arange(len(ids), device=ids.device) - starts[sorted_ids]
    is_there = (sorted_ids < experts) & (inside < room)
    return torch.where(is_there, sorted_ids * room + inside, experts * room), order


def _spread(rows: Tensor, which: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return rows at their places; one more place takes those that have none."""
    made = torch.empty((shape[0] * shape[1] + 1, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    made.view(torch.uint8)[place] = rows.contiguous().view(torch.uint8)[which]
    return made[:-1].view(*shape, rows.shape[1])


def _sources(arrived: Dispatched, ids: Tensor) -> Tensor:
    world, most, topk = arrived.topk_idx.shape
    return torch.arange(world, device=ids.device).repeat_interleave(most * topk)

"""The low-latency mode on tensors of a GPU: the same results, put on the current stream; the host takes no part, unless
rows have to go through its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from raynixl.compat.deep_ep.events import EventHandle, EventOverlap
from raynixl.compat.deep_ep.layout import counted, rows_by_source, sources_of
from raynixl.compat.deep_ep.packing import COUNT_BITS, Form
from raynixl.compat.deep_ep.utils import pack_scales, quantise
from raynixl.compat.deep_ep.worst import pair_places, taken
from raynixl.errors import ConfigError
from raynixl.moe import cuda_device

if TYPE_CHECKING:
    from raynixl.compat.deep_ep.instances import Instances
    from raynixl.moe.result import Dispatched

_NANOSECONDS: Final = 1e9


def left(gpu: int, is_async: bool, has_hook: bool) -> tuple[EventOverlap, Callable[[], None] | None]:
    """Return the event and the hook of an operation that is on the stream: there is nothing left for the hook."""
    event = EventOverlap(EventHandle(gpu=gpu)) if is_async else EventOverlap()
    return event, (lambda: None) if has_hook else None


@dataclass(frozen=True, slots=True, eq=False)
class Waited:
    """Where a step adds how long it waited for each rank, if somebody wants to know."""

    stats: Tensor | None
    """int64 [ranks], nanoseconds."""
    seconds: Tensor | None
    """float64 [ranks]."""

    @classmethod
    def of(cls, stats: Tensor | None, world: int) -> Waited:
        """Return that of a step, beginning with nothing."""
        return cls(stats, None if stats is None else torch.zeros(world, dtype=torch.float64, device=stats.device))

    def add(self) -> None:
        """Add what the step has added, behind it."""
        if self.stats is not None and self.seconds is not None:
            self.stats.add_((self.seconds * _NANOSECONDS).long())


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a dispatch is given."""

    x: Tensor
    topk_idx: Tensor
    form: Form
    local_experts: int
    round_scale: bool

    def dispatch(self, instances: Instances, parallel: Any, number: int, waited: Waited) -> Packed:
        """Send the rows, and return them packed: by kernels, or through memory of the host where these do not reach."""
        rows = quantise(self.x, round_scale=self.round_scale) if self.form.scales else self.x.detach()
        is_direct = instances.is_direct(parallel, number)
        layout, kind = ("slots", PackedRows) if is_direct else ("experts", StagedRows)
        arrived = instances.done(
            parallel,
            lambda: parallel.dispatch(rows, self.topk_idx, layout=layout, weights_at="source", waited=waited.seconds),
        )
        waited.add()
        room = Room(self.local_experts, parallel.max_tokens * parallel.world, parallel.world)
        made: Packed = kind(arrived, self.form, room)
        return made


@dataclass(frozen=True, slots=True)
class Room:
    """How many experts there are here, how many rows each has room for, and how many ranks these may come from."""

    experts: int
    places: int
    world: int


class Packed(Protocol):
    """Rows by expert, then source, then token, in a fixed block for each expert."""

    x: Tensor
    scales: Tensor | None
    counts: Tensor
    src_info: Tensor
    layout_range: Tensor

    def given_back(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """Return rows [experts * places, hidden] as combine takes them, and the handle for these weights."""


class PackedRows:
    """`Packed`, of rows that came in fixed places; nobody waits for the GPU."""

    def __init__(self, arrived: Dispatched, form: Form, room: Room) -> None:
        experts, world, shape = room.experts, room.world, (room.experts, room.places)
        ids = arrived.topk_idx.flatten().long()
        place, self._order = _places(ids, experts, room.places)
        rows = self._order // arrived.topk_idx.shape[-1]
        self.x = _spread(arrived.x.flatten(0, 1), rows, place, shape)
        self.counts = counted(ids, experts).int()
        self.src_info = _spread(arrived.tokens.flatten()[:, None], rows, place, shape)[..., 0]
        self.scales = None
        if arrived.scales is not None:
            found = _form_of(arrived.scales.flatten(0, 1), form)
            self.scales = _by_column(_spread(found, rows, place, shape))
        by_source = torch.where(ids >= 0, ids * world + _sources(arrived, ids), -1)
        self.layout_range = _ranges(counted(by_source, experts * world).view(experts, world))
        self._handle = self._placed(arrived.handle, place, experts * room.places)

    def given_back(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """See `Packed`."""
        return rows, replace(self._handle, call=replace(self._handle.call, weights=weights))

    def _placed(self, handle: Any, place: Tensor, count: int) -> Any:
        """Return the handle for a y whose pairs lie at their places."""
        positions = torch.empty_like(place, dtype=torch.int32)
        positions[self._order] = torch.where(place < count, place, -1).int()
        call = replace(handle.call, layout="experts")
        return replace(
            handle, call=call, positions=positions.view(handle.row_ids.shape), padded=count, is_packed=False, loads=None
        )


class StagedRows:
    """`Packed`, of rows that came by expert, through memory of the host."""

    def __init__(self, arrived: Dispatched, form: Form, room: Room) -> None:
        assert arrived.offsets is not None
        experts, places, world = room.experts, room.places, room.world
        inside = torch.arange(places, device=arrived.x.device)
        which = torch.where(inside < arrived.counts[:, None], arrived.offsets[:-1, None] + inside, -1).flatten()
        ids, topk = arrived.topk_idx, arrived.topk_idx.shape[1]
        sources = sources_of(rows_by_source(arrived, world), len(ids))
        pair_of = torch.full((len(arrived.x) + 1,), -1, dtype=torch.int64, device=ids.device)
        at = pair_places(ids, arrived.offsets)
        pair_of[torch.where(at >= 0, at, len(arrived.x))] = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        row = torch.div(taken(pair_of[:-1], which, blank=-1), topk, rounding_mode="floor")
        self.x = taken(arrived.x, which).view(experts, places, -1)
        self.counts = arrived.counts.int()
        self.src_info = taken(arrived.tokens, row, blank=-1).view(experts, places)
        self.scales = None
        if arrived.scales is not None:
            self.scales = _by_column(taken(_form_of(arrived.scales, form), which).view(experts, places, -1))
        by_source = torch.where(ids >= 0, ids.long() * world + sources[:, None], -1).flatten()
        self.layout_range = _ranges(counted(by_source, experts * world).view(experts, world))
        self._handle: Any = arrived.handle
        self._back = torch.full((len(arrived.x) + 1,), -1, dtype=torch.int64, device=ids.device)
        self._back[torch.where(which >= 0, which, len(arrived.x))] = torch.arange(len(which), device=ids.device)

    def given_back(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """See `Packed`."""
        number = cuda_device.gpu_of(rows)
        assert number is not None
        fetched = cuda_device.gpu(number).fetch(weights).numpy()
        return taken(rows, self._back[:-1]), replace(self._handle, host=replace(self._handle.host, weights=fetched))


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


def _form_of(scales: Tensor, form: Form) -> Tensor:
    return pack_scales(scales) if form.scales_dtype == torch.int32 else scales


def _by_column(scales: Tensor) -> Tensor:
    """Return the same in column-major memory."""
    return scales.transpose(1, 2).contiguous().transpose(1, 2)


def _ranges(by_source: Tensor) -> Tensor:
    """Return by expert and source where its rows begin, and how many they are, in one number."""
    return by_source.cumsum(1) - by_source << COUNT_BITS | by_source


def _sources(arrived: Dispatched, ids: Tensor) -> Tensor:
    world, most, topk = arrived.topk_idx.shape
    return torch.arange(world, device=ids.device)[:, None].expand(world, most * topk).flatten()

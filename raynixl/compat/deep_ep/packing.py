"""Packing: rows by source turned into DeepEP's low-latency form, a fixed block for each local expert."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raynixl.compat.deep_ep.utils import pack_scales
from raynixl.errors import RangeError
from raynixl.moe.major import Major, expert_major

if TYPE_CHECKING:
    from raynixl.compat.deep_ep.reuse import Reuse

COUNT_BITS = 32


@dataclass(frozen=True, slots=True)
class Form:
    """How rows come: their dtype, and their scales, float32 for each 128 columns or int32 of four exponents."""

    dtype: torch.dtype
    scales: int = 0
    scales_dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The tensors that low_latency_dispatch returns. With a hook they are undefined until it is called."""

    x: Tensor
    scales: Tensor | None
    """The view [experts, places, scales] of column-major memory."""
    counts: Tensor
    src_info: Tensor
    layout_range: Tensor

    @staticmethod
    def empty(form: Form, memory: Reuse, *, experts: int, places: int, hidden: int, world: int) -> Packed:
        """Return room for `places` rows for each expert."""
        scales = None
        if form.scales:
            scales = memory.tensor(form.scales_dtype, (experts, form.scales, places)).transpose(1, 2)
        return Packed(
            memory.tensor(form.dtype, (experts, places, hidden)),
            scales,
            torch.zeros(experts, dtype=torch.int32),
            torch.empty((experts, places), dtype=torch.int32),
            torch.zeros((experts, world), dtype=torch.int64),
        )


def pack(arrived: Any, into: Packed, native: Any) -> Any:
    """Copy the rows of a dispatch in layout "slots" to their places: by expert, then source, then token.

    Returns the dispatch's handle for a combine of rows in these places.

    Raises:
        RangeError: more rows for one expert than it has places: tokens name it twice.
    """
    handle = arrived.handle
    experts, room, hidden = into.x.shape
    major = expert_major(handle.row_ids, experts)
    counts, starts = major.counts, major.offsets
    if counts.max(initial=0) > room:
        raise RangeError(
            f"{counts.max()} rows for one expert where there is room for {room}", hint="name an expert once for a token"
        )
    owners = np.repeat(np.arange(experts), counts)
    places = np.arange(len(owners)) + (np.arange(experts) * room - starts[:-1])[owners]
    _copy(arrived.x.reshape(-1, hidden), handle.slot_rows[major.rows], into.x, starts.tolist(), native)
    into.src_info.view(-1).numpy()[places] = handle.tokens[major.rows]
    if into.scales is not None:
        _scatter(
            arrived.scales.reshape(-1, arrived.scales.shape[-1]), handle.slot_rows[major.rows], into.scales, places
        )
    world = into.layout_range.shape[1]
    by_source = np.bincount(owners * world + arrived.sources.numpy()[major.rows], minlength=experts * world)
    by_source = by_source.reshape(experts, world)
    begins = by_source.cumsum(1) - by_source
    into.layout_range.numpy()[:] = begins << COUNT_BITS | by_source
    into.counts.numpy()[:] = counts
    return _placed(handle, major, places, experts * room)


def _copy(rows: Tensor, index: Any, into: Tensor, starts: list[int], native: Any) -> None:
    nbytes = rows.shape[1] * rows.element_size()
    stride = rows.stride(0) * rows.element_size()
    target, block = into.data_ptr(), into.shape[1] * nbytes
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            part = index[start:end]
            native.put_rows(rows.data_ptr(), stride, nbytes, part, target + expert * block, (), end - start)


def _scatter(scales: Tensor, index: Any, into: Tensor, places: Any) -> None:
    found = scales[torch.from_numpy(index).long()]
    if into.dtype == torch.int32:
        found = pack_scales(found)
    room = into.shape[1]
    into.transpose(1, 2).numpy()[places // room, :, places % room] = found.numpy()


def _placed(handle: Any, major: Major, places: Any, count: int) -> Any:
    """Return the handle for a y whose pairs lie at their places among `count` rows."""
    positions = places[major.positions].astype(np.int32)
    blank = np.broadcast_to(np.int32(-1), (count,))
    at_places = dataclasses.replace(major, rows=blank, slots_k=blank, positions=positions)
    return dataclasses.replace(handle, layout="experts", major=at_places)

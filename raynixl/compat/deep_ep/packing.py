"""Packing: rows by source turned into DeepEP's low-latency form, a fixed block for each local expert, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.utils import pack_scales
from raynixl.errors import RangeError

COUNT_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The tensors that low_latency_dispatch returns. With a hook they are empty until it is called."""

    x: Tensor
    scales: Tensor | None
    """The view [experts, places, scales] of column-major memory."""
    counts: Tensor
    src_info: Tensor
    layout_range: Tensor

    @staticmethod
    def empty(experts: int, places: int, *, world: int, hidden: int, dtype: torch.dtype, scales: Form | None) -> Packed:
        """Return room for `places` rows for each expert."""
        room = None
        if scales is not None:
            room = torch.empty((experts, scales.width, places), dtype=scales.dtype).transpose(1, 2)
        return Packed(
            torch.empty((experts, places, hidden), dtype=dtype),
            room,
            torch.zeros(experts, dtype=torch.int32),
            torch.empty((experts, places), dtype=torch.int32),
            torch.zeros((experts, world), dtype=torch.int64),
        )


@dataclass(frozen=True, slots=True)
class Form:
    """How scales come: float32, one for 128 columns, or int32 of four exponents."""

    width: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where each pair of a dispatch in layout "slots" lies: by expert, then source, then token, then k."""

    rows: Tensor
    """By pair in packed order: its row among the slots."""
    experts: Tensor
    """By expert: how many pairs."""
    by_source: Tensor
    """By expert and source: how many pairs."""
    places: Tensor
    """By pair in the order of (ids >= 0).nonzero(): its place among the packed rows."""


def place(ids: Tensor, experts: int, places: int) -> Places:
    """Work out the places of ids [world, max_tokens, topk].

    Raises:
        RangeError: more pairs than `places` for one expert: tokens name it twice.
    """
    world, tokens, topk = ids.shape
    pairs = (ids.reshape(-1) >= 0).nonzero().squeeze(1)
    named = ids.reshape(-1)[pairs].long()
    order = torch.argsort(named, stable=True)
    counts = torch.bincount(named, minlength=experts)
    if counts.numel() and int(counts.max()) > places:
        raise RangeError(
            f"{int(counts.max())} rows for one expert where there is room for {places}",
            hint="name an expert once for a token",
        )
    firsts = counts.cumsum(0) - counts
    within = torch.arange(len(pairs)) - firsts.repeat_interleave(counts)
    packed = torch.empty_like(named)
    packed[order] = torch.arange(experts).repeat_interleave(counts) * places + within
    by_source = torch.bincount(named * world + pairs // (tokens * topk), minlength=experts * world)
    return Places(pairs[order] // topk, counts, by_source.view(experts, world), packed)


def pack(arrived: Any, into: Packed) -> Places:
    """Copy the rows of a dispatch in layout "slots" to their places."""
    experts, room, hidden = into.x.shape
    found = place(arrived.topk_idx, experts, room)
    tokens = _tokens(arrived)
    scales = arrived.scales
    if scales is not None and into.scales is not None:
        scales = pack_scales(scales) if into.scales.dtype == torch.int32 else scales
        scales = scales.reshape(-1, scales.shape[-1])
    rows, end = as_words(arrived.x.reshape(-1, hidden)), 0
    packed = as_words(into.x)
    for expert, count in enumerate(found.experts.tolist()):
        start, end = end, end + count
        if not count:
            continue
        index = found.rows[start:end]
        torch.index_select(rows, 0, index, out=packed[expert, :count])
        into.src_info[expert, :count] = tokens[index]
        if scales is not None and into.scales is not None:
            into.scales[expert, :count] = scales[index]
    into.counts.copy_(found.experts)
    begins = found.by_source.cumsum(1) - found.by_source
    into.layout_range.copy_(begins << COUNT_BITS | found.by_source)
    return found


def as_words(rows: Tensor) -> Tensor:
    """Return rows as integers as wide as they allow: copying needs no more, and keeps every bit of a NaN."""
    nbytes = rows.shape[-1] * rows.element_size()
    return rows.view(torch.int64 if nbytes % 8 == 0 else torch.uint8)


def _tokens(arrived: Any) -> Tensor:
    """Return by row of the slots which token of its source it is, 0 where there is none."""
    world, room, _ = arrived.topk_idx.shape
    sources = arrived.sources.long()
    counts = torch.bincount(sources, minlength=world)
    within = torch.arange(len(sources)) - (counts.cumsum(0) - counts)[sources]
    tokens = torch.zeros(world * room, dtype=torch.int32)
    tokens[sources * room + within] = arrived.tokens
    return tokens

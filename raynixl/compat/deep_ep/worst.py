"""The worst case: rows on a GPU side by side, with room for all that can come, since no host hears how many do.

They come in fixed places of their sources (layout "slots"), which takes no host, and are put together by torch there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from raynixl.compat.deep_ep.layout import counted, rows_by_source, sources_of

if TYPE_CHECKING:
    from raynixl.moe.cuda_result import CudaHandle
    from raynixl.moe.result import Dispatched


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Where the rows of one dispatch lie: in the order of (source, token), then what no row has come to."""

    places: Tensor
    """int64 [room]: the fixed place of each row; -1 beyond them."""
    handle: CudaHandle
    """Of the rows in their fixed places: a dispatch by it needs no host, either."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is on a GPU beside what its handle has."""
        return (self.places,)

    @classmethod
    def of(cls, arrived: Dispatched, room: int) -> SideBySide:
        """Return that of a dispatch in layout "slots", for so many rows at most; those beyond are left out."""
        world, most, _ = arrived.topk_idx.shape
        counts = rows_by_source(arrived, world)
        ends, rows = counts.cumsum(0), torch.arange(room, device=counts.device)
        sources = sources_of(counts, room)
        known = sources.clamp(max=world - 1)
        places = known * most + rows - (ends - counts)[known]
        return cls(torch.where(sources < world, places, -1), cast(Any, arrived.handle))

    def taken(self, arrived: Dispatched) -> Dispatched:
        """Return the rows of this dispatch, or of one by its handle, side by side; beyond them ids are -1, others 0."""
        weights, scales, places = arrived.topk_weights, arrived.scales, came(arrived, self.places)
        handle = cast(Any, self._packed(self.handle))
        return replace(
            arrived, x=taken(arrived.x.flatten(0, 1), places),
            scales=None if scales is None else taken(scales.flatten(0, 1), places),
            topk_idx=taken(arrived.topk_idx.flatten(0, 1), places, blank=-1),
            topk_weights=None if weights is None else taken(weights.flatten(0, 1), places),
            tokens=taken(arrived.tokens.flatten(), places, blank=-1), handle=handle,
        )  # fmt: skip

    def numbers(self, numbers: Tensor) -> Tensor:
        """Return whole numbers of fixed places [world, tokens, ...] side by side, -1 beyond them."""
        return taken(numbers.reshape(len(self.handle.row_ids), *numbers.shape[2:]), self.places, blank=-1)

    def _packed(self, handle: CudaHandle) -> CudaHandle:
        """Return the handle for a y whose rows lie side by side."""
        call = replace(handle.call, layout="tokens")
        return replace(handle, call=call, row_ids=taken(handle.row_ids, self.places, blank=-1), is_packed=True)


@dataclass(frozen=True, slots=True, eq=False)
class ByExpert:
    """Where the pairs of one dispatch lie: by expert, each one's rows at a multiple of the alignment, then nothing."""

    pairs: Tensor
    """int64 [room]: the number of the pair, its row's fixed place * topk + k; -1 where none lies."""
    handle: CudaHandle
    """For a y whose pairs lie so."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is on a GPU beside what its handle has."""
        return (self.pairs,)

    @classmethod
    def of(cls, side: SideBySide, places: Tensor, room: int) -> ByExpert:
        """Return that of rows side by side whose pairs have these places [rows, topk], -1 for none."""
        handle, topk = side.handle, places.shape[1]
        known = (places >= 0) & (places < room) & (side.places >= 0)[:, None]
        numbers = side.places[:, None] * topk + torch.arange(topk, device=places.device)
        pairs = torch.full((room + 1,), -1, dtype=torch.int64, device=places.device)
        pairs[torch.where(known, places, room)] = numbers
        positions = torch.full((handle.row_ids.numel() + 1,), -1, dtype=torch.int32, device=places.device)
        positions[torch.where(known, numbers, handle.row_ids.numel())] = places.int()
        placed = replace(
            handle, call=replace(handle.call, layout="experts"), positions=positions[:-1].view(handle.row_ids.shape),
            padded=room, is_packed=False, row_weights=None,
        )  # fmt: skip
        return cls(pairs[:room], placed)

    def taken(self, arrived: Dispatched) -> Dispatched:
        """Return the rows of this dispatch, or of one by its handle, by expert; zeros where none lies.

        What came beside them is one number for each k, and lies as weights do: [room], that of the pair.
        """
        places = came(arrived, torch.div(self.pairs, self.handle.topk, rounding_mode="floor"))
        pairs = torch.where(places >= 0, self.pairs, -1)
        weights, scales, handle = arrived.topk_weights, arrived.scales, cast(Any, self.handle)
        return replace(
            arrived, x=taken(arrived.x.flatten(0, 1), places),
            scales=None if scales is None else taken(scales.flatten(0, 1), places),
            topk_weights=None if weights is None else taken(weights.flatten(), pairs),
            extra=tuple(taken(one.flatten(), pairs) for one in arrived.extra), handle=handle,
        )  # fmt: skip


def came(arrived: Dispatched, places: Tensor) -> Tensor:
    """Return fixed places, -1 for those whose rows did not come: of a rank that was lost since places were known."""
    tokens = taken(arrived.tokens.flatten(), places, blank=-1)
    return torch.where(tokens >= 0, places, -1)


def taken(rows: Tensor, which: Tensor, *, blank: int = 0) -> Tensor:
    """Return these rows of a tensor, bit by bit, and blanks where the number is -1. Nobody waits for a GPU."""
    if not len(rows):
        return rows.new_full((len(which), *rows.shape[1:]), blank)
    words = rows if blank else _words(rows)
    found = words.index_select(0, which.clamp(min=0))
    is_there = (which >= 0).view(-1, *[1] * (found.dim() - 1))
    found = torch.where(is_there, found, blank)
    return found if blank else found.view(rows.dtype).view(len(which), *rows.shape[1:])


def at_places(numbers: Tensor, places: Tensor) -> Tensor:
    """Return the number at each place, 0 where the place is -1, in the form of the places."""
    return taken(numbers, places.flatten()).view(places.shape)


def pair_places(ids: Tensor, offsets: Tensor) -> Tensor:
    """Return by row and k where the pair lies by expert, then row, then k, int64; -1 for none. Nobody waits for a GPU.

    ids: local ones [rows, topk]. offsets: int64 [experts + 1], where each expert's pairs begin.
    """
    experts, device = len(offsets) - 1, ids.device
    known = torch.where(ids >= 0, ids, experts).flatten().long()
    order = torch.argsort(known, stable=True)
    counts = counted(known, experts + 1)
    shifts = torch.nn.functional.pad(offsets[:-1], (0, 1)) - (counts.cumsum(0) - counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=device) + shifts[known[order]]
    return torch.where(ids >= 0, places.view(ids.shape), -1)


def _words(rows: Tensor) -> Tensor:
    """Return rows as the widest words that they are made of, [rows, words]: dtypes such as FP8 have no arithmetic."""
    plain = rows.contiguous().view(len(rows), -1).view(torch.uint8)
    wide = plain.shape[1] % 8 == 0 and plain.data_ptr() % 8 == 0
    return plain.view(torch.int64) if wide else plain

"""Fixed slots: rows that came in two stages, laid by source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def places_of(sources: Tensor, most: int) -> Tensor:
    """Return where each row lies among fixed slots of `most` rows a source; each source's rows are in order."""
    order = sources.argsort(stable=True)
    counts = torch.bincount(sources.long())
    begins = counts.cumsum(0) - counts
    places = torch.empty(len(sources), dtype=torch.int64)
    by_source = sources.long()[order]
    places[order] = by_source * most + torch.arange(len(sources)) - begins[by_source]
    return places


def in_slots(rows: Any, places: Tensor, slots: tuple[int, int], filler: int = 0) -> Any:
    """Lay rows in fixed slots, byte for byte."""
    if rows is None:
        return None
    out = torch.full((slots[0] * slots[1], *rows.shape[1:]), filler, dtype=rows.dtype)
    if len(rows):
        out.view(torch.uint8).reshape(len(out), -1)[places] = (
            rows.contiguous().view(torch.uint8).reshape(len(rows), -1)
        )  # fmt: skip
    return out.view(*slots, *rows.shape[1:])


def pairs_of(ids: Tensor, rows: Tensor) -> Tensor:
    """Return by pair, rows as they came, which one of those in order of slots it is."""
    in_order = torch.empty_like(ids)
    in_order[rows] = ids
    numbers = torch.full(ids.shape, -1)
    numbers[in_order] = torch.arange(int(ids.sum()))
    return numbers[rows][ids]

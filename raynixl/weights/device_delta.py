"""Deltas on a device: what changed is found, encoded and written over the old there; blobs are those of `delta`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.native.rows import cut_rows, group_rows
from raynixl.weights.delta import MAX_SHARE, SEGMENT_NBYTES, Segment, malformed, pack_segment, parse
from raynixl.weights.digest import ARENA_BIT

if TYPE_CHECKING:
    import torch

I64 = NDArray[np.int64]

_STRIP_NBYTES = 256 << 20  # compared at a time
_WIDTHS = {
    253: 2,
    254: 4,
    255: 8,
}  # codes of gaps that are not one byte, and the bytes that follow; see native/delta.h
_WORD = 8


class DeviceChanges:
    """The elements in which the arenas of a version differ from those of its base, on one device."""

    def __init__(self, old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
        self._old, self._new = old, new
        self._found: dict[tuple[int, int], torch.Tensor | None] = {}

    def encode(self, rows: I64, itemsize: int, limit: int) -> bytes | None:
        """Return the blob of rows of (offset, arena, nbytes, position), or None beyond `limit` bytes."""
        wide = np.ascontiguousarray(rows[rows[:, 2] > 0]).view(np.uint64)
        cut = cut_rows(wide, SEGMENT_NBYTES, size=2, moving=(0, 3))
        groups = group_rows(cut, SEGMENT_NBYTES, size=2) or [wide]
        made, room = [], limit
        for group in groups:
            segment = self._segment(group.view(np.int64), itemsize, room)
            if segment is None or len(segment) > room:
                return None
            made.append(segment)
            room -= len(segment)
        return b"".join(made)

    def _segment(self, rows: I64, itemsize: int, room: int) -> bytes | None:
        """Return the part of a blob that rows of at most `SEGMENT_NBYTES` make."""
        import torch

        numbers, values = [], []
        for arena in dict.fromkeys(rows[:, 1].tolist()):
            changed = self._changed(arena, itemsize)
            if changed is None:
                return None
            mine = torch.from_numpy(np.ascontiguousarray(rows[rows[:, 1] == arena])).to(changed.device)
            number, place = _within(changed, mine, itemsize)
            numbers.append(number)
            values.append(_items(self._new[arena], itemsize)[place])
        if not numbers:
            return pack_segment(itemsize, b"", b"")
        number, order = torch.cat(numbers).sort()
        if len(number) * (1 + itemsize) > room:
            return None
        gaps = _pack_gaps(torch.diff(number, prepend=number.new_full((1,), -1)) - 1)
        return pack_segment(itemsize, _to_host(gaps), _to_host(torch.cat(values)[order]))

    def _changed(self, arena: int, itemsize: int) -> torch.Tensor | None:
        """Return the numbers of the elements of an arena that differ, ascending; None if they are many."""
        key = arena, itemsize
        if key not in self._found:
            self._found[key] = _unequal(_items(self._old[arena], itemsize), _items(self._new[arena], itemsize))
        return self._found[key]


def _unequal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    import torch

    found = [torch.zeros(0, dtype=torch.int64, device=one.device)]
    step = max(1, _STRIP_NBYTES // (one.element_size() * one[:1].numel() or 1))
    left = int(len(one) * MAX_SHARE)
    for first in range(0, len(one), step):
        unequal = one[first : first + step] != other[first : first + step]
        unequal = unequal if unequal.dim() == 1 else unequal.any(dim=1)
        left -= int(unequal.count_nonzero())
        if left < 0:  # their numbers would take more memory than the weights
            return None
        found.append(unequal.nonzero().flatten() + first)
    return torch.cat(found)


def _items(flat: torch.Tensor, itemsize: int) -> torch.Tensor:
    """Return bytes as elements, of 16 bytes as pairs of words."""
    import torch

    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    items = flat[: flat.numel() // itemsize * itemsize].view(dtypes[itemsize])
    return items.view(-1, itemsize // _WORD) if itemsize > _WORD else items


def _within(changed: torch.Tensor, rows: torch.Tensor, itemsize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions, in elements, of the changed elements in rows, and where they lie in the arena."""
    import torch

    first = rows[:, 0] // itemsize
    low = torch.searchsorted(changed, first)
    counts = torch.searchsorted(changed, first + rows[:, 2] // itemsize) - low
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    index = torch.arange(len(row), device=rows.device) - (torch.cumsum(counts, 0) - counts - low)[row]
    place = changed[index]
    return (rows[:, 3] // itemsize - first)[row] + place, place


def _pack_gaps(gaps: torch.Tensor) -> torch.Tensor:
    import torch

    limits = torch.tensor([253, 1 << 16, 1 << 32], device=gaps.device)
    kind = torch.searchsorted(limits, gaps, right=True)
    sizes = torch.tensor([1, 3, 5, 9], device=gaps.device)[kind]
    starts = torch.cumsum(sizes, 0) - sizes
    packed = torch.zeros(int(sizes.sum()), dtype=torch.uint8, device=gaps.device)
    packed[starts] = torch.where(kind == 0, gaps, kind + 252).to(torch.uint8)
    for number, width in enumerate(_WIDTHS.values(), 1):
        which = kind == number
        at, wide = starts[which], gaps[which]
        for byte in range(width):
            packed[at + 1 + byte] = ((wide >> (8 * byte)) & 255).to(torch.uint8)
    return packed


def _to_host(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def apply_blobs(blob: NDArray[np.uint8], flats: Sequence[torch.Tensor]) -> None:
    """Write what changed over an old version, as `delta.apply` does: the whole blob is checked before.

    Raises:
        IntegrityError: it is malformed, or does not fit the arenas.
    """
    writes = [write for segment in parse(blob) for write in _writes(segment, flats)]
    for items, place, values in writes:
        items[place] = values


def _writes(segment: Segment, flats: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return what a segment writes: elements of arenas, which of them, and their values."""
    import torch

    if not len(segment.values):
        if len(segment.gaps):
            raise _outside()
        return []
    if not flats:
        raise _outside()
    device = flats[0].device
    steps = _unpack_gaps(torch.from_numpy(segment.gaps.copy()).to(device))
    values = _items(torch.from_numpy(segment.values.copy()).to(device), segment.itemsize)
    if steps is None or len(steps) != len(values):
        raise _outside()
    if bool((steps < 0).any()):
        raise _outside()
    numbers = torch.cumsum(steps + 1, 0) - 1
    per_arena = (1 << ARENA_BIT) // segment.itemsize
    is_sane = (numbers >= 0) & (torch.diff(numbers, prepend=numbers.new_full((1,), -1)) > 0)
    arena, place = numbers // per_arena, numbers % per_arena
    sizes = torch.tensor([len(_items(flat, segment.itemsize)) for flat in flats], device=device)
    is_sane &= arena < len(flats)
    is_sane &= place < sizes[arena.clamp(0, len(flats) - 1)]
    if not bool(is_sane.all()):
        raise _outside()
    found = []
    for number in torch.unique(arena).tolist():
        mine = arena == number
        found.append((_items(flats[number], segment.itemsize), place[mine], values[mine]))
    return found


def _unpack_gaps(packed: torch.Tensor) -> torch.Tensor | None:
    """Return the gaps, or None if the last one is cut short.

    Which bytes are codes follows from all before them. It is found in as many rounds as their number has bits: in each,
    codes that are known lead to others twice as far away.
    """
    import torch

    count = len(packed)
    wide = packed.to(torch.int64)
    sizes = torch.tensor([1] * 253 + [3, 5, 9], device=packed.device)[wide]
    ahead = torch.clamp(torch.arange(count, device=packed.device) + sizes, max=count + 9)
    ahead = torch.cat([ahead, torch.arange(count, count + 10, device=packed.device)])
    is_code = torch.zeros(count + 10, dtype=torch.bool, device=packed.device)
    is_code[0] = True
    for _ in range(max(1, count.bit_length())):
        is_code[ahead[is_code.nonzero().flatten()]] = True
        ahead = ahead[ahead]
    if not bool(is_code[count]):
        return None
    at = is_code[:count].nonzero().flatten()
    gaps, kind = wide[at], wide[at]
    for code, width in _WIDTHS.items():
        which = kind == code
        start = at[which] + 1
        gaps[which] = sum((wide[start + byte] << (8 * byte) for byte in range(width)), torch.zeros_like(start))
    return gaps


def _outside() -> Exception:
    return malformed("an element lies outside the image, or its gaps are not whole")

"""Overlap: whether rows lie over each other in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rows_overlap(rows: Tensor) -> bool:
    """Whether rows of one tensor [rows, items], each in one piece, lie over each other."""
    return rows.numel() > 0 and len(rows) > 1 and rows.stride(0) < rows.shape[1]


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of rows, each row in one piece, have bytes in common.

    Rows that lie between each other have none if they come in the same steps; in other steps they count as shared.
    """
    if not one.numel() or not other.numel():
        return False
    (begin, end, step, nbytes), (other_begin, other_end, other_step, other_nbytes) = _rows_of(one), _rows_of(other)
    if end <= other_begin or other_end <= begin:
        return False
    if step != other_step or step == 0:
        return True
    between = (other_begin - begin) % step
    return between < nbytes or between + other_nbytes > step


def _rows_of(rows: Tensor) -> tuple[int, int, int, int]:
    """Return where rows begin and end, in which steps they come, and how long each is, in bytes."""
    items, count = rows.shape[-1], rows.numel() // rows.shape[-1]
    step = rows.stride(-2) * rows.element_size() if rows.dim() > 1 and count > 1 else 0
    begin, nbytes = rows.data_ptr(), items * rows.element_size()
    return begin, begin + (count - 1) * step + nbytes, step, nbytes

"""Needs: what calls want of a window on a GPU, before one is made, or made larger."""

from __future__ import annotations

from dataclasses import dataclass

from raynixl.moe.cuda_frame import Frame, aligned, fields_at


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a row that goes to a holder, bytes and number of what comes back from one, and experts of a rank."""

    row_nbytes: int = 0
    item_nbytes: int = 0
    items: int = 0
    experts: int = 0

    def with_(self, other: Need) -> Need:
        """Return what serves both."""
        return Need(
            max(self.row_nbytes, other.row_nbytes), max(self.item_nbytes, other.item_nbytes),
            max(self.items, other.items), max(self.experts, other.experts),
        )  # fmt: skip

    def is_met_by(self, frame: Frame) -> bool:
        """Whether windows of this frame serve."""
        return (
            self.row_nbytes <= frame.row_nbytes
            and self.item_nbytes <= frame.item_nbytes
            and self.items <= frame.items
            and self.experts <= frame.experts
        )

    def frame(self, ranks: int, capacity: int) -> Frame:
        """Return the frame of windows that serve."""
        return Frame(ranks, capacity, self.row_nbytes, self.item_nbytes, self.items, self.experts)


def usual_need(*, hidden_nbytes: int, columns: int, topk: int, capacity: int, experts: int) -> Need:
    """Return what the usual calls want: rows with ids, weights and scales, and sums or rows that come back."""
    _, row_nbytes = fields_at([hidden_nbytes, 4 * aligned(columns, 128) // 128, 4 * topk, 4 * topk, 4])
    _, item_nbytes = fields_at([hidden_nbytes, 4 * topk])
    return Need(row_nbytes, item_nbytes, capacity, experts)

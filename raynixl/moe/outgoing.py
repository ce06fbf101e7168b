"""Outgoing: what a combine sends back, row by row in the order of the sources that it goes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raynixl.moe.calls import CODES
from raynixl.moe.channel import Rows, Source, address_of

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.landing import Landing
    from raynixl.moe.result import Handle
    from raynixl.moe.slot import Slot

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


def spaced(first: int, count: int, stride: int) -> U64:
    """Return the addresses of so many items, one behind the other."""
    if not stride:
        return np.full(count, first, np.uint64)
    addresses: U64 = np.arange(first, first + count * stride, stride, dtype=np.uint64)
    return addresses


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """Rows (or, with the weights at the source, pairs) by source: item i lies at address + index[i] * stride."""

    address: int
    stride: int
    nbytes: int
    index: npt.NDArray[np.int32] | None
    weights: npt.NDArray[np.float32] | None
    """What goes back beside, by item."""
    counts: I64
    begins: I64
    scratch: Slot | None = None

    def rows(self) -> Rows:
        """Return all items as what may be put."""
        sources = [Source(self.address, self.stride, self.nbytes, self.index)]
        if self.weights is not None:
            nbytes = self.weights.strides[0]
            sources.append(Source(address_of(self.weights), nbytes, nbytes))
        return Rows(sources)

    def addresses(self, rank: int) -> U64:
        """Return where each item that goes to a source lies."""
        begin, end = int(self.begins[rank]), int(self.begins[rank + 1])
        if self.index is None:
            return spaced(self.address + begin * self.stride, end - begin, self.stride)
        return self.address + self.index[begin:end].astype(np.uint64) * np.uint64(self.stride)


def outgoing(landing: Landing, y: Tensor, handle: Handle, weights: Tensor | None) -> Outgoing:
    """Return what goes back of y, which is as layout and weights of the handle want it."""
    by_pair = handle.weights_at == "source"
    begins = handle.begins
    if by_pair:
        begins = np.concatenate([[0], np.cumsum((handle.row_ids >= 0).sum(axis=1))])[begins]
    beside = None if weights is None else _weights(weights, handle, by_pair)
    nbytes = y.shape[-1] * y.element_size()
    stride = y.stride(-2) * y.element_size() if y.numel() else nbytes
    counts = begins[1:] - begins[:-1]
    if handle.layout == "experts":
        assert handle.major is not None
        if by_pair:
            return Outgoing(y.data_ptr(), stride, nbytes, handle.major.positions, beside, counts, begins)
        scratch = _partial_sums(landing, y, handle)
        return Outgoing(scratch.address, nbytes, nbytes, None, beside, counts, begins, scratch)
    index = handle.slot_rows if handle.layout == "slots" and not by_pair else None
    return Outgoing(y.data_ptr(), stride, nbytes, index, beside, counts, begins)


def _partial_sums(landing: Landing, y: Tensor, handle: Handle) -> Slot:
    """Sum each row's pairs, weighted, in k order, and round: what this holder adds to each token."""
    assert handle.major is not None
    session = landing.session
    nbytes = y.shape[-1] * y.element_size()
    slot = session.pool.take(max(1, handle.rows) * nbytes)
    landing.slots[slot.number] = slot
    valid = handle.row_ids >= 0
    starts = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int64)
    stride = y.stride(0) * y.element_size() if y.numel() else nbytes
    rows = y.data_ptr() + handle.major.positions.astype(np.uint64) * np.uint64(stride)
    weights = None if handle.row_weights is None else np.ascontiguousarray(handle.row_weights[valid])
    code = CODES[y.dtype]
    session.agent.native.reduce_rows(
        slot.address, nbytes, code, starts, rows, code, weights, y.shape[-1], np.zeros(0, np.uint64), 0, 0, []
    )
    return slot


def _weights(weights: Tensor, handle: Handle, by_pair: bool) -> npt.NDArray[Any]:
    array = weights.detach().float().contiguous().numpy()
    return np.ascontiguousarray(array[handle.row_ids >= 0][:, None] if by_pair else array)

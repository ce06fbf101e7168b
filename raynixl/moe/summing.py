"""Summing: the source adds up what came back for each of its tokens, in one order, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raynixl.moe.calls import CODES

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.result import Handle
    from raynixl.native import Native

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """By token, the items that are added, in order: items[starts[t] : starts[t + 1]], with their weights if any."""

    starts: I64
    items: npt.NDArray[np.signedinteger[Any]]
    weights: F32 | None

    def only(self, is_there: npt.NDArray[np.bool_]) -> Terms:
        """Return the terms without the items that did not come."""
        keep = is_there[self.items]
        starts = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)[self.starts]
        return Terms(starts, self.items[keep], None if self.weights is None else self.weights[keep])


def terms_of(handle: Handle) -> Terms:
    """Return what is added: rows by ascending rank of their holder, or pairs in k order with their weights."""
    routing = handle.routing
    if handle.weights_at == "holder":
        return Terms(routing.starts, routing.positions, None)
    items = pair_table(handle)
    valid = items >= 0
    starts = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int64)
    weights = None if handle.weights is None else np.ascontiguousarray(handle.weights[valid])
    return Terms(starts, items[valid], weights)


def pair_table(handle: Handle) -> npt.NDArray[np.int64]:
    """Return by token and k the number of its pair, in the order in which pairs come back; -1 for none."""
    routing = handle.routing
    valid = routing.row_ids >= 0
    rows, ks = np.nonzero(valid)
    table = np.full((routing.tokens, handle.topk), -1, np.int64)
    table[routing.order[rows], ks] = np.arange(len(rows))
    return table


def sum_terms(
    native: Native,
    terms: Terms,
    addresses: U64,
    y_dtype: Tensor,
    out: Tensor,
    biases: tuple[Tensor, ...],
    scale: F32 | None,
) -> None:
    """Add up terms that lie at these addresses by item; `y_dtype` is any tensor of their dtype."""
    hidden = out.shape[-1]
    bias_code, bias_stride = 0, 0
    if biases:
        bias_code = CODES[biases[0].dtype]
        bias_stride = biases[0].stride(0) * biases[0].element_size() if biases[0].dim() == 2 else 0
    native.reduce_rows(
        out.data_ptr(), out.stride(0) * out.element_size() if len(out) else 0, CODES[out.dtype], terms.starts,
        addresses[terms.items], CODES[y_dtype.dtype], terms.weights, hidden,
        np.array([bias.data_ptr() for bias in biases], np.uint64), bias_stride, bias_code, [], scale,
    )  # fmt: skip


def lost_scale(handle: Handle, is_there: npt.NDArray[np.bool_] | None) -> F32:
    """Return by token what makes up for the terms that are missing: all weights over those that count."""
    routing = handle.routing
    weights = np.ones((routing.tokens, handle.topk), np.float32) if handle.weights is None else handle.weights
    items = pair_table(handle)
    came = items >= 0
    if is_there is not None:
        by_pair = is_there if handle.weights_at == "source" else is_there[np.nonzero(routing.row_ids >= 0)[0]]
        came[came] = by_pair[items[came]]
    whole = np.where(handle.chosen, weights, np.float32(0)).sum(axis=1, dtype=np.float32)
    rest = np.where(came, weights, np.float32(0)).sum(axis=1, dtype=np.float32)
    scale: F32 = np.divide(whole, rest, out=np.ones_like(whole), where=rest != 0)
    return scale

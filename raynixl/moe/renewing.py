"""Renewing: a handle of before others took part, made good by a dispatch of its ids along the present ways.

Rows of a former handle lie as they did then. A dispatch of its ids finds the ways that they take now, and where each
row lies among those that come so: by its source and its token. Rows of sources that are lost have no way back any
more; where such a handle is dispatched by, theirs are zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from raynixl.errors import ConfigError
from raynixl.moe.checks import check_known
from raynixl.moe.major import expert_major
from raynixl.moe.slots import in_slots, places_of
from raynixl.moe.staged_result import TwoLevelDispatched, TwoLevelHandle, handle_of
from raynixl.moe.staging import Returning, Sending

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.result import Handle


def hollow(handle: TwoLevelHandle, hidden: int) -> Sending:
    """Return a dispatch of the ids of a handle, with rows of nothing."""
    x = torch.zeros((len(handle.ids), hidden), dtype=torch.uint8)
    return Sending(
        x, handle.ids, _weights(handle), (), None, handle.inside.layout, handle.inside.alignment, handle.weights_at
    )  # fmt: skip


def renewed(returning: Returning, r: TwoLevelDispatched) -> Returning:
    """Return the same combine by the handle that a dispatch of the ids has made.

    Raises:
        ConfigError: y does not fit.
    """
    former, handle, y, weights = returning.handle, handle_of(r), returning.y, returning.weights
    rows = _former_rows(former, handle)
    if isinstance(y, torch.Tensor) and y.dim() == 2:
        y = _moved(y, former.inside, handle.inside, rows)
    if isinstance(weights, torch.Tensor) and len(weights) == len(former.sources):
        weights = _picked(weights, rows)
    return replace(returning, handle=handle, y=y, weights=weights)


def fresh(sending: Sending) -> Sending:
    """Return a dispatch by a former handle as one of its ids; its rows come in layout "tokens".

    Raises:
        ConfigError: the caller gives ids as well, or other tokens.
    """
    handle = sending.handle
    x = sending.x[0] if isinstance(sending.x, tuple) else sending.x
    check_known(len(handle.ids), sending.topk_idx, len(x))
    weights = _weights(handle) if sending.topk_weights is None else sending.topk_weights
    return replace(
        sending, topk_idx=handle.ids, topk_weights=weights, handle=None, layout="tokens", alignment=1,
        weights_at=sending.way[1],
    )  # fmt: skip


def as_before(sending: Sending, r: TwoLevelDispatched, experts: int) -> TwoLevelDispatched:
    """Return rows that came as the former handle has them: each in its place, zeros for those that are lost."""
    former, (layout, at) = sending.handle, sending.way
    rows, count = _former_rows(former, handle_of(r)), len(former.sources)
    known, rows = rows >= 0, rows[rows >= 0]
    row_ids = former.inside.row_ids
    ids = torch.from_numpy(row_ids).to(former.ids.dtype)
    fields = [None if one is None else _spread(one[known], rows, count) for one in (r.x, r.scales, *r.extra)]
    weights = None if r.topk_weights is None else _spread(r.topk_weights[known], rows, count)
    if sending.topk_weights is None and at == former.weights_at == "holder" and former.inside.row_weights is not None:
        weights = torch.from_numpy(former.inside.row_weights)  # they have come then
    sources, tokens, places, offsets, by_row = former.sources, former.tokens, None, None, weights
    alignment = former.inside.alignment if sending.alignment is None else sending.alignment
    major = expert_major(row_ids, experts, alignment)
    if layout == "experts":
        at_rows = torch.from_numpy(major.rows).long()
        fields = [None if one is None else _by_expert(one, at_rows) for one in fields]
        offsets = torch.from_numpy(major.offsets)
        weights = None if by_row is None else torch.from_numpy(major.weights(by_row.numpy()))
    elif layout == "slots":
        places = places_of(sources, former.slots[1])
        order = places.argsort()
        sources, tokens = sources[order], tokens[order]
        fields = [in_slots(one, places, former.slots) for one in fields]
        ids, weights = in_slots(ids, places, former.slots, -1), in_slots(weights, places, former.slots)
    inside = replace(
        former.inside, layout="experts" if layout == "experts" else "tokens", weights_at=at, alignment=alignment,
        major=major if layout == "experts" else None, row_weights=None if by_row is None else by_row.numpy(),
    )  # fmt: skip
    given = _weights(handle_of(r))
    across = (replace(former.across[0], weights=None if given is None else given.numpy()), *former.across[1:])
    x, scales, *extra = fields
    return TwoLevelDispatched.of(
        r, x=x, scales=scales, topk_idx=ids, topk_weights=weights, counts=torch.from_numpy(major.counts),
        offsets=offsets, tokens=tokens, origins=sources, extra=tuple(extra),
        handle=replace(former, inside=inside, across=across, places=places),
    )  # fmt: skip


def _weights(handle: TwoLevelHandle) -> Tensor | None:
    """Return the weights of the source's own tokens."""
    weights = handle.across[0].weights
    return None if weights is None else torch.from_numpy(weights)


def _former_rows(former: TwoLevelHandle, handle: TwoLevelHandle) -> Tensor:
    """Return by row of a handle which one of the former it is; -1 where that one's forwarder was lost then."""
    known = {key: row for row, key in enumerate(zip(former.sources.tolist(), former.tokens.tolist(), strict=True))}
    rows = [known.get(key, -1) for key in zip(handle.sources.tolist(), handle.tokens.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def _moved(y: Tensor, former: Handle, handle: Handle, rows: Tensor) -> Tensor:
    """Return what goes back in the order of the present handle's rows, or pairs."""
    if former.layout != "experts" and former.weights_at == "holder":
        _check_length(y, former.rows)
        return _picked(y, rows)
    numbers = torch.full((former.rows + 1, former.topk), -1)  # the last one for rows that are not known
    is_pair = torch.from_numpy(former.row_ids) >= 0
    numbers[:-1][is_pair] = torch.arange(int(is_pair.sum()))
    picked = numbers[rows][torch.from_numpy(handle.row_ids) >= 0]
    if former.layout != "experts":
        _check_length(y, int(is_pair.sum()))
        return _picked(y, picked)
    assert former.major is not None
    assert handle.major is not None
    _check_length(y, former.major.padded)
    out = torch.zeros((handle.major.padded, y.shape[1]), dtype=y.dtype)
    out[torch.from_numpy(handle.major.positions).long()] = _picked(
        y[torch.from_numpy(former.major.positions).long()], picked
    )  # fmt: skip
    return out


def _picked(rows: Tensor, which: Tensor) -> Tensor:
    """Return these rows; where there is none, what can be added to any sum and leaves its bits: -0.0."""
    out = torch.full((len(which), *rows.shape[1:]), -0.0, dtype=rows.dtype)
    is_there = which >= 0
    out[is_there] = rows[which[is_there]]
    return out


def _check_length(y: Tensor, rows: int) -> None:
    if len(y) != rows:
        raise ConfigError(f"y has the shape {list(y.shape)}", hint=f"the handle wants {[rows, y.shape[1]]}")


def _spread(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """Lay rows at their places among so many, byte for byte; the others are zero."""
    out = torch.zeros((count, *rows.shape[1:]), dtype=rows.dtype)
    if len(rows):
        out.view(torch.uint8).reshape(count, -1)[places] = rows.contiguous().view(torch.uint8).reshape(len(rows), -1)
    return out


def _by_expert(rows: Tensor, at: Tensor) -> Tensor:
    """Lay rows by expert, byte for byte; zeros where there is padding."""
    out = torch.zeros((len(at), *rows.shape[1:]), dtype=rows.dtype)
    if len(at):
        flat = rows.contiguous().view(torch.uint8).reshape(len(rows), -1)
        out.view(torch.uint8).reshape(len(at), -1)[at >= 0] = flat[at[at >= 0]]
    return out

"""The load of the MoE benchmark: each rank's tokens, what the experts make of them, and what must come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_SOME_ROWS = 256  # rows computed at a time, so that float32 copies stay small
_SEEDS_APART = 1_000_003


@dataclass(frozen=True, slots=True)
class Load:
    """What is dispatched: the same number of tokens on every rank, each to top-k experts drawn at random."""

    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str = "bfloat16"
    layout: str = "tokens"
    memory: str = "dram"
    """Where tokens and results are: in the host's memory, or a GPU's."""

    @property
    def torch_dtype(self) -> Any:
        """The dtype of the rows."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * int(self.torch_dtype.itemsize)

    @property
    def most_sent(self) -> int:
        """Rows that a rank sends at most."""
        return self.tokens * min(self.topk, self.ranks)

    @property
    def most_received(self) -> int:
        """Rows that a rank receives at most."""
        return self.tokens * self.ranks

    def holders(self) -> NDArray[np.int32]:
        """Return the rank that has each expert: equal blocks, or as equal as they can be."""
        return (np.arange(self.experts) * self.ranks // self.experts).astype(np.int32)

    def local_ids(self) -> NDArray[np.int32]:
        """Return the number of each expert among those of its rank."""
        holders = self.holders()
        return (np.arange(self.experts) - np.searchsorted(holders, holders)).astype(np.int32)

    def held(self, rank: int) -> NDArray[np.int64]:
        """Return the experts of a rank."""
        return np.flatnonzero(self.holders() == rank)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one rank dispatches."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Received:
    """What a dispatch gave one rank: rows in order (source rank, token), and local ids, -1 for experts elsewhere."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor


def make_tokens(load: Load, rank: int, seed: int) -> Tokens:
    """Return the tokens of a rank: any process makes the same of them."""
    import torch

    made = torch.Generator().manual_seed(seed * _SEEDS_APART + rank)
    x = torch.empty(load.tokens, load.hidden, dtype=load.torch_dtype)
    for start in range(0, load.tokens, _SOME_ROWS):
        part = x[start : start + _SOME_ROWS]
        part.copy_(torch.randn(part.shape, generator=made))
    scores = torch.rand(load.tokens, load.experts, generator=made)
    weights, ids = torch.topk(scores, load.topk)
    return Tokens(x, ids, torch.softmax(weights, 1))


def run_experts(load: Load, rank: int, received: Received, into: torch.Tensor) -> None:
    """Write each row's weighted sum over the rank's experts: each multiplies a row with a factor of its own."""
    factors = _factors(load)[load.held(rank)]
    for rows in _slices(len(received.x)):
        scale = _scale(factors, received.ids[rows], received.weights[rows])
        into[rows].copy_(received.x[rows].float() * scale[:, None])


def run_expert(load: Load, expert: int, x: torch.Tensor, into: torch.Tensor) -> None:
    """Write what one expert makes of rows."""
    factor = _factors(load)[expert]
    for rows in _slices(len(x)):
        into[rows].copy_(x[rows].float() * factor)


def expected_result(load: Load, tokens: Tokens) -> torch.Tensor:
    """Return what a combine must give: each rank's sum rounded once, then summed in float32 in rank order.

    Where each expert has rows of its own, these are rounded, too, before they are weighted.
    """
    import torch

    holders = torch.from_numpy(load.holders())
    out = torch.empty_like(tokens.x)
    for rows in _slices(load.tokens):
        x, ids, weights = tokens.x[rows].float(), tokens.ids[rows], tokens.weights[rows]
        total = torch.zeros_like(x)
        for rank in range(load.ranks):
            here = torch.where(holders[ids] == rank, ids, -1)
            total += _partial(load, x, here, weights).to(out.dtype).float()
        out[rows].copy_(total)
    return out


def _partial(load: Load, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What one rank's experts add up to for some tokens, before it is rounded."""
    import torch

    factors = _factors(load)
    if load.layout != "experts":
        return x * _scale(factors, ids, weights)[:, None]
    total = torch.zeros_like(x)
    for k in range(load.topk):
        is_one = ids[:, k] >= 0
        made = (x[is_one] * factors[ids[is_one, k]][:, None]).to(load.torch_dtype)
        total[is_one] += made.float() * weights[is_one, k, None]
    return total


def is_received(load: Load, rank: int, received: Received, seed: int) -> bool:
    """Whether a dispatch gave a rank just the rows that are its, in their order, with their ids and weights."""
    import torch

    holders, local = torch.from_numpy(load.holders()), torch.from_numpy(load.local_ids())
    at = 0
    for source in range(load.ranks):
        tokens = make_tokens(load, source, seed)
        is_mine = holders[tokens.ids] == rank
        order = is_mine.any(1).nonzero()[:, 0]
        rows, at = slice(at, at + len(order)), at + len(order)
        ids = torch.where(is_mine, local[tokens.ids], -1)[order]
        weights = torch.where(is_mine, tokens.weights, 0.0)[order]
        if not (
            _same(received.x[rows], tokens.x[order])
            and _same(received.ids[rows].long(), ids.long())
            and _same(received.weights[rows], weights)
        ):
            return False
    counts = torch.bincount(received.ids[received.ids >= 0].long(), minlength=len(load.held(rank)))
    return at == len(received.x) and _same(received.counts, counts)


def is_result(load: Load, found: torch.Tensor, tokens: Tokens, *, is_exact: bool) -> bool:
    """Whether a combine gave what it must; a sum that is not exact may be off by some roundings of its terms."""
    import torch

    expected = expected_result(load, tokens)
    if is_exact:
        return _same(found, expected)
    close = 4 * load.ranks * torch.finfo(expected.dtype).eps
    return found.shape == expected.shape and torch.allclose(
        found.float(), expected.float(), rtol=close, atol=close * float(expected.abs().max())
    )


def _factors(load: Load) -> torch.Tensor:
    """The factor of each expert."""
    import torch

    return 0.5 + torch.arange(load.experts, dtype=torch.float32) / load.experts


def _scale(factors: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the factors of each row's experts, in their order; -1 is none."""
    import torch

    total = torch.zeros(len(ids))
    for k in range(ids.shape[1]):
        is_one = ids[:, k] >= 0
        total += torch.where(is_one, factors[ids[:, k].clamp(min=0).long()] * weights[:, k], 0.0)
    return total


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.shape == other.shape and torch.equal(one, other)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _SOME_ROWS, count)) for start in range(0, count, _SOME_ROWS))

"""What ranks give in the tests of faults, and what of it must come: rows and sums, checked to the bit.

Numbers are small and whole, so that sums are exact, and drawn from rank and phase: each rank knows what others send.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

HIDDEN, TOPK, TOKENS = 32, 3, 12
EXPERTS = 10


@dataclass(frozen=True)
class Given:
    """What one rank gives to the dispatch of one phase."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def given(rank: int, phase: int) -> Given:
    """Draw what a rank gives; every rank names every other one's experts."""
    rng = np.random.default_rng([rank, phase])
    tokens = int(rng.integers(6, TOKENS + 1))
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOPK]
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[:, 0] = (np.arange(tokens) * 2 + rank) % EXPERTS
    x = rng.integers(0, 64, (tokens, HIDDEN)).astype(np.float32)
    weights = rng.integers(1, 5, (tokens, TOPK)).astype(np.float32)
    return Given(torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights))


def terms(one: Given, holders: Any) -> dict[int, torch.Tensor]:
    """Return by holder what it adds to each token: expert e multiplies by e + 1."""
    found = {}
    for rank in set(holders) - {-1}:
        is_here = torch.from_numpy(np.isin(one.ids.numpy(), np.flatnonzero(np.array(holders) == rank)))
        factors = torch.where(is_here, one.weights * (one.ids + 1), 0).sum(1, keepdim=True)
        found[rank] = one.x * factors
    return found


def is_staged(ep: Any) -> bool:
    """Whether it works in two stages."""
    return hasattr(ep, "_council")


def position_of(ep: Any) -> int:
    """Where all ranks are, alike, in their sequence of phases, or of operations in two stages."""
    return int(ep._council.position if is_staged(ep) else ep._session.phase)


def check_rows(ep: Any, made: Any, phase: int) -> tuple[int, ...]:
    """Fail unless every row is that of its token, and a source's rows are all there or none; return whose are not."""
    layout = made.handle.layout
    holders = np.array(ep.placement.holders)
    mine = np.flatnonzero(holders == ep.rank)
    if layout == "slots":
        x = made.x[(made.topk_idx >= 0).any(-1)]
    elif layout == "experts":
        x = None
    else:
        x = made.x
    sources, tokens = made.sources.numpy(), made.tokens.numpy()
    unheard = []
    for source in range(ep.world):
        theirs = given(source, phase)
        wanted = np.flatnonzero(np.isin(theirs.ids.numpy(), mine).any(1))
        here = sources == source
        if not here.any():
            if len(wanted):
                unheard.append(source)
            continue
        assert tokens[here].tolist() == wanted.tolist(), f"rank {ep.rank}: tokens of {source} in phase {phase}"
        if x is not None:
            assert torch.equal(x[torch.from_numpy(here)], theirs.x[wanted]), f"rank {ep.rank}: rows of {source}"
    if layout == "slots" or not is_staged(ep):  # else they come by forwarder
        assert np.all(np.diff(sources) >= 0)
    return tuple(unheard)


def run_experts(ep: Any, made: Any) -> torch.Tensor:
    """Multiply as the experts here do."""
    names = torch.tensor([*ep.local_experts, 0], dtype=torch.float32)
    if made.handle.layout == "experts":
        y = torch.zeros_like(made.x)
        for local in range(len(ep.local_experts)):
            begin = int(made.offsets[local])
            end = begin + int(made.counts[local])
            y[begin:end] = made.x[begin:end] * (names[local] + 1)
        return y
    factors = torch.where(made.topk_idx >= 0, names[made.topk_idx] + 1, 0)
    if made.handle.weights_at == "source":
        pairs = made.topk_idx >= 0
        return (made.x.unsqueeze(-2) * factors.unsqueeze(-1))[pairs]
    is_row = (made.topk_idx >= 0).any(-1, keepdim=True)
    scaled = made.x * (factors * made.topk_weights).sum(-1, keepdim=True)
    return torch.where(is_row, scaled, torch.nan)


def explain(out: torch.Tensor, one: Given, ep: Any) -> tuple[int, ...]:
    """Return the fewest holders without whose terms the sums are these, to the bit."""
    by_holder = terms(one, ep.placement.holders)
    for count in range(len(by_holder) + 1):
        for gone in itertools.combinations(sorted(by_holder), count):
            if torch.equal(out, total(one, by_holder, gone, ep)):
                return gone
    raise AssertionError(f"rank {ep.rank} of {ep.active}: no holders' terms add up to {out}")


def total(one: Given, by_holder: dict[int, torch.Tensor], gone: Any, ep: Any) -> torch.Tensor:
    """Add up the terms of all holders but those; where an option says so, the others make up for them."""
    sums = torch.zeros_like(one.x)
    for rank, term in by_holder.items():
        if rank not in gone:
            sums = sums + term
    if ep.on_lost.value == "renormalise" and gone:
        holders = np.array([*ep.placement.holders, -1])[one.ids.numpy()]
        is_left = torch.from_numpy((holders >= 0) & ~np.isin(holders, gone))
        named = torch.where(one.ids >= 0, one.weights, 0).sum(1)
        left = torch.where(is_left, one.weights, 0).sum(1)
        is_touched = (named != left) & (left > 0)
        scale = torch.where(is_touched, named / left, 1.0)
        sums = torch.where(is_touched[:, None], sums * scale[:, None], sums)
    return sums

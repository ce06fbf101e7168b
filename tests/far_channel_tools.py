"""What ranks do in the tests of far channels, in processes of their own or in threads."""

from __future__ import annotations

import time
from typing import Any

import torch

HIDDEN = 512


def rows_of(rank: int, tokens: int) -> torch.Tensor:
    """Small whole numbers: sums of them are exact."""
    return torch.arange(tokens * HIDDEN, dtype=torch.float32).remainder(97).reshape(tokens, HIDDEN) + rank


def step(member: Any, layer: str, tokens: int, deadline: float) -> tuple[float, tuple[int, ...], torch.Tensor]:
    """Send every token to every rank and back; return the seconds it took, who was lost, and the sums."""
    ep, x = member.eps[layer], rows_of(member.rank, tokens)
    ids = torch.arange(ep.world).repeat(tokens, 1)  # rank r holds expert r
    began = time.monotonic()
    got = ep.dispatch(x, ids, deadline=deadline)
    out = ep.combine(got.x, got.handle, deadline=deadline)
    return time.monotonic() - began, got.lost, out

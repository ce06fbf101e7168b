"""Backward goes on without a rank that is lost behind the forward: its terms are missing, and nobody hangs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from moe_autograd import LAYOUTS, dense, matrices, run, tokens_of
from moe_tools import Layer, Threads
from torch import Tensor

EXPERTS, HIDDEN, TOPK, WORLD, VICTIM = 5, 4, 3, 3, 1
SIZES = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK}


@pytest.mark.parametrize(("layout", "weights_at"), LAYOUTS)
def test_gradients_lack_the_terms_of_a_rank_that_is_lost(layout: str, weights_at: str) -> None:
    with Threads(WORLD) as crew, crew.experts(**SIZES, max_tokens=16, dtype=torch.float64) as layer:
        held = [matrices(EXPERTS, HIDDEN) for _ in range(WORLD)]
        given = [tokens_of(rank, 5, **SIZES) for rank in range(WORLD)]
        outs = layer.run(lambda rank, ep: run(ep, *given[rank], held[rank], layout, weights_at))
        lost = layer.eps[VICTIM].local_experts
        _lose(layer)
        layer.run(lambda rank, _: outs[rank].backward(_slope(outs[rank])), ranks=[0, 2])
        assert [layer.eps[rank].active for rank in (0, 2)] == [(0, 2)] * 2
        owners = [ep.local_experts for ep in layer.eps]

    expected = [_dense_gradients(rank, lost) for rank in range(WORLD)]
    for rank in (0, 2):
        dx, dweights, _ = expected[rank]
        assert torch.allclose(given[rank][0].grad, dx, rtol=0, atol=1e-12)
        assert torch.allclose(given[rank][2].grad, dweights, rtol=1e-6, atol=1e-6)
        for name in owners[rank]:
            theirs = sum(one[2][name] for number, one in enumerate(expected) if number != VICTIM)
            assert torch.allclose(held[rank][name].grad, theirs, rtol=0, atol=1e-12)


def _lose(layer: Layer) -> None:
    """End one rank: its agent closes, as that of a process that ends does."""
    layer.crew.agents[VICTIM].close()


def _dense_gradients(rank: int, lost: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, idx, weights = tokens_of(rank, 5, **SIZES)
    held: dict[int, Any] = matrices(EXPERTS, HIDDEN)
    out = dense(x, torch.where(torch.isin(idx, torch.tensor(lost)), -1, idx), weights, held)
    out.backward(_slope(out))
    assert x.grad is not None
    assert weights.grad is not None
    return x.grad, weights.grad, [torch.zeros_like(one) if one.grad is None else one.grad for one in held.values()]


def _slope(out: Tensor) -> Tensor:
    return torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).sin()

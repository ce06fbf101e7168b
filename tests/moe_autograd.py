"""A small layer by `raynixl.moe.functional` in every layout, and the same by plain torch with gradients of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raynixl.moe.functional import combine, dispatch

LAYOUTS = [(layout, at) for layout in ("tokens", "experts") for at in ("holder", "source")]


def matrices(experts: int, hidden: int, dtype: torch.dtype = torch.float64) -> dict[int, Tensor]:
    """One matrix for each expert, always the same."""
    generator = torch.Generator().manual_seed(experts * 1000 + hidden)
    return {
        expert: torch.randn(hidden, hidden, generator=generator, dtype=dtype).requires_grad_()
        for expert in range(experts)
    }


def tokens_of(
    rank: int, count: int, *, experts: int, hidden: int, topk: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank: some ids are none, some are there twice, and weights are multiples of 1/64."""
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(count, hidden, generator=generator, dtype=dtype)
    idx = torch.randint(-1, experts, (count, topk), generator=generator)
    if count > 2:
        idx[1] = -1
        idx[2] = idx[2, 0]
    weights = torch.randint(1, 64, (count, topk), generator=generator) / 64
    return x.requires_grad_(), idx, weights.requires_grad_()


def expert(rows: Tensor, matrix: Tensor) -> Tensor:
    """What an expert makes of rows; not linear."""
    return torch.tanh(rows @ matrix)


def run(
    ep: Any, x: Tensor, idx: Tensor, weights: Tensor | None, held: Mapping[int, Tensor], layout: str, weights_at: str
) -> Tensor:
    """Dispatch, run this rank's experts as the layout wants it, combine."""
    alignment = 4 if layout == "experts" else 1
    r = dispatch(ep, x, idx, weights, layout=layout, alignment=alignment, weights_at=weights_at)
    return combine(ep, run_experts(r, [held[expert] for expert in ep.local_experts], layout, weights_at), r.handle)


def run_experts(r: Any, held: Sequence[Tensor], layout: str, weights_at: str) -> Tensor:
    """Return what combine takes."""
    if layout == "experts":
        bounds = r.offsets.tolist()
        return torch.cat([r.x[:0], *(expert(r.x[a:b], m) for a, b, m in zip(bounds, bounds[1:], held, strict=False))])
    if weights_at == "source":
        row, k = (r.topk_idx >= 0).nonzero(as_tuple=True)
        ids = r.topk_idx[row, k]
        made = torch.zeros_like(r.x[row])
        for local, matrix in enumerate(held):
            made = torch.where((ids == local)[:, None], expert(r.x[row], matrix), made)
        return made
    y = r.x * 0
    for local, matrix in enumerate(held):
        chosen = (r.topk_idx == local).to(r.x.dtype)
        share = chosen if r.topk_weights is None else chosen * r.topk_weights
        y = y + share.sum(1, keepdim=True) * expert(r.x, matrix)
    return y


def dense(x: Tensor, idx: Tensor, weights: Tensor | None, held: Mapping[int, Tensor]) -> Tensor:
    """The same sum by plain torch, where all experts are at hand."""
    out = x * 0
    for name, matrix in held.items():
        chosen = (idx == name).to(x.dtype)
        share = chosen if weights is None else chosen * weights
        out = out + share.sum(1, keepdim=True) * expert(x, matrix)
    return out


def gradients_of(member: Any, name: str, count: int, layout: str, weights_at: str) -> dict[str, Any]:
    """On a rank in a process of its own: one step forward and backward; return its output and gradients."""
    ep = member.eps[name]
    x, idx, weights = tokens_of(ep.rank, count, experts=ep.experts, hidden=ep.hidden, topk=ep.topk)
    held = matrices(ep.experts, ep.hidden)
    out = run(ep, x, idx, weights, held, layout, weights_at)
    out.sum().backward()
    return {
        "out": out.detach().numpy(), "x": _numpy(x), "weights": _numpy(weights),
        "held": {expert: _numpy(held[expert]) for expert in ep.local_experts},
    }  # fmt: skip


def _numpy(leaf: Tensor) -> Any:
    assert leaf.grad is not None
    return leaf.grad.numpy()

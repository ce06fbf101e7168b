"""A small transformer whose perceptrons are experts: what every rank has of it, and what only one rank has."""

from collections.abc import Sequence

import torch
from text import LENGTH, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import raynixl as rx
from raynixl.moe import MoELayer, Router

WIDTH, HEADS, LAYERS = 64, 4, 2
EXPERTS, CHOSEN = 8, 2


class Dense(nn.Module):
    """All but the experts. Every rank has a copy of its own, and uses it for its own batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.attention = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.routers = nn.ModuleList(Router(hidden=WIDTH, experts=EXPERTS, topk=CHOSEN) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))

    def loss(self, x: Tensor, batch: Tensor) -> Tensor:
        return cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


class Attention(nn.Module):
    """Causal self-attention, added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.output(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """The batches of some ranks, and the experts of some: one rank's in a worker, those of all in a single process."""

    def __init__(self, copies: int, parallels: Sequence[rx.ExpertParallel | None]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(Dense() for _ in range(copies))
        self.layers = nn.ModuleList(
            MoELayer(self.copies[0].routers[layer], make_experts(layer, ep), ep=ep, weights_at="source")
            for layer, ep in enumerate(parallels)
        )

    def forward(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Return the loss of each batch."""
        xs = [own.token(batch[:, :-1]) + own.position for own, batch in zip(self.copies, batches, strict=True)]
        for number, layer in enumerate(self.layers):
            xs = [own.attention[number](x) for own, x in zip(self.copies, xs, strict=True)]
            normed = [own.norms[number](x).flatten(0, 1) for own, x in zip(self.copies, xs, strict=True)]
            routed = [own.routers[number](x) for own, x in zip(self.copies, normed, strict=True)]
            chosen, weights = (torch.cat(parts) for parts in zip(*routed, strict=True))
            mixed = layer.mix(torch.cat(normed), chosen, weights).split([len(x) for x in normed])
            xs = [x + part.view_as(x) for x, part in zip(xs, mixed, strict=True)]
        return [own.loss(x, batch) for own, x, batch in zip(self.copies, xs, batches, strict=True)]


def make_experts(layer: int, ep: rx.ExpertParallel | None) -> dict[int, nn.Module]:
    """Make the experts that are here: perceptrons, the same on whichever rank an expert is."""
    names = range(EXPERTS) if ep is None else ep.local_experts
    return {name: _make_expert(seed=1 + EXPERTS * layer + name) for name in names}


def _make_expert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

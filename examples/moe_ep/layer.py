"""A mixture-of-experts layer: each token goes to the few experts that its router prefers."""

import torch
from torch import Tensor, nn

EXPERTS, CHOSEN, WIDTH = 8, 2, 64


class MoELayer(nn.Module):
    """The dense reference: every expert sees every token, weighted by a gate that is mostly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return apply_experts(self.experts, x, choose_experts(self.router, x))


def choose_experts(router: nn.Module, x: Tensor) -> Tensor:
    """Return each token's gate for each expert: a softmax over the best, zero for the others."""
    best, chosen = router(x).topk(CHOSEN, dim=1)
    return torch.zeros(len(x), EXPERTS).scatter(1, chosen, best.softmax(dim=1))


def make_expert() -> nn.Module:
    """Make one expert: a two-layer perceptron."""
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def apply_experts(experts: nn.ModuleList, x: Tensor, gates: Tensor) -> Tensor:
    """Return for each token the sum over experts, in their order, of gate times output."""
    total = torch.zeros_like(x)
    for expert, gate in zip(experts, gates.unbind(dim=1), strict=True):
        total += gate[:, None] * expert(x)
    return total

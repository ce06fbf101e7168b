"""Tools of the weight sync tests: a model, and a cluster in one process."""

from __future__ import annotations

import torch

from raynixl.weights import WeightSync, publish, subscribe

INSTALLS = ("swap", "copy")


class Policy(torch.nn.Module):
    """A small model with tied weights and buffers, whose forward tells the range of all its values."""

    def __init__(self, width=64, layers=3, value=0.0):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        fill(self, value)

    def forward(self):
        ends = [(tensor.flatten()[0].item(), tensor.flatten()[-1].item()) for tensor in self.state_dict().values()]
        return {value for pair in ends for value in pair}


def fill(model, value):
    """Give every carried tensor one value."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def same(one, other):
    """Say whether two models hold the same tensors, bit by bit."""
    left = one.state_dict() if isinstance(one, torch.nn.Module) else one
    right = other.state_dict() if isinstance(other, torch.nn.Module) else other
    return left.keys() == right.keys() and all(_bits(left[name]) == _bits(right[name]) for name in left)


def _bits(tensor):
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


class Cluster:
    """One trainer and some rollouts of one model."""

    def __init__(self, fleet, source, targets, **options):
        self.trainer = fleet("trainer")
        self.rollouts = [fleet(f"rollout-{number}") for number in range(len(targets))]
        self.publication = publish(self.trainer, "policy", source, chunk_nbytes=4096)
        pairs = zip(self.rollouts, targets, strict=True)
        self.subscriptions = [subscribe(agent, "policy", target, **options) for agent, target in pairs]
        self.sync = WeightSync(self.trainer, "policy", ["trainer"], [agent.name for agent in self.rollouts], timeout=20)

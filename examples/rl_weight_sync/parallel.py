"""One transformer block twice: as checkpoints hold it, and as one rank of an engine does, cut and fused."""

from collections.abc import Callable, Sequence

import torch
from policy import HEADS, WIDTH
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import raynixl as rx
from raynixl.weights.declare import Concat, declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Placement, Replicate, Shard
from raynixl.weights.shards import Shards

HIDDEN = 2 * WIDTH
ROWS, COLUMNS = ("query", "key", "value", "gate", "up"), ("output", "down")  # how tensor parallelism cuts them


def attend(projected: Sequence[Tensor]) -> Tensor:
    """Return the attention of query, key and value (batch, time, heads x width of a head)."""
    query, key, value = (one.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for one in projected)
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and a gated perceptron, each matrix by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        x = x + self.output(attend((self.query(normed), self.key(normed), self.value(normed))))
        normed = self.norm_mlp(x)
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


class ParallelBlock(nn.Module):
    """One rank's heads and its part of the perceptron; what the ranks have is added up twice."""

    def __init__(self, ranks: int, add_up: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH // ranks, bias=False)
        self.output = nn.Linear(WIDTH // ranks, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN // ranks, bias=False)
        self.down = nn.Linear(HIDDEN // ranks, WIDTH, bias=False)
        self.add_up = add_up

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.add_up(self.output(attend(self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1))))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.add_up(self.down(silu(gate) * up))


class Team:
    """The ranks that work as one: they add up tensors of one shape."""

    def __init__(self, members: Sequence[str]) -> None:
        self.group = rx.Group(rx.agent(), members, timeout=60.0)
        self.buffers: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def add_up(self, own: Tensor) -> Tensor:
        if own.shape not in self.buffers:
            self.buffers[own.shape] = torch.empty_like(own), own.new_empty(len(self.group.members), *own.shape)
        source, everybody = self.buffers[own.shape]
        source.copy_(own)
        self.group.allgather(source, everybody)
        return everybody.sum(dim=0)  # in rank order: all ranks get the same bits


def trainer_shards(infos: Sequence[TensorInfo], ranks: int, rank: int) -> Shards:
    """Return what a trainer has: some rows of every tensor, as FSDP shards them."""
    return declare(infos, Mesh((("fsdp", ranks),)), (Shard(0),), (rank,))


def rollout_shards(infos: Sequence[TensorInfo], layers: int, ranks: int, rank: int) -> Shards:
    """Return what a rollout has: its heads, its part of the perceptron, and the rest whole."""
    fused = {}
    for block in (f"blocks.{layer}" for layer in range(layers)):
        for name, parts in (("query_key_value", ROWS[:3]), ("gate_up", ROWS[3:])):
            fused[f"{block}.{name}.weight"] = Concat(0, tuple(f"{block}.{part}.weight" for part in parts))
    return declare(infos, Mesh((("tp", ranks),)), _placement, (rank,), fused=fused)


def _placement(name: str) -> tuple[Placement]:
    matrix = name.split(".")[-2] if "." in name else name
    return (Shard(0) if matrix in ROWS else Shard(1) if matrix in COLUMNS else Replicate(),)

"""Buffers of DeepEP's kind on ranks in threads, the tokens that they dispatch, and what must come of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from moe_tools import DEADLINE, Threads
from torch import Tensor

from raynixl import Group
from raynixl.compat.deep_ep import Buffer

_numbers = itertools.count()


class Ranks:
    """One buffer for each rank of a crew of threads."""

    def __init__(self, crew: Threads, buffers: list[Any]) -> None:
        self.crew, self.buffers = crew, buffers
        self.world = len(buffers)

    def run(self, work: Callable[[int, Any], Any]) -> list[Any]:
        """Run work(rank, buffer) on all ranks; return what each returns."""
        return self.crew.run([lambda rank=rank: work(rank, self.buffers[rank]) for rank in range(self.world)])

    def errors(self, work: Callable[[int, Any], Any]) -> list[Exception]:
        """Run work(rank, buffer), which must fail on every rank; return the errors."""

        def attempt(rank: int, buffer: Any) -> Exception:
            try:
                work(rank, buffer)
            except Exception as error:  # noqa: BLE001 - it is the result
                return error
            raise AssertionError(f"rank {rank} returned")

        return self.run(attempt)


@contextlib.contextmanager
def ranks(crew: Threads, kind: type = Buffer, **options: Any) -> Iterator[Ranks]:
    """A buffer on each rank of a crew, over groups of raynixl, closed afterwards."""
    name = f"buffers{next(_numbers)}"
    groups = [Group(agent, crew.names, name=name, timeout=DEADLINE) for agent in crew.agents]
    made = crew.run([lambda group=group: kind(group, **options) for group in groups])
    try:
        yield Ranks(crew, made)
    finally:
        crew.run([buffer.destroy for buffer in made])
        for group in groups:
            group.close()


@dataclass(frozen=True)
class Case:
    """What every rank dispatches, drawn from a seed so that each can tell what the others have."""

    world: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    seed: int = 0
    missing: float = 0.0

    @property
    def each(self) -> int:
        """The experts of one rank."""
        return self.experts // self.world

    def count(self, rank: int) -> int:
        """How many tokens a rank has: they differ."""
        return max(0, self.tokens - 3 * rank)

    def generator(self, rank: int) -> torch.Generator:
        """The randomness of a rank."""
        return torch.Generator().manual_seed(1000 * self.seed + rank)

    def x(self, rank: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows of a rank."""
        return torch.randn((self.count(rank), self.hidden), generator=self.generator(rank)).to(dtype)

    def topk_idx(self, rank: int) -> Tensor:
        """Different experts for each token; some missing."""
        generator = self.generator(rank + 100)
        scores = torch.rand((self.count(rank), self.experts), generator=generator)
        ids = scores.topk(self.topk, dim=1).indices
        return ids.masked_fill(torch.rand(ids.shape, generator=generator) < self.missing, -1)

    def topk_weights(self, rank: int) -> Tensor:
        """A weight for each."""
        return torch.randn((self.count(rank), self.topk), generator=self.generator(rank + 200))

    def is_in_rank(self, source: int, rank: int) -> Tensor:
        """Which tokens of a source go to a rank."""
        ids = self.topk_idx(source)
        return ((ids >= 0) & (ids // self.each == rank)).any(1)

    def received(self, rank: int, of: Callable[[int], Tensor]) -> Tensor:
        """What a rank gets of what each source has, in the order of (source, token)."""
        return torch.cat([of(source)[self.is_in_rank(source, rank)] for source in range(self.world)])

    def received_ids(self, rank: int) -> Tensor:
        """The local ids of the rows that a rank gets."""
        ids = self.received(rank, self.topk_idx)
        return torch.where((ids >= 0) & (ids // self.each == rank), ids - rank * self.each, -1)

    def received_weights(self, rank: int) -> Tensor:
        """Their weights, 0 where the expert is elsewhere."""
        return self.received(rank, self.topk_weights).masked_fill(self.received_ids(rank) < 0, 0)

    def layout(self, buffer: Any, rank: int) -> dict[str, Any]:
        """The layout arguments of a V1 dispatch."""
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(self.topk_idx(rank), self.experts)
        return {
            "num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_node,
            "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank,
        }  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, to be compared: NaNs are equal to themselves so."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def summed(parts: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Add up in float32 in the given order, and round once."""
    total = torch.zeros(parts[0].shape)
    for part in parts:
        total += part.float()
    return total.to(dtype)


def counts_without(case: Case, rank: int, lost: list[int]) -> list[int]:
    """How many rows each expert of a rank gets from those that are not lost."""
    sources = [source for source in range(case.world) if source not in lost]
    first = rank * case.each
    return [sum(int((case.topk_idx(s) == first + e).sum()) for s in sources) for e in range(case.each)]

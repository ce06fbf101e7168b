"""What members of a group do in the GPU tests, in this process and in the far one: all operations on CUDA tensors."""

from __future__ import annotations

import base64
from typing import Any

import torch

from raynixl.collectives import Group

COUNT = 1 << 20


def take_part(world: Any, members: list[str], record: str, name: str) -> dict[str, list[int]]:
    """Run every operation on tensors that kernels on a stream of our own are still to make; return what they hold."""
    agent, seen = world.agent, {}
    agent.peer(base64.b64decode(record))
    rank = members.index(agent.name)

    def late(tensor: torch.Tensor, value: int) -> torch.Tensor:
        torch.cuda._sleep(40_000_000)  # about 20 ms
        return tensor.fill_(value + rank)

    def values(tensor: torch.Tensor) -> list[int]:
        return sorted(set(tensor.unique().tolist()))

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with Group(agent, members, name=name, timeout=60.0) as group, torch.cuda.stream(stream):
        part = torch.zeros(COUNT, dtype=torch.int32, device="cuda")
        whole = torch.zeros(2 * COUNT, dtype=torch.int32, device="cuda")
        for algorithm in ("direct", "chain"):
            group.broadcast(late(part, 10), 1, algorithm=algorithm)
            seen[algorithm] = values(part)
        group.allgather(late(part, 20), late(whole, 90))
        seen["allgather"] = values(whole)
        group.scatter(late(whole, 30), late(part, 90), 0)
        seen["scatter"] = values(part)
        group.gather(late(part, 40), late(whole, 90), 0)
        seen["gather"] = values(whole) if rank == 0 else []
        group.barrier()
    return seen

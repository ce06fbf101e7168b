"""Domains: DeepEP's two levels of ranks. Here all ranks are in one, whatever carries their bytes."""

from __future__ import annotations

from typing import Any


def world_of(group: Any) -> int:
    """Return how many ranks a group has: raynixl's, torch.distributed's or MPI's."""
    if isinstance(getattr(group, "world", None), int):
        return int(group.world)
    return int(group.Get_size() if hasattr(group, "Get_size") else group.size())


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """Return (RDMA ranks, NVLink ranks)."""
    return 1, world_of(group)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Return (scale-out ranks, scale-up ranks)."""
    return 1, world_of(group)

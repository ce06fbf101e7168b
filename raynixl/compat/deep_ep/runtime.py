"""Runtime: the few questions that code asks DeepEP's C++ object directly."""

from __future__ import annotations

from dataclasses import dataclass

from raynixl.compat.deep_ep.config import NODE_RANKS


@dataclass(frozen=True, slots=True)
class Runtime:
    """Answers as DeepEP would with nodes of 8 ranks."""

    rank: int
    world: int

    def is_available(self) -> bool:
        """Whether the buffer can be used."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Return how many nodes of 8 ranks there are."""
        return max(1, -(-self.world // NODE_RANKS))

    def get_rdma_rank(self) -> int:
        """Return our node."""
        return self.rank // NODE_RANKS

    def get_root_rdma_rank(self, is_global: bool) -> int:
        """Return the rank that speaks first."""
        return self.rank % NODE_RANKS if is_global else 0

    def get_local_device_id(self) -> int:
        """Return our place within our node."""
        return self.rank % NODE_RANKS

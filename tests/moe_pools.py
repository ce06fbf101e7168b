"""What tests of pools and slots share."""

from __future__ import annotations

import torch

from raynixl.moe.pool import Pool
from raynixl.moe.slot import Slot

NBYTES = 8192


def floats(pool: Pool, slot: Slot, count: int = 4) -> torch.Tensor:
    """Lease a slot as a few floats."""
    return pool.lease(slot).tensor(torch.float32, (count,))

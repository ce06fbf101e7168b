"""Expert parallelism: dispatch and combine of tokens from one-sided writes.

The names below are imported when they are first used: planners and simulations need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynixl.moe.balancing import Replicas, balance
    from raynixl.moe.functional import combine, dispatch
    from raynixl.moe.layer import MoELayer, Router, Scores
    from raynixl.moe.local import LocalParallel
    from raynixl.moe.making import expert_parallel
    from raynixl.moe.parallel import ExpertParallel
    from raynixl.moe.pending import Pending
    from raynixl.moe.placement import Placement
    from raynixl.moe.quantising import dequantise, quantise
    from raynixl.moe.rank import OnLost
    from raynixl.moe.result import Dispatched, Handle
    from raynixl.moe.two_level import TwoLevel

_HOMES = {  # no name may be that of a module of this package: importing that module would hide it
    "raynixl.moe.balancing": ("Replicas", "balance"),
    "raynixl.moe.functional": ("combine", "dispatch"),
    "raynixl.moe.layer": ("MoELayer", "Router", "Scores"),
    "raynixl.moe.local": ("LocalParallel",),
    "raynixl.moe.making": ("expert_parallel",),
    "raynixl.moe.parallel": ("ExpertParallel",),
    "raynixl.moe.rank": ("OnLost",),
    "raynixl.moe.pending": ("Pending",),
    "raynixl.moe.placement": ("Placement",),
    "raynixl.moe.quantising": ("dequantise", "quantise"),
    "raynixl.moe.result": ("Dispatched", "Handle"),
    "raynixl.moe.two_level": ("TwoLevel",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Dispatched", "ExpertParallel", "Handle", "LocalParallel", "MoELayer", "OnLost", "Pending", "Placement",
    "Replicas", "Router", "Scores", "TwoLevel", "balance", "combine", "dequantise", "dispatch", "expert_parallel",
    "quantise",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name at its first use."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'raynixl.moe' has no attribute {name!r}")

"""Expert parallelism: dispatch and combine of tokens from one-sided writes.

The names below are imported when they are first used: planners and simulations need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynixl.moe.functional import combine, dispatch
    from raynixl.moe.layer import MoELayer, Router, Scores
    from raynixl.moe.local import LocalParallel
    from raynixl.moe.parallel import ExpertParallel, OnLost
    from raynixl.moe.placement import Placement

_HOMES = {
    "raynixl.moe.functional": ("combine", "dispatch"),
    "raynixl.moe.layer": ("MoELayer", "Router", "Scores"),
    "raynixl.moe.local": ("LocalParallel",),
    "raynixl.moe.parallel": ("ExpertParallel", "OnLost"),
    "raynixl.moe.placement": ("Placement",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ExpertParallel", "LocalParallel", "MoELayer", "OnLost", "Placement", "Router", "Scores", "combine", "dispatch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name at its first use."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'raynixl.moe' has no attribute {name!r}")

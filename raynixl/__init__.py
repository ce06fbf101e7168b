"""raynixl: the transfer layer that Ray lacks.

Layer map (imports go downwards only; tests/test_layers.py holds us to it):

    L0  errors, cgroup, conditions
    L1  blocks, config, telemetry, cuda, memory, messages, authentication, host, native, reactor, topology
    L2  record, region, backends, directory
    L3  agents
    L4  collectives
    L5  weights, moe, kv
    L6  actors                              Ray starts here
    L7  integrations, compat, bench, cli, testing
    L8  raynixl                             these lazy names

Importing this package loads none of torch, ray, ucxx or cupy; a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynixl.actors import WeightSync, agent, attach, publish, subscribe, worker
    from raynixl.agents import Agent, Notification, Peer, Prepared, Transfer
    from raynixl.collectives import Group
    from raynixl.config import AgentConfig
    from raynixl.directory import InMemoryDirectory
    from raynixl.errors import (
        AgentClosed,
        BackendUnavailable,
        ConfigError,
        IntegrityError,
        Masked,
        PeerLost,
        PeerRestarted,
        PeerUnknown,
        RangeError,
        RaynixlError,
        RegionReadOnly,
        RegionStale,
        RegionUnknown,
        TransferCancelled,
        TransferTimeout,
    )
    from raynixl.memory import MemoryKind, MemorySpan
    from raynixl.moe import ExpertParallel
    from raynixl.region import Region, RemoteRegion

__version__ = "0.1.0"

_HOMES = {
    "raynixl.actors": ("WeightSync", "agent", "attach", "publish", "subscribe", "worker"),
    "raynixl.agents": ("Agent", "Notification", "Peer", "Prepared", "Transfer"),
    "raynixl.collectives": ("Group",),
    "raynixl.config": ("AgentConfig",),
    "raynixl.directory": ("InMemoryDirectory",),
    "raynixl.errors": (
        "AgentClosed", "BackendUnavailable", "ConfigError", "IntegrityError", "Masked", "PeerLost", "PeerRestarted",
        "PeerUnknown", "RangeError", "RaynixlError", "RegionReadOnly", "RegionStale", "RegionUnknown",
        "TransferCancelled", "TransferTimeout",
    ),
    "raynixl.memory": ("MemoryKind", "MemorySpan"),
    "raynixl.moe": ("ExpertParallel",),
    "raynixl.region": ("Region", "RemoteRegion"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Agent", "AgentClosed", "AgentConfig", "BackendUnavailable", "ConfigError", "ExpertParallel", "Group",
    "InMemoryDirectory", "IntegrityError", "Masked", "MemoryKind", "MemorySpan", "Notification", "Peer", "PeerLost",
    "PeerRestarted", "PeerUnknown", "Prepared", "RangeError", "RaynixlError", "Region", "RegionReadOnly",
    "RegionStale", "RegionUnknown", "RemoteRegion", "Transfer", "TransferCancelled", "TransferTimeout", "WeightSync",
    "agent", "attach", "publish", "subscribe", "worker",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'raynixl' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as exc:
        if exc.name not in ("ray", "torch"):
            raise
        from raynixl.errors import BackendUnavailable

        hint = f"pip install 'raynixl[{exc.name}]'"
        raise BackendUnavailable(f"raynixl.{name} needs the package {exc.name}", hint=hint) from exc


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

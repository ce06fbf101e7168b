"""What the drivers share: joining the cluster, and placing tasks and actors on its nodes."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raynixl as rx

TIMEOUT = 80.0


def join() -> list[str]:
    """Join the cluster that RAY_ADDRESS names; return its nodes, the head first."""
    ray.init(log_to_driver=False, logging_level="ERROR")
    return [node["NodeID"] for node in sorted(ray.nodes(), key=lambda node: node["NodeManagerAddress"])]


def on(node: str, **options: Any) -> dict[str, Any]:
    """Options of a task or actor that runs on a node and nowhere else."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False), "num_cpus": 0, **options}


def get(refs: Any) -> Any:
    """Wait for what actors return, a bounded time."""
    return ray.get(refs, timeout=TIMEOUT)


def route(peer: str, name: str) -> str:
    """The backend that a read of a peer's region takes from here."""
    agent = rx.agent()
    theirs = agent.peer(peer)[name]
    mine = agent.empty(theirs.nbytes)
    taken = agent.explain(theirs, mine).backend
    agent.deregister(mine)
    return taken

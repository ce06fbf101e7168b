"""Actors: raynixl in Ray. Workers host agents, records lie in the GCS, handles stand for agents."""

from raynixl.actors.decorator import worker
from raynixl.actors.gcs import GcsDirectory
from raynixl.actors.handles import agent_name, agent_names, attach, list_agents
from raynixl.actors.process import agent, close_agent, start_agent
from raynixl.actors.weights import WeightSync, publish, subscribe

__all__ = [
    "GcsDirectory",
    "WeightSync",
    "agent",
    "agent_name",
    "agent_names",
    "attach",
    "close_agent",
    "list_agents",
    "publish",
    "start_agent",
    "subscribe",
    "worker",
]

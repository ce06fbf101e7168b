"""Agents: the endpoint of a process, which owns its backends, regions and peers (`raynixl.agent` is a function)."""

from raynixl.agents.agent import Agent
from raynixl.agents.inbox import Inbox, Notification
from raynixl.agents.peer import Peer
from raynixl.agents.prepared import Prepared
from raynixl.agents.transfer import Transfer, TransferStatistics

__all__ = ["Agent", "Inbox", "Notification", "Peer", "Prepared", "Transfer", "TransferStatistics"]

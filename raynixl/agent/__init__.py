"""The agent: the endpoint of a process, which owns its backends, regions and peers."""

from raynixl.agent.agent import Agent
from raynixl.agent.inbox import Inbox, Notification
from raynixl.agent.peer import Peer
from raynixl.agent.prepared import Prepared
from raynixl.agent.transfer import Transfer, TransferStatistics

__all__ = ["Agent", "Inbox", "Notification", "Peer", "Prepared", "Transfer", "TransferStatistics"]

"""Peers: other agents, known by name; each use finds their present incarnation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raynixl.config import check_timeout
from raynixl.errors import RegionUnknown
from raynixl.record import check_name
from raynixl.region import RemoteRegion

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.reply import Reply


class Peer:
    """Another agent. Stays valid when the peer restarts: its name is looked up again at the next use."""

    __slots__ = ("_agent", "name")

    def __init__(self, agent: Agent, name: str) -> None:
        self._agent = agent
        self.name = name

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, {'connected' if self.is_connected else 'not connected'})"

    @property
    def is_connected(self) -> bool:
        """Whether a connection stands now."""
        return self.incarnation != ""

    @property
    def incarnation(self) -> str:
        """The incarnation that we are connected to, or '' while we are not; `connect` finds it."""
        connection = self._agent.connector.current(self.name)
        return "" if connection is None or connection.lost is not None else connection.incarnation

    def connect(self, timeout: float | None = None) -> str:
        """Connect now instead of at first use; return the peer's incarnation."""
        self._agent.check_open()
        return self._agent.connector.connect(self.name, self._deadline(timeout)).incarnation

    def __getitem__(self, name: str) -> RemoteRegion:
        """Return a region of the peer by its name, as the peer has it now."""
        return self.region(name)

    def region(self, name: str, *, timeout: float | None = None) -> RemoteRegion:
        """Return a region of the peer by its name; waits up to `timeout` for it to be registered.

        Raises:
            RegionUnknown: the peer has no region of that name.
            PeerUnknown, PeerLost, TransferTimeout: the peer cannot be asked.
            ConfigError: that is no name, or no deadline.
        """
        check_name(name, "region name")
        self._agent.check_open()
        deadline = self._deadline(timeout)
        pause = 0.001
        while True:
            connection = self._agent.connector.connect(self.name, deadline)
            with connection.lock:
                known = connection.regions.get(name)
            if known is not None:
                return known
            try:
                return self._agent.consent.ask_for_region(connection, name, deadline)
            except RegionUnknown:
                if timeout is None or time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)  # registration announces nothing; asking again is one round trip
                pause = min(0.1, pause * 2)

    def notify(self, payload: bytes, *, timeout: float | None = None) -> None:
        """Send a notification alone; connects first if need be."""
        self._agent.notify(self.name, payload, timeout=timeout)

    def send(self, topic: str, payload: bytes, *, timeout: float | None = None) -> None:
        """Put a message into the peer's inbox of that topic; connects first if need be."""
        self._agent.send(self.name, topic, payload, timeout=timeout)

    def ask(self, topic: str, payload: bytes = b"", *, timeout: float | None = None) -> Reply:
        """Send a request to the peer's handler of that topic; the reply is waited for or awaited."""
        return self._agent.ask(self.name, topic, payload, timeout=timeout)

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + check_timeout(timeout, self._agent.config.connect_timeout)


def name_of(peer: str | Peer) -> str:
    """Return the name of a peer that is given by its name or as itself."""
    if isinstance(peer, Peer):
        return peer.name
    return peer if isinstance(peer, str) else check_name(peer, "peer name")

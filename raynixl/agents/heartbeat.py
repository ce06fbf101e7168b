"""Heartbeat: asks silent peers whether they are there, and gives up those that are frozen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raynixl.errors import PeerLost, RaynixlError
from raynixl.messages import Message, MessageKind

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.connection import Connection


class Heartbeat:
    """Beats at config.heartbeat_interval; a peer that speaks costs nothing."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._timer = agent.reactor.call_later(agent.config.heartbeat_interval, self._beat)

    def stop(self) -> None:
        """Beat no more."""
        self._timer.cancel()

    def _beat(self) -> None:
        agent = self._agent
        now = time.monotonic()
        try:
            for connection in agent.connector.all():
                self._look(connection, now)
            agent.control.expire_replies(now)
        finally:
            if not agent.is_closed:
                self._timer = agent.reactor.call_later(agent.config.heartbeat_interval, self._beat)

    def _look(self, connection: Connection, now: float) -> None:
        config = self._agent.config
        silence = now - connection.heard
        if connection.lost is not None or silence < config.heartbeat_interval:
            return
        try:
            link = connection.link
        except RaynixlError:
            return
        if silence > config.heartbeat_timeout and link.is_frozen():
            link.close(_unheard(connection.name, silence, is_here=getattr(link, "pid", 1) != 0))
            return
        self._agent.control.try_send(link, Message(MessageKind.PING))


def _unheard(peer: str, silence: float, *, is_here: bool) -> PeerLost:
    if is_here:
        return PeerLost(
            f"peer {peer!r} is frozen: stopped, and silent for {silence:.1f} s",
            hint="resume it with SIGCONT; the next use connects again", peer=peer,
        )  # fmt: skip
    return PeerLost(
        f"peer {peer!r} has been silent for {silence:.1f} s, and does not even answer a one-sided read",
        hint="its process is stopped, or the network to its host is cut; the next use connects again", peer=peer,
    )  # fmt: skip

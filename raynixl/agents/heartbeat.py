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
            link.close(
                PeerLost(
                    f"peer {connection.name!r} is frozen: stopped, and silent for {silence:.1f} s",
                    hint="resume it with SIGCONT; the next use connects again", peer=connection.name,
                )
            )  # fmt: skip
            return
        self._agent.control.try_send(link, Message(MessageKind.PING))

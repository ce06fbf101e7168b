"""Far channels: how lines and rows reach a peer whose memory is not mapped here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raynixl.moe.channel import Directions

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.window import Window
    from raynixl.moe.hello import Hello


class FarChannel:
    """A peer over a network: rows are gathered and written one-sided, and lines follow as messages."""

    is_direct = False

    def __init__(
        self, agent: Agent, ranks: int, *, me: int, hello: Hello, board: Window, directions: Directions, topic: str
    ) -> None:
        raise NotImplementedError

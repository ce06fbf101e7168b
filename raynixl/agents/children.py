"""Forked children: they must not use the agents of their parent, whose threads they do not have."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

_AGENTS: weakref.WeakSet[Agent] = weakref.WeakSet()


def refuse_in_children(agent: Agent) -> None:
    """Have every forked child of this process refuse to post with an agent, also by what was prepared before."""
    _AGENTS.add(agent)


def _close_gates() -> None:
    for agent in list(_AGENTS):
        agent.regions.close_in_child()


os.register_at_fork(after_in_child=_close_gates)

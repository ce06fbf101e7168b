"""What an agent has counted so far, put together."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from raynixl.telemetry import AgentStatistics, RouteStatistics

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent


def statistics_of(agent: Agent, routes: Sequence[RouteStatistics], uptime: float) -> AgentStatistics:
    """Return an agent's statistics; `routes` are those of its routes, `uptime` its seconds."""
    open_ones = [one for one in agent.connector.all() if one.lost is None]
    return AgentStatistics(
        name=agent.name,
        uptime=uptime,
        regions=len(agent.regions),
        peers=len(open_ones),
        transfers=sum(route.transfers for route in routes),
        nbytes=sum(route.nbytes for route in routes),
        failures=sum(route.failures for route in routes),
        notifications_sent=agent.control.sent,
        notifications_received=agent.control.received,
        routes=tuple(routes),
        dropped=MappingProxyType(dict(agent.control.dropped)),
    )

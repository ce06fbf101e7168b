"""What an agent counts: frozen records of bytes, transfers, failures and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class RouteStatistics:
    """What one backend carried to and from one peer since the agent started."""

    backend: str
    peer: str
    transfers: int = 0
    nbytes: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class AgentStatistics:
    """A snapshot of an agent's counters; `dropped` are malformed or unwanted messages, by reason."""

    name: str
    uptime: float
    regions: int
    peers: int
    transfers: int
    nbytes: int
    failures: int
    notifications_sent: int
    notifications_received: int
    routes: tuple[RouteStatistics, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class RouteCounter:
    """The running counts behind one `RouteStatistics`; written by many threads, exact per thread switch.

    Each field is bumped by one augmented assignment outside any lock: a lost count under contention is
    accepted, a lock on the path of a one-microsecond write is not.
    """

    __slots__ = ("backend", "failures", "nbytes", "peer", "transfers")

    def __init__(self, backend: str, peer: str) -> None:
        self.backend = backend
        self.peer = peer
        self.transfers = 0
        self.nbytes = 0
        self.failures = 0

    def snapshot(self) -> RouteStatistics:
        """Return the counts as they stand."""
        return RouteStatistics(self.backend, self.peer, self.transfers, self.nbytes, self.failures)

"""The contract of a directory of agent records."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from raynixl.record import AgentRecord


@runtime_checkable
class Directory(Protocol):
    """Publishes and finds agent records by name. Methods are called from any thread and bounded in time.

    At most one live agent holds a name. A record whose lease has ended, or whose agent is known to be dead,
    may be replaced and removed by anybody who notices.
    """

    has_leases: bool
    """Whether records must be renewed before they expire."""

    def publish(self, record: AgentRecord) -> None:
        """Publish or renew a record.

        Raises:
            ConfigError: another live agent (other incarnation, not known dead) holds the name.
        """

    def withdraw(self, name: str, incarnation: str) -> None:
        """Remove the record if it is still that incarnation's; otherwise do nothing."""

    def find(self, name: str) -> AgentRecord | None:
        """Return the live record of that name, fresh from the store."""

    def list(self) -> list[AgentRecord]:
        """Return all live records."""

    def close(self) -> None:
        """Let go of what the directory holds; idempotent."""

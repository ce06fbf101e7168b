"""A directory in this process's memory, for tests and programs without Ray."""

from __future__ import annotations

import threading
import time

from raynixl.errors import ConfigError
from raynixl.record import AgentRecord


class InMemoryDirectory:
    """Agents of one process find each other here; share one object among them."""

    has_leases = False  # agents and records end together with the process

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _records
        self._records: dict[str, AgentRecord] = {}

    def publish(self, record: AgentRecord) -> None:
        """Publish or renew a record; a name may be taken over from an expired or dead incarnation only."""
        with self._lock:
            held = self._records.get(record.name)
            if held is not None and held.incarnation != record.incarnation and _is_live(held):
                raise ConfigError(f"agent name {record.name!r} is taken", hint="close that agent or use another name")
            self._records[record.name] = record

    def withdraw(self, name: str, incarnation: str) -> None:
        """Remove the record if it is still that incarnation's."""
        with self._lock:
            held = self._records.get(name)
            if held is not None and held.incarnation == incarnation:
                del self._records[name]

    def find(self, name: str) -> AgentRecord | None:
        """Return the live record of that name."""
        with self._lock:
            held = self._records.get(name)
        return held if held is not None and _is_live(held) else None

    def list(self) -> list[AgentRecord]:
        """Return all live records."""
        with self._lock:
            return [record for record in self._records.values() if _is_live(record)]

    def close(self) -> None:
        """Forget all records."""
        with self._lock:
            self._records.clear()


def _is_live(record: AgentRecord) -> bool:
    return record.expires == 0.0 or record.expires > time.time()

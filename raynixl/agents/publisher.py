"""The publisher: keeps the agent's record in the directory, renewed before its lease ends."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from raynixl.directory import Directory, InMemoryDirectory
from raynixl.errors import RaynixlError
from raynixl.record import AgentRecord

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

logger = logging.getLogger(__name__)

_FIRST_LOOK, _LAST_LOOK = 0.02, 2.0  # seconds


class Publisher:
    """Publishes at start, after changes, and at a third of each lease; withdraws at the end.

    A directory with leases gets a thread, so that its outages delay nobody; one without is written at once.
    """

    def __init__(self, agent: Agent, directory: Directory | None) -> None:
        self._agent = agent
        self.directory: Directory = InMemoryDirectory() if directory is None else directory
        self._introduced: dict[str, AgentRecord] = {}  # each use is one step that no thread switch cuts
        self._wake = threading.Event()
        self._suspects: dict[str, float] = {}  # agents that we lost, and the pause before the next look
        self._is_changed = False
        self._is_closed = False
        self._is_published = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Publish for the first time.

        Raises:
            ConfigError: the name is taken.
        """
        self.directory.publish(self._record())
        self._is_published = True
        if self.directory.has_leases:
            self._thread = threading.Thread(target=self._renew, name="raynixl-lease", daemon=True)
            self._thread.start()

    def touch(self) -> None:
        """Publish the changed record soon."""
        if self._thread is not None:
            self._is_changed = True
            self._wake.set()
        elif self._is_published and not self._is_closed:
            self._publish_again()

    def suspect(self, name: str) -> None:
        """Have the directory look soon whether an agent that we lost lives: the record of a dead one is removed."""
        if self._thread is not None:
            self._suspects[name] = _FIRST_LOOK
            self._wake.set()

    def find(self, name: str) -> AgentRecord | None:
        """Return the live record of a name: from the directory, or as introduced."""
        record = self.directory.find(name)
        return self._introduced.get(name) if record is None else record

    def introduce(self, record: AgentRecord) -> None:
        """Keep the record of a peer that no directory knows."""
        self._introduced[record.name] = record

    def wait_for(self, name: str, timeout: float) -> bool:
        """Return whether a name is published, waiting for it up to `timeout`."""
        deadline = time.monotonic() + timeout
        pause = 0.005
        while True:
            if self.find(name) is not None:
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._is_closed:
                return False
            time.sleep(min(pause, remaining))  # no directory can be watched: look again, ever less often
            pause = min(0.25, pause * 2)

    def close(self) -> None:
        """Withdraw the record and stop."""
        if self._is_closed:
            return
        self._is_closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._agent.config.request_timeout)
        if not self._is_published:
            return
        try:
            self.directory.withdraw(self._agent.name, self._agent.incarnation)
        except RaynixlError as exc:
            logger.warning("could not remove the record of %r: %s", self._agent.name, exc)

    def _record(self) -> AgentRecord:
        lease = self._agent.config.lease_seconds if self.directory.has_leases else 0.0
        return self._agent.make_record(time.time() + lease if lease else 0.0)

    def _renew(self) -> None:
        due = time.monotonic() + self._agent.config.lease_seconds / 3
        while not self._is_closed:
            self._wake.wait(max(0.0, min([due - time.monotonic(), *list(self._suspects.values())])))
            self._wake.clear()
            self._look_for_suspects()
            if self._is_closed:
                return
            if self._is_changed or time.monotonic() >= due:
                self._is_changed = False
                due = time.monotonic() + self._agent.config.lease_seconds / 3
                self._publish_again()

    def _look_for_suspects(self) -> None:
        """Look for each that we lost, and again later while it is found: connections end before their process."""
        for name, pause in list(self._suspects.items()):
            try:
                found = self.directory.find(name)
            except RaynixlError as exc:
                logger.debug("could not look for the record of %r: %s", name, exc)
                found = None
            if found is None or pause > _LAST_LOOK:
                self._suspects.pop(name, None)
            else:
                self._suspects[name] = 2 * pause

    def _publish_again(self) -> None:
        """Publish, and go on without if that fails: peers that know us need no record, and it is tried again."""
        try:
            self.directory.publish(self._record())
        except RaynixlError as exc:
            logger.warning("could not renew the record of %r: %s", self._agent.name, exc)

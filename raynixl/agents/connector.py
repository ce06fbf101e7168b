"""The connector: finds, connects and reconnects peers, and binds their regions."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from raynixl.agents.binder import Binder, Claim
from raynixl.agents.connection import Connection
from raynixl.agents.transfer import Transfer
from raynixl.backends.base import Binding, Link
from raynixl.errors import (
    AgentClosed,
    BackendUnavailable,
    ConfigError,
    PeerLost,
    PeerRestarted,
    PeerUnknown,
    RaynixlError,
    TransferTimeout,
)
from raynixl.record import AgentRecord

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.prepared import Prepared, Route

MAX_LOST = 256
"""So many peers that are gone are remembered, the latest: agents of many names may come and go for months."""


class Connector:
    """Finds, connects and reconnects peers; each peer has a thread of its own for as long as that takes."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._binder = Binder(agent)
        self._lock = threading.Lock()  # protects everything below
        self._connections: dict[str, Connection] = {}
        self._enough = 2 * MAX_LOST  # connections, for those that are lost to be looked through
        self._replaced: dict[str, None] = {}  # incarnations that a later one has replaced, the latest of them
        self._making: dict[str, threading.Lock] = {}
        self._pending: dict[str, list[tuple[Prepared, Transfer]]] = {}
        self._threads: set[threading.Thread] = set()
        self._is_closed = False

    def current(self, name: str) -> Connection | None:
        """Return what we hold for a peer, lost or not."""
        with self._lock:
            return self._connections.get(name)

    def all(self) -> list[Connection]:
        """Return every connection."""
        with self._lock:
            return list(self._connections.values())

    def by_link(self, link: Link) -> Connection | None:
        """Return the connection that a link belongs to."""
        connection = self.current(link.peer)
        if connection is not None and connection.incarnation == link.incarnation:
            return connection
        return None

    def accept(self, link: Link) -> None:
        """Take a link that a peer opened; a new incarnation replaces the old one, and no replaced one comes back.

        It may try: a process that was frozen, and replaced under its name meanwhile, wakes and knows nothing of that.
        """
        with self._lock:
            old = self._connections.get(link.peer)
            is_replaced = link.incarnation in self._replaced
            if not is_replaced:
                if old is not None and old.incarnation == link.incarnation and old.add_link(link):
                    return
                connection = Connection(link.peer, link.incarnation, None)
                connection.links.append(link)
                self._remember(connection)
        if is_replaced:
            link.close(_restarted(link.peer))
        elif old is not None and old.incarnation != link.incarnation:
            old.lose(_restarted(link.peer))

    def messenger(self, link: Link) -> Link:
        """Return the link that carries messages beside one that carries none.

        Raises:
            PeerLost: the connection is lost.
        """
        connection = self.by_link(link)
        if connection is None:
            raise PeerLost(f"peer {link.peer!r} is lost", peer=link.peer)
        return connection.link

    def connect(self, name: str, deadline: float) -> Connection:
        """Return an open connection with a peer's present incarnation, made now if need be. Blocks.

        Raises:
            PeerUnknown, PeerLost, TransferTimeout, BackendUnavailable, ConfigError: as they say.
        """
        connection = self.current(name)
        if connection is not None and connection.lost is None:
            return connection
        with self._lock:
            making = self._making.setdefault(name, threading.Lock())
        if not making.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransferTimeout(f"peer {name!r} was not connected in time", peer=name)
        try:
            connection = self.current(name)
            if connection is not None and connection.lost is None:
                return connection
            return self._make(name, connection, deadline)
        finally:
            making.release()

    def submit(self, prepared: Prepared, transfer: Transfer) -> None:
        """Start a transfer once its peer is connected and its regions are bound; does not block."""
        with self._lock:
            waiting = self._pending.get(prepared.peer)
            if not self._is_closed and waiting is not None:
                waiting.append((prepared, transfer))
                return
            error = self._closed() if self._is_closed else self._start(prepared, transfer)
        if error is not None:
            transfer.failed(error)

    def _start(self, prepared: Prepared, transfer: Transfer) -> RaynixlError | None:
        """Give a peer its thread, or return why there is none; _lock is held."""
        thread = threading.Thread(target=self._work, args=(prepared.peer,), name="raynixl-connect", daemon=True)
        self._pending[prepared.peer] = [(prepared, transfer)]
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as exc:  # the process may have no more threads
            del self._pending[prepared.peer]
            self._threads.discard(thread)
            return BackendUnavailable(
                f"{prepared.summary} got no thread: {exc}", hint="raise the limit of threads (ulimit -u, pids.max)",
                peer=prepared.peer,
            )  # fmt: skip
        return None

    def bind(self, claim: Claim, deadline: float) -> list[Binding]:
        """Connect the peer of an operation or a window, bind its regions, and return the bindings. Blocks.

        Raises:
            RaynixlError: whatever stands in the way.
        """
        connection = self._connect_to(claim, deadline)
        if not connection.binding.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransferTimeout(f"the regions of {claim.peer!r} were not bound in time", peer=claim.peer)
        try:
            return self._binder.bind(connection, claim, deadline)
        finally:
            connection.binding.release()

    def bind_now(self, prepared: Prepared) -> Route | None:
        """Bind an operation if its peer is connected and its regions are bound already; never waits."""
        connection = self.current(prepared.peer)
        if connection is None or connection.incarnation != prepared.incarnation:
            return None
        bindings = self._binder.held(connection, prepared)
        if bindings is None:
            return None
        try:
            return prepared.bind(bindings)
        except (PeerLost, BackendUnavailable):  # meanwhile; or the backend finds only now that it cannot
            return None

    def close(self, timeout: float) -> None:
        """Take no more work, lose every connection, and wait for those that are being made."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            threads, making = list(self._threads), list(self._making.values())
            waiting = [entry for entries in self._pending.values() for entry in entries]
        for _, transfer in waiting:
            transfer.failed(self._closed())
        for connection in self.all():
            connection.lose(self._closed(connection.name))
        for lock in making:
            if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                lock.release()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _closed(self, peer: str = "") -> AgentClosed:
        return AgentClosed(f"agent {self._agent.name!r} was closed", peer=peer)

    def _connect_to(self, claim: Claim, deadline: float) -> Connection:
        """Return the connection with the incarnation that the claim names."""
        connection = self.connect(claim.peer, deadline)
        if connection.incarnation != claim.incarnation:
            raise PeerRestarted(f"peer {claim.peer!r} restarted; its regions of before are gone", peer=claim.peer)
        return connection

    def _make(self, name: str, old: Connection | None, deadline: float) -> Connection:
        agent = self._agent
        agent.check_open()
        record = agent.find(name)
        if record is None:
            if old is not None and old.lost is not None:
                raise PeerLost(f"peer {name!r} is gone: {old.lost.message}", hint="start it again", peer=name)
            raise PeerUnknown(
                f"no agent named {name!r} is published",
                hint="see `raynixl agents`, or wait for it",
                peer=name,
            )
        until = min(deadline, time.monotonic() + agent.config.connect_timeout)
        try:
            link = self._open_link(record, until)
        except PeerLost:
            agent.publisher.suspect(name)  # it may live and have hung up: the directory removes only the dead
            raise
        connection = self._take(link, record)
        if link.lost is not None:
            connection.lose(link.lost)
            raise link.lost.afresh()
        return connection

    def _take(self, link: Link, record: AgentRecord) -> Connection:
        """Take a link that we opened; the peer may have connected to us meanwhile, and we may have been closed."""
        with self._lock:
            is_closed = self._is_closed
            present = self._connections.get(record.name)
            is_same = present is not None and present.incarnation == record.incarnation
            if present is not None and is_same and present.add_link(link):
                present.record = record
                connection = present
            else:
                connection = Connection(record.name, record.incarnation, record)
                connection.links.append(link)
                if not is_closed:
                    self._remember(connection)
        if present is not None and not is_same:
            present.lose(_restarted(record.name))
        if is_closed:
            link.close(self._closed(record.name))
            raise self._closed(record.name)
        return connection

    def _remember(self, connection: Connection) -> None:
        """Hold a connection; of those that are lost, the latest only. _lock is held."""
        old = self._connections.pop(connection.name, None)
        self._connections[connection.name] = connection
        if old is not None and old.incarnation < connection.incarnation:  # so says the clock; else nobody can tell
            self._replaced[old.incarnation] = None
            if len(self._replaced) > MAX_LOST:
                del self._replaced[next(iter(self._replaced))]
        if len(self._connections) >= self._enough:
            lost = [name for name, one in self._connections.items() if one.lost is not None]
            for name in lost[:-MAX_LOST]:
                del self._connections[name]
            self._enough = len(self._connections) + MAX_LOST

    def _open_link(self, record: AgentRecord, deadline: float) -> Link:
        reasons = []
        for backend in self._agent.backends:
            reason = "it carries no messages" if not backend.capabilities.messages else backend.reaches(record)
            if not reason:
                return backend.connect(record, deadline)
            reasons.append(f"{backend.name}: {reason}")
        raise BackendUnavailable(
            f"no backend reaches {record.name!r} ({'; '.join(reasons)})",
            hint="run both on one host, or enable a backend for networks", peer=record.name,
        )  # fmt: skip

    def _work(self, name: str) -> None:
        """Serve what waits for one peer, then leave."""
        while True:
            with self._lock:
                waiting = self._pending[name]
                if not waiting:
                    del self._pending[name]
                    self._threads.discard(threading.current_thread())
                    return
                self._pending[name] = []
            for prepared, transfer in waiting:
                self._begin(prepared, transfer)

    def _begin(self, prepared: Prepared, transfer: Transfer) -> None:
        if transfer.done:  # cancelled, or its deadline passed
            return
        try:
            self.bind(prepared, transfer.deadline)
            prepared.run_for(transfer)
        except RaynixlError as exc:
            transfer.failed(exc)
        except Exception as exc:  # noqa: BLE001 - thread edge: the one who waits gets whatever it was
            error = ConfigError(f"{prepared.summary} failed: {exc!r}", hint="please report this", peer=prepared.peer)
            error.__cause__ = exc
            transfer.failed(error)


def _restarted(name: str) -> PeerRestarted:
    return PeerRestarted(f"peer {name!r} lives again as another incarnation", peer=name)

"""Connections: what an agent holds for one incarnation of a peer, and the thread that makes them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.agents.transfer import Transfer
from raynixl.backends.base import Backend, Binding, Link
from raynixl.errors import (
    BackendUnavailable,
    ConfigError,
    PeerLost,
    PeerRestarted,
    PeerUnknown,
    RaynixlError,
    TransferTimeout,
)
from raynixl.memory import MemoryKind
from raynixl.native import LOST, STALE
from raynixl.record import AgentRecord
from raynixl.region import RemoteRegion, check_descriptor

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.prepared import Prepared

logger = logging.getLogger(__name__)


Kinds = frozenset[tuple[MemoryKind, MemoryKind]]


@dataclass(frozen=True, slots=True)
class _Need:
    """What a binding is for."""

    prepared: Prepared
    fds: Sequence[int]
    deadline: float

    @property
    def kinds(self) -> Kinds:
        """The (local, remote) kinds of memory that take part."""
        plan = self.prepared
        return frozenset((ours.kind, theirs.kind) for ours in plan.local for theirs in plan.remote)


class Connection:
    """One incarnation of a peer: its links, and its regions that we have made reachable."""

    def __init__(self, name: str, incarnation: str, record: AgentRecord | None) -> None:
        self.name = name
        self.incarnation = incarnation
        self.record = record
        self.links: list[Link] = []
        self.lost: RaynixlError | None = None
        self.heard = time.monotonic()
        self.regions: dict[str, RemoteRegion] = {}  # by name, as the peer told us
        self.bindings: dict[tuple[int, int], Binding] = {}  # by region id and generation
        self.lock = threading.Lock()  # protects links, regions, bindings, lost
        self.binding = threading.Lock()  # held while a region is bound, so that it is bound once

    def __repr__(self) -> str:
        return f"Connection({self.name!r}, {self.incarnation[:8]}, {self.lost or 'open'})"

    @property
    def link(self) -> Link:
        """The link that carries messages."""
        with self.lock:
            for link in self.links:
                if link.lost is None:
                    return link
        raise self.lost or PeerLost(f"peer {self.name!r} is lost", peer=self.name)

    def lose(self, error: RaynixlError) -> None:
        """Close every gate to the peer, end what is in flight, and unmap its memory."""
        with self.lock:
            if self.lost is not None:
                return
            self.lost = error
            bindings, links = list(self.bindings.values()), list(self.links)
            self.bindings.clear()
            self.regions.clear()
        for binding in bindings:
            binding.gate.close(LOST)
        for link in links:
            link.close(error)
        _release(bindings)

    def withdraw(self, region_id: int) -> list[Binding]:
        """Refuse new transfers with a region that its owner withdraws; return what is still bound to it."""
        with self.lock:
            gone = {key: binding for key, binding in self.bindings.items() if key[0] == region_id}
            for key in gone:
                del self.bindings[key]
            self.regions = {name: region for name, region in self.regions.items() if region.id != region_id}
        for binding in gone.values():
            binding.gate.close(STALE, abort=False)
        return list(gone.values())


def _release(bindings: list[Binding]) -> None:
    """Unmap as soon as no thread is inside; at once if possible, so that nothing of the dead stays mapped."""
    busy = []
    for binding in bindings:
        if binding.gate.drain(0.0):
            binding.release()
        else:
            busy.append(binding)
    if busy:
        threading.Thread(target=_drain_and_release, args=(busy,), name="raynixl-release", daemon=True).start()


def _drain_and_release(bindings: list[Binding]) -> None:
    for binding in bindings:
        while not binding.gate.drain(60.0):
            logger.warning("a transfer with %s does not end", binding.remote.label)
        binding.release()


class Connector:
    """Finds, connects and reconnects peers; each peer has a thread of its own for as long as that takes."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()  # protects everything below
        self._connections: dict[str, Connection] = {}
        self._making: dict[str, threading.Lock] = {}
        self._pending: dict[str, list[tuple[Prepared, Transfer]]] = {}
        self._threads: set[threading.Thread] = set()

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

    def accept(self, link: Link) -> Connection:
        """Take a link that a peer opened; a new incarnation replaces the old one."""
        with self._lock:
            old = self._connections.get(link.peer)
            if old is not None and old.incarnation == link.incarnation and old.lost is None:
                with old.lock:
                    old.links.append(link)
                return old
            connection = Connection(link.peer, link.incarnation, None)
            connection.links.append(link)
            self._connections[link.peer] = connection
        if old is not None and old.incarnation != link.incarnation:
            old.lose(PeerRestarted(f"peer {link.peer!r} lives again as another incarnation", peer=link.peer))
        return connection

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
            if waiting is not None:
                waiting.append((prepared, transfer))
                return
            self._pending[prepared.peer] = [(prepared, transfer)]
            thread = threading.Thread(target=self._work, args=(prepared.peer,), name="raynixl-connect", daemon=True)
            self._threads.add(thread)
        thread.start()

    def bind(self, prepared: Prepared, deadline: float) -> list[Binding]:
        """Connect the peer of an operation, bind its regions, and return the bindings. Blocks.

        Raises:
            RaynixlError: whatever stands in the way.
        """
        connection = self._connect_to(prepared, deadline)
        with connection.binding:
            bindings = [self._bind(connection, remote, prepared, deadline) for remote in prepared.remote]
        prepared.bind(bindings)
        return bindings

    def bind_now(self, prepared: Prepared) -> bool:
        """Bind an operation if its peer is connected and its regions are bound already; never waits."""
        connection = self.current(prepared.peer)
        if connection is None or connection.incarnation != prepared.incarnation:
            return False
        with connection.lock:
            held = connection.bindings
            found = [held.get((remote.id, remote.generation)) for remote in prepared.remote]
        wanted = zip(prepared.remote, found, strict=True)
        bindings = [binding for remote, binding in wanted if binding is not None and binding.remote == remote]
        if len(bindings) < len(found):
            return False
        prepared.bind(bindings)
        return True

    def close(self, timeout: float) -> None:
        """Lose every connection and join the threads."""
        for connection in self.all():
            connection.lose(PeerLost(f"agent {self._agent.name!r} was closed", peer=connection.name))
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def _connect_to(self, prepared: Prepared, deadline: float) -> Connection:
        """Return the connection with the incarnation that the operation names."""
        connection = self.connect(prepared.peer, deadline)
        if connection.incarnation != prepared.incarnation:
            raise PeerRestarted(
                f"peer {prepared.peer!r} restarted; its regions of before are gone",
                hint="look them up again: agent.peer(name)[region]", peer=prepared.peer,
            )  # fmt: skip
        return connection

    def _make(self, name: str, old: Connection | None, deadline: float) -> Connection:
        agent = self._agent
        agent.check_open()
        record = agent.find(name)
        if record is None:
            if old is not None and old.lost is not None:
                raise PeerLost(f"peer {name!r} is gone: {old.lost}", hint="start it again", peer=name)
            raise PeerUnknown(
                f"no agent named {name!r} is published",
                hint="see `raynixl agents`, or wait for it",
                peer=name,
            )
        until = min(deadline, time.monotonic() + agent.config.connect_timeout)
        try:
            link = self._open_link(record, until)
        except PeerLost:
            agent.forget(record)
            raise
        with self._lock:
            present = self._connections.get(name)
            if present is not None and present.lost is None and present.incarnation == record.incarnation:
                connection = present  # the peer connected to us meanwhile
                connection.record = record
            else:
                connection = self._connections[name] = Connection(name, record.incarnation, record)
            connection.links.append(link)
        if link.lost is not None:
            connection.lose(link.lost)
            raise link.lost
        return connection

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

    def _bind(self, connection: Connection, remote: RemoteRegion, prepared: Prepared, deadline: float) -> Binding:
        key = (remote.id, remote.generation)
        with connection.lock:
            held = connection.bindings.get(key)
        if held is not None:
            check_descriptor(remote, held.remote.record)
            return held
        fds = self._agent.control.ask_to_bind(connection, remote, deadline)
        try:
            binding = self._choose(connection, remote, _Need(prepared, fds, deadline))
        finally:
            _close_all(fds)
        with connection.lock:
            if connection.lost is None:
                connection.bindings[key] = binding
                return binding
        binding.release()
        raise connection.lost

    def _choose(self, connection: Connection, remote: RemoteRegion, need: _Need) -> Binding:
        """Bind with the first backend that can carry these kinds of memory."""
        reasons = []
        for backend in self._agent.backends:
            reason = refusal(backend, remote, need.kinds)
            if not reason:
                try:
                    link = self._link(connection, backend, need.deadline)
                    return backend.bind(link, remote, need.fds)
                except BackendUnavailable as exc:
                    reason = str(exc)
            reasons.append(f"{backend.name}: {reason}")
        raise BackendUnavailable(
            f"no backend carries {kind_names(need.kinds)} to {remote.label} ({'; '.join(reasons)})",
            hint="see agent.explain() and `raynixl doctor`", peer=remote.owner,
        )  # fmt: skip

    def _link(self, connection: Connection, backend: Backend, deadline: float) -> Link:
        """Return the backend's link with the peer, made now if there is none."""
        with connection.lock:
            for link in connection.links:
                if link.backend == backend.name and link.lost is None:
                    return link
        if connection.record is None:
            connection.record = self._agent.control.ask_for_record(connection, deadline)
        reason = backend.reaches(connection.record)
        if reason:
            raise BackendUnavailable(reason, peer=connection.name)
        link = backend.connect(connection.record, deadline)
        with connection.lock:
            connection.links.append(link)
        return link

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
        try:
            self.bind(prepared, transfer.deadline)
            prepared.run_all(transfer)
        except RaynixlError as exc:
            transfer.failed(exc)
        except Exception as exc:  # noqa: BLE001 - thread edge: the one who waits gets whatever it was
            error = ConfigError(f"{prepared.summary} failed: {exc!r}", hint="please report this", peer=prepared.peer)
            error.__cause__ = exc
            transfer.failed(error)


def refusal(backend: Backend, remote: RemoteRegion, kinds: Kinds) -> str:
    """Return why a backend cannot carry these (local, remote) kinds to a region, or ''."""
    if not kinds <= backend.capabilities.kinds:
        return f"does not carry {kind_names(kinds)}"
    return "" if backend.name in remote.record.keys else f"{remote.owner!r} does not offer the region over it"


def kind_names(kinds: Kinds) -> str:
    """Return kinds as people write them: dram-vram."""
    return ", ".join(sorted(f"{ours.value}-{theirs.value}" for ours, theirs in kinds))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)

"""The agent: registers memory, finds peers, and moves bytes between them."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from raynixl.agents.children import refuse_in_children
from raynixl.agents.connector import Connector
from raynixl.agents.consent import Consent
from raynixl.agents.control import Control
from raynixl.agents.explanation import Explanation, explain
from raynixl.agents.heartbeat import Heartbeat
from raynixl.agents.messaging import Messaging
from raynixl.agents.peer import Peer, name_of
from raynixl.agents.prepared import Prepared
from raynixl.agents.publisher import Publisher
from raynixl.agents.regions import Regions
from raynixl.agents.selections import Selections
from raynixl.agents.statistics import statistics_of
from raynixl.agents.transfer import Transfer
from raynixl.agents.watcher import Watcher
from raynixl.agents.window import Window, open_window
from raynixl.backends import table
from raynixl.backends.base import Backend, Local, Op
from raynixl.conditions import Condition
from raynixl.config import AgentConfig, check_config, check_wait
from raynixl.errors import AgentClosed, ConfigError, PeerUnknown, RaynixlError
from raynixl.host import host_identity
from raynixl.memory import resolve
from raynixl.native import Engine, load
from raynixl.reactor import Reactor
from raynixl.record import AgentRecord, check_labels, check_name, new_incarnation
from raynixl.region import Region, RemoteRegion
from raynixl.telemetry import AgentStatistics, RouteCounter

if TYPE_CHECKING:
    from raynixl.directory import Directory

logger = logging.getLogger(__name__)


class Agent(Messaging):
    """The endpoint of a process. Close it, or use it as a context manager; every method may be called by any thread.

    Without a directory, peers are made known by the bytes of their records: `agent.peer(record_bytes)`.

    Raises:
        ConfigError: the name is not usable or taken, or the configuration names an unknown backend.
    """

    def __init__(
        self,
        name: str,
        *,
        config: AgentConfig | None = None,
        directory: Directory | None = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        self.name = check_name(name, "agent name")
        self.config = check_config(config)
        self.incarnation = new_incarnation()
        self.host = host_identity()
        self.transfer_timeout = self.config.transfer_timeout
        self.settled = Condition()  # protects the stages of transfers that did not end at once
        self._labels = check_labels(labels)
        self._started = time.time()
        self._pid = os.getpid()
        self._lock = threading.Lock()  # protects _counters, _is_closed
        self._counters: dict[tuple[str, str], RouteCounter] = {}
        self._is_closed = False
        self._has_ended = threading.Event()  # set when close is through
        self.native = load(self.config.native)
        self.reactor = Reactor(name)
        inline_nbytes = self.config.inline_nbytes * (4 if self.config.copy_threads == 1 else 1)
        self.engine: Engine = self.native.Engine(self.config.copy_threads, inline_nbytes)
        self.control = Control(self)
        self.consent = Consent(self, self.control)
        self.connector = Connector(self)
        self.watcher = Watcher(self.reactor)
        local = Local(
            self.name, self.incarnation, self.host, self.config, self.native, self.engine, self.reactor, self.control
        )  # fmt: skip
        self.backends: list[Backend] = []
        self.regions = Regions(self)
        self.publisher = Publisher(self, directory)
        self._heartbeat = Heartbeat(self)
        try:
            self.backends.extend(table.make(local))  # if one fails, close() finds those before it
            self.publisher.start()
        except BaseException:
            self.close()
            raise
        refuse_in_children(self)
        self._finalizer = weakref.finalize(self, _warn_unclosed, name, self._pid)

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, {'closed' if self._is_closed else self.incarnation[:8]})"

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)  # what the loop's other tasks wait for must still reach them

    # Memory

    def register(self, memory: Any, *, name: str = "") -> Region:
        """Make memory reachable by peers: a tensor, array, buffer or `MemorySpan`. No bytes are copied.

        The region holds on to the memory until `deregister`. A named region is found by `peer[name]`.

        Raises:
            ConfigError: not memory, not contiguous, or the name is taken or unusable.
            RangeError: empty or unmapped memory.
        """
        self.check_open()
        return self.regions.add(resolve(memory), name)

    def empty(self, nbytes: int, *, kind: str = "dram", device: int = 0, name: str = "") -> Region:
        """Return a region of fresh zeroed memory that peers on this host map, the fastest kind; "vram" is a GPU's.

        Raises:
            ConfigError, RangeError, BackendUnavailable: no such kind of memory, nor that much, nor a backend for it.
        """
        self.check_open()
        return self.regions.make(nbytes, kind, device, name)

    def deregister(self, region: Region) -> None:
        """Withdraw a region: refuse new transfers, wait for those in flight, then let go of the memory.

        Waits at most config.deregister_timeout; peers that have not let go by then lose their connection.

        Raises:
            RegionStale, RegionUnknown: it was deregistered already, or is another agent's.
        """
        self.regions.remove(region)

    # Peers

    def peer(self, peer: str | bytes, *, timeout: float = 0.0) -> Peer:
        """Return a peer by name, or by the bytes of its record; `timeout` waits for it to be published.

        Connects at first use.

        Raises:
            PeerUnknown: nobody of that name is published.
            IntegrityError: the bytes are not a record.
        """
        self.check_open()
        if isinstance(peer, bytes | bytearray | memoryview):
            record = AgentRecord.from_bytes(bytes(peer))
            self.publisher.introduce(record)
            return Peer(self, record.name)
        name, seconds = check_name(peer, "peer name"), check_wait(timeout)
        current = self.connector.current(name)
        if (current is None or current.lost is not None) and not self.publisher.wait_for(name, seconds):
            raise PeerUnknown(
                f"no agent named {name!r} is published",
                hint="see `raynixl agents`, or wait with timeout=",
                peer=name,
            )
        return Peer(self, name)

    def lost(self, peer: str | Peer) -> RaynixlError | None:
        """Return why the connection with a peer was lost, or None while it stands or was never made."""
        connection = self.connector.current(name_of(peer))
        lost = None if connection is None else connection.lost
        return None if lost is None else lost.afresh()

    def record(self) -> bytes:
        """Return this agent's record, for peers that share no directory."""
        return self.make_record(0.0).to_bytes()

    # Transfers

    def read(
        self,
        src: Selections,
        dst: Selections,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        digest: tuple[int, int] | None = None,
        stream: Any = None,
    ) -> Transfer:
        """Copy a peer's memory into ours without its help; returns at once. See `write`.

        With `digest=(position, seed)` the bytes are digested in the same pass where the path can do that (memory that
        is mapped): the transfer's `digest` then is that of raynixl.weights.digest, with the first byte of the
        destination's region at `position`. It is None elsewhere.
        """
        return Prepared(self, Op.READ, src, dst).post(notify=notify, timeout=timeout, digest=digest, stream=stream)

    def write(
        self,
        src: Selections,
        dst: Selections,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        stream: Any = None,
    ) -> Transfer:
        """Copy our memory into a peer's without its help; returns at once.

        The source must not change, nor the destination be read, until the transfer is done. Transfers to one
        peer may finish in any order; `notify` is delivered after this one's data is visible there.
        With `stream`, of CUDA, it follows what is on that stream now, and this thread does not wait for it.

        Raises:
            RangeError, RegionUnknown, RegionStale, RegionReadOnly, ConfigError, AgentClosed: the request is
            wrong on this side. What the peer does is carried by the handle.
        """
        return Prepared(self, Op.WRITE, src, dst).post(notify=notify, timeout=timeout, stream=stream)

    def prepare(self, op: str, src: Selections, dst: Selections) -> Prepared:
        """Check and resolve a 'read' or 'write' once, to post it many times; connects at the first post."""
        if op not in ("read", "write"):
            raise ConfigError(f"{op!r} is not an operation", hint="prepare 'read' or 'write'")
        return Prepared(self, Op(op), src, dst)

    def window(self, remote: RemoteRegion, *, timeout: float | None = None, device: int | None = None) -> Window:
        """Return a peer's region as it can be reached from here: by address where its memory is mapped.

        Connects and binds now, so it blocks, at most `timeout` (connect_timeout). With `device`, a peer's memory of a
        GPU as kernels of a GPU of ours reach it.

        Raises:
            PeerUnknown, PeerLost, PeerRestarted, RegionStale, BackendUnavailable, TransferTimeout: the peer or the
            region is gone, or cannot be reached.
            IntegrityError: the owner knows another region by that descriptor.
            ConfigError: that is no region of a peer.
        """
        return open_window(self, remote, timeout, device)

    def explain(self, src: Selections, dst: Selections) -> Explanation:
        """Say which backend carries src to dst, by which path, and why the others do not. Connects if need be."""
        return explain(self, src, dst)

    # Life

    @property
    def is_closed(self) -> bool:
        """Whether close was called."""
        return self._is_closed

    @property
    def native_name(self) -> str:
        """Which core copies: 'native' or 'ctypes'."""
        return self.native.NAME

    @property
    def directory(self) -> Directory:
        """Where this agent publishes itself and finds its peers."""
        return self.publisher.directory

    def statistics(self) -> AgentStatistics:
        """Return what this agent has counted so far."""
        with self._lock:
            routes = tuple(counter.snapshot() for counter in self._counters.values())
        return statistics_of(self, routes, time.time() - self._started)

    def close(self) -> None:
        """Withdraw the record, end what is in flight with typed errors, let go of everything. Idempotent.

        Returns when all is gone, also to a second caller. Called by a handler that is not threaded, it goes on
        without the caller.
        """
        if os.getpid() != self._pid:
            self._is_closed = True  # a forked child holds copies of the descriptors but none of the threads
            return
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
        if is_first and self.reactor.is_dispatching:
            threading.Thread(target=self._close, name="raynixl-close").start()
        elif is_first:
            self._close()
        elif not self.reactor.is_dispatching:
            self._has_ended.wait(self.config.connect_timeout + 2 * self.config.deregister_timeout)

    def _close(self) -> None:
        try:
            self._heartbeat.stop()
            self.publisher.close()
            self.regions.withdraw_all()
            self.control.say_bye()
            self.connector.close(self.config.connect_timeout)
            for backend in self.backends:
                backend.close()
            self.engine.close(self.config.deregister_timeout)
            self.reactor.close(max(1.0, self.config.deregister_timeout))
            self.control.close()
            self.watcher.close()
            self.regions.close()
            finalizer = getattr(self, "_finalizer", None)
            if finalizer is not None:
                finalizer.detach()
        finally:
            self._has_ended.set()

    # What the agent's own parts use

    def check_open(self) -> None:
        """Refuse work after close, and in a forked child."""
        if self._is_closed:
            raise AgentClosed(f"agent {self.name!r} is closed", hint="make a new one")
        if os.getpid() != self._pid:
            raise AgentClosed(f"agent {self.name!r} belongs to the parent process", hint="make one after fork")

    def make_record(self, expires: float) -> AgentRecord:
        """Return the record as it stands."""
        return AgentRecord(
            name=self.name, incarnation=self.incarnation, host=self.host, pid=self._pid, started=self._started,
            expires=expires, labels=self._labels,
            backends={backend.name: backend.local_metadata() for backend in self.backends},
            regions=self.regions.named_records(),
        )  # fmt: skip

    def find(self, name: str) -> AgentRecord | None:
        """Return a peer's record: from the directory, or as introduced."""
        return self.publisher.find(name)

    def link_moved_on(self) -> None:
        """Make whoever waits for a link look again: it is lost, or has sent what it held back."""
        with self.settled:
            self.settled.notify_all()
        self.watcher.look()

    def backend(self, name: str) -> Backend:
        """Return a backend by its name."""
        return table.named(self.backends, name)

    def counter(self, backend: str, peer: str) -> RouteCounter:
        """Return the counter of a route."""
        with self._lock:
            return self._counters.setdefault((backend, peer), RouteCounter(backend, peer))


def _warn_unclosed(name: str, pid: int) -> None:
    if os.getpid() == pid:
        logger.warning("agent %r was dropped without close()", name)

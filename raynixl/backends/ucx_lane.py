"""Lanes: how one link's peer is reached over UCX, by one endpoint on each of our rails."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import numpy as np

from raynixl.backends.base import Binding, Local
from raynixl.backends.stream_link import StreamLink
from raynixl.backends.ucx_filter import IpAddress
from raynixl.backends.ucx_guard import LEAVE_SECONDS, Guard
from raynixl.backends.ucx_key import Keys
from raynixl.backends.ucx_options import Lanes
from raynixl.backends.ucx_sockets import OwnSocket, own_sockets
from raynixl.errors import BackendUnavailable, RaynixlError
from raynixl.native import LOST, PENDING, RESET, Job, Program
from raynixl.native.ucx import Endpoint, Mapping, Rail, RemoteKey

_PROBE_PATIENCES = 10
"""The deadline of a probe, in patiences: late enough that it is still under way when it is looked at."""


@dataclass(frozen=True, slots=True)
class Way:
    """How one of our rails leads to one of the peer's, by number: by one endpoint, or one for writes and one for reads.

    Two where UCX emulates reads: they have a worker of their own then (`Runtime` tells why).
    """

    rail: int
    partner: int
    writer: Endpoint
    reader: Endpoint

    @property
    def endpoints(self) -> set[Endpoint]:
        """The one or two endpoints."""
        return {self.writer, self.reader}


@dataclass(frozen=True, slots=True)
class WayKeys:
    """The keys of a peer's region for the endpoints of one way."""

    write: RemoteKey
    read: RemoteKey

    def destroy(self) -> None:
        """Give them back."""
        self.write.destroy()
        self.read.destroy()


class Lane:
    """The endpoints to one peer, on those of our rails that reach one of its. One that fails takes the others with it;
    the next transfer makes a new lane.
    """

    def __init__(
        self, peer: str, rails: Sequence[Rail], workers: Sequence[bytes], readers: Callable[[int], Rail]
    ) -> None:
        self._peer = peer
        self._lock = threading.Lock()  # protects _bindings, _has_failed
        self._bindings: weakref.WeakSet[UcxBinding] = weakref.WeakSet()
        self._has_failed = False
        self._workers = tuple(workers)
        self._unguarded = 0  # connections whose sockets have not been seen yet
        self.ways: list[Way] = []
        refused: RuntimeError | None = None
        for number, rail in enumerate(rails):
            try:
                self.ways.append(_connect(number, rail, workers, readers))
            except RuntimeError as exc:
                refused = exc
            except BaseException:
                self.fail(LOST)
                raise
        if not self.ways:
            raise BackendUnavailable(
                f"UCX reaches {peer!r} by no transport: {refused}",
                hint="both need a common transport and network: see UCX_TLS, UCX_NET_DEVICES, docs/networking.md",
                peer=peer,
            ) from refused
        self.lanes = Lanes.of([name for endpoint in self.endpoints for name in endpoint.transports])
        self._unguarded = len(self.endpoints) if self.lanes.is_emulation else 0
        self._probe: tuple[Program, Job | None, float] | None = None
        """The read, the run of it under way or last, and when that was posted."""

    def __repr__(self) -> str:
        return f"Lane({self._peer!r}, {self.lanes})"

    @property
    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [endpoint for way in self.ways for endpoint in way.endpoints]

    @property
    def is_usable(self) -> bool:
        """Whether transfers may still be posted to it."""
        return not self._has_failed and all(endpoint.code == 0 for endpoint in self.endpoints)

    @property
    def needs_care(self) -> bool:
        """Whether UCX has given an endpoint up, or the core has, and the rest must follow."""
        if self._has_failed:
            return False
        return any(endpoint.code != 0 or endpoint.status for endpoint in self.endpoints)

    @property
    def is_unguarded(self) -> bool:
        """Whether `discard_unsent` has not seen all of its connections yet."""
        return self._unguarded > 0 and not self._has_failed

    def discard_unsent(self, sockets: Iterable[OwnSocket]) -> None:
        """Have the kernel throw away what is unsent when a connection of the lane ends; `sockets` are this process's.

        A write that was given up may have megabytes in the buffer of its socket. The kernel would go on sending them
        after the socket was closed, once a cable is mended, and they would land on what was written since.
        """
        found = [one for one in sockets if any(one.is_to(worker) for worker in self._workers)]
        for one in found:
            one.discard_unsent()
        self._unguarded = max(0, self._unguarded - len(found))

    def limit_reads(self, nbytes: int) -> None:
        """Read no more than so many bytes at a time where UCX emulates reads."""
        for way in self.ways:
            if way.reader is not way.writer:
                way.reader.limit_reads(nbytes)

    def unpack(self, keys: Keys) -> dict[int, WayKeys]:
        """Take the keys of a peer's region, one for each endpoint, by the number of our rail.

        Raises:
            BackendUnavailable: UCX does not take them.
        """
        taken: dict[Endpoint, RemoteKey] = {}
        try:
            for way in self.ways:
                for endpoint in way.endpoints:
                    taken[endpoint] = endpoint.unpack(keys.packed[way.partner], keys.address, keys.nbytes)
        except (RuntimeError, IndexError) as exc:
            for key in taken.values():
                key.destroy()
            raise BackendUnavailable(f"the keys of {self._peer!r} are not usable: {exc}", peer=self._peer) from exc
        return {way.rail: WayKeys(taken[way.writer], taken[way.reader]) for way in self.ways}

    def add(self, binding: UcxBinding) -> None:
        """Close the binding's gate, too, when the lane fails."""
        with self._lock:
            self._bindings.add(binding)
            has_failed = self._has_failed
        if has_failed:
            binding.gate.close(LOST)

    def fail(self, code: int = RESET) -> None:
        """Refuse later transfers, and end those in flight with `code`. Idempotent."""
        with self._lock:
            self._has_failed = True
            bindings = list(self._bindings)
        for binding in bindings:
            binding.gate.close(LOST)
        if self._unguarded > 0:
            self.discard_unsent(own_sockets())
        for endpoint in self.endpoints:
            endpoint.close(code)

    def watch_by(self, program: Program) -> None:
        """Take the program that reads a word of the peer's, to find out whether it is there."""
        self._probe = (program, None, 0.0)

    def is_silent(self, patience: float) -> bool:
        """Whether a read that was posted when this was asked before has had no answer for all the patience.

        Posts the next if none is under way.
        """
        if self._probe is None or not self.is_usable:
            return False
        program, job, posted = self._probe
        if job is not None and job.code == PENDING:
            return time.monotonic() - posted >= patience
        result = program.run(_PROBE_PATIENCES * patience, out_of_line=True)
        self._probe = (program, None if isinstance(result, int) else result, time.monotonic())
        return False


@dataclass(slots=True, eq=False, weakref_slot=True)
class UcxBinding(Binding):
    """A peer's region over a lane: one key for each of its endpoints, by the number of our rail."""

    lane: Lane | None = None
    keys: dict[int, WayKeys] = field(default_factory=dict)
    slow: str = ""
    """Why the region is reached only slowly, if it is."""

    @property
    def is_usable(self) -> bool:
        """Whether a transfer may be compiled for it."""
        return self.gate.code == 0 and self.lane is not None and self.lane.is_usable

    def release(self) -> None:
        """Give the keys back; nobody is inside the gate any more."""
        keys, self.keys, self.lane = self.keys, {}, None
        for key in keys.values():
            key.destroy()


class UcxLink(StreamLink):
    """A link that has a lane once a transfer needed one; while it stands, its peer is admitted to UCX's ports."""

    lane: Lane | None = None
    guard: Guard | None = None
    is_introduced = False
    """Whether the peer has said its Hello and was admitted."""

    def admit(self, addresses: Iterable[IpAddress]) -> None:
        """Let the peer's UCX connect from these addresses."""
        assert self.guard is not None
        self.guard.admit(self, addresses)
        if self.lost is not None:  # meanwhile
            self.guard.dismiss(self)
        self.is_introduced = True

    def is_frozen(self) -> bool:
        """Whether the peer is known to be stopped, or has not said the first of its words in all the time."""
        return not self.is_introduced or super().is_frozen()

    @property
    def remote(self) -> IpAddress | None:
        """The address at the other end, None if there is none any more."""
        try:
            return ip_address(self._sock.getpeername()[0].partition("%")[0])
        except OSError:
            return None

    def close(self, error: RaynixlError | None = None) -> None:
        """Close, and end what is in flight on the lane."""
        super().close(error)
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.fail(LOST)
        if self.guard is not None:
            self.guard.dismiss(self)
            self._local.reactor.call_later(LEAVE_SECONDS, self.guard.sever)


def _connect(number: int, rail: Rail, workers: Sequence[bytes], readers: Callable[[int], Rail]) -> Way:
    """Make an endpoint to the peer's rail of the same number, or to the next that ours reaches.

    Raises:
        RuntimeError: it reaches none.
    """
    refused = RuntimeError("the peer has no rail")
    for turn in range(len(workers)):
        partner = (number + turn) % len(workers)
        try:
            writer = rail.connect(workers[partner])
            if not Lanes.of(writer.transports).is_emulation:
                return Way(number, partner, writer, writer)
            try:
                return Way(number, partner, writer, readers(number).connect(workers[partner]))
            except BaseException:
                writer.close(LOST)
                raise
        except RuntimeError as exc:
            refused = exc
    raise refused


def probe_program(local: Local, word: Mapping, place: int, key: RemoteKey, keys: Keys) -> Program:
    """Return the program that reads a peer's word into `place`, which `word` maps."""
    row = np.array([[0, place, keys.address, keys.nbytes]], np.uint64)
    return local.native.rma(False, [(word, key)], row, [], 0)

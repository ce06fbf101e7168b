"""The transport "raynixl" as Ray Direct Transport drives it: sources register, receivers read."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from raynixl.actors import agent as this_agent
from raynixl.agents import Agent, Transfer
from raynixl.agents.past import Past, streams_of
from raynixl.errors import ConfigError, PeerLost, PeerRestarted, PeerUnknown, RaynixlError, RegionStale, RegionUnknown
from raynixl.integrations.rdt_holders import Holders
from raynixl.integrations.rdt_memory import MADE_SECONDS, Held, Holding, Shelf, gpus_under, read_into
from raynixl.integrations.rdt_ray import (
    CommunicatorMetadata,
    FetchRequest,
    TensorTransportManager,
    TensorTransportMetadata,
    forget_borrowed,
    is_borrowed,
    manager_of,
    register_once,
)
from raynixl.integrations.strided import contiguous

NAME = "raynixl"
DEVICES = ["cpu", "cuda"]
_SHARED_NBYTES = 1 << 20
"""A smaller object is read from its source without asking who else has it."""
_SETTLE_SECONDS = 60.0
_GONE = (PeerLost, PeerUnknown, PeerRestarted, RegionStale, RegionUnknown)


def register() -> None:
    """Make the transport known to Ray in this process, before the actors that use it are made. Idempotent.

    Ray brings it into the actors that this process makes or calls, and our metadata into those that it reaches.
    """
    register_once(NAME, DEVICES, RaynixlTransport)


@dataclass
class RaynixlMetadata(TensorTransportMetadata):  # type: ignore[misc]
    """What travels of an object: shapes and dtypes, as Ray wants them, and where the bytes lie."""

    holding: bytes = b""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the transport known wherever this comes to: a process may have been restarted since."""
        self.__dict__.update(state)
        register()

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], int]]:
        """Shape and item size of each tensor."""
        return [(tuple(shape), dtype.itemsize) for shape, dtype in self.tensor_meta]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(contiguous(shape, itemsize).nbytes for shape, itemsize in self.shapes)


@dataclass(slots=True, eq=False)
class _Flight:
    """What a fetch has under way, and the memory that it goes into."""

    held: Held
    stream: int | None = None
    """The stream of CUDA that it begins after."""
    transfer: Transfer | None = None


@dataclass
class RaynixlFetch(FetchRequest):  # type: ignore[misc]
    """A fetch on its way."""

    metadata: RaynixlMetadata
    holding: Holding
    flight: _Flight
    index: Sequence[Any] | None = None
    tried: set[str] = field(default_factory=set)
    dropped: Any = None
    """Called when nobody waits any more."""


class Desk:
    """What this process's agent holds and is asked for; a new one for each agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.shelf = Shelf(agent)
        self.holders = Holders(agent)
        self.objects: dict[str, Held] = {}


class RaynixlTransport(TensorTransportManager):  # type: ignore[misc]
    """The transport as Ray drives it: one object in each process. Its methods run on several of Ray's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects all below
        self._desk: Desk | None = None
        self._borrowed: set[str] = set()
        self._flights: dict[str, set[_Flight]] = {}
        self._dropped: deque[tuple[str, _Flight]] = deque()  # needs no lock: garbage collection adds to it anywhere

    def tensor_transport_backend(self) -> str:
        """Return the name that methods ask for."""
        return NAME.upper()

    @staticmethod
    def is_one_sided() -> bool:
        """The source takes no part."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """A transfer that is cancelled touches no memory any more; Ray need not kill actors."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Make it known in the actor, which Ray forgets when the actor restarts."""
        options = actor.__ray_call__.options(concurrency_group="_ray_system")
        return bool(ray.get(options.remote(_register_there)))

    def get_communicator_metadata(self, *_: Any, **__: Any) -> Any:
        """Agents find each other: there is nothing to tell."""
        return CommunicatorMetadata()

    # Source

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> RaynixlMetadata:
        """Register the tensors of a new object where they lie; slices and shared storages only once.

        Raises:
            ConfigError: tensors of several kinds of devices, or of a kind without memory of their own.
            TransferTimeout: a GPU does not come to the kernels that make them.
        """
        kinds = {tensor.device.type for tensor in rdt_object}
        if len(kinds) > 1:
            raise ConfigError(f"one object's tensors lie on {', '.join(sorted(kinds))}", hint="return one kind")
        desk = self.desk()
        held = desk.shelf.hold(rdt_object)
        holding = held.holding()
        with self._lock:
            before, desk.objects[obj_id] = desk.objects.pop(obj_id, None), held
        desk.holders.add(obj_id, holding)
        if before is not None:  # the method ran a second time, as its first reply was lost
            before.release()
        return RaynixlMetadata(
            tensor_meta=[(tensor.shape, tensor.dtype) for tensor in rdt_object],
            tensor_device=kinds.pop() if kinds else None,
            holding=holding.to_bytes(),
        )

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None:
        """Let go of an object that nobody refers to any more."""
        self._sweep()
        with self._lock:
            desk = self._desk
            held = None if desk is None else desk.objects.pop(obj_id, None)
        if desk is not None and held is not None:
            desk.holders.remove(obj_id)
            held.release()

    def send_multiple_tensors(self, *_: Any) -> None:
        """Never called: receivers read."""
        raise NotImplementedError("raynixl is one-sided: receivers read")

    # Receiver

    def recv_multiple_tensors(
        self, obj_id: str, tensor_transport_metadata: Any, communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Read an object's tensors, into the buffers if there are some."""
        return self.wait_fetch_complete(
            self.fetch_multiple_tensors(obj_id, tensor_transport_metadata, communicator_metadata, target_buffers)
        )

    def fetch_multiple_tensors(
        self, obj_id: str, tensor_transport_metadata: Any, communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> RaynixlFetch:  # fmt: skip
        """Start reading an object's tensors; wait with `wait_fetch_complete`."""
        meta: RaynixlMetadata = tensor_transport_metadata
        for target in target_buffers or ():
            _check_target(target)
        tensors = target_buffers or [
            empty(shape, dtype, meta.tensor_device or "cpu") for shape, dtype in meta.tensor_meta
        ]
        self._note_borrowed(obj_id)
        return self.start(obj_id, meta, tensors)

    def wait_fetch_complete(self, fetch_request: Any, timeout: float = -1) -> list[Any]:
        """Wait for a fetch, going on with another holder of the object if its own is gone.

        Raises:
            TransferTimeout: it was not there within `timeout`, unless that is negative; it goes on.
            PeerLost: its source is dead, and nobody else holds it.
        """
        fetch: RaynixlFetch = fetch_request
        while fetch.flight.transfer is not None:
            try:
                fetch.flight.transfer.wait(None if timeout < 0 else timeout)
                break
            except _GONE as exc:
                self._go_on(fetch, exc)
            except RaynixlError:
                if fetch.flight.transfer.done:
                    self._finish(fetch)
                raise
        self._finish(fetch)
        return list(fetch.tensors)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """End what is being read of an object."""
        with self._lock:
            flights = list(self._flights.get(obj_id, ()))
        for flight in flights:
            if flight.transfer is not None:
                flight.transfer.cancel()

    # Ours

    def desk(self) -> Desk:
        """Return this process's desk, new if its agent is."""
        agent = this_agent()
        with self._lock:
            if self._desk is None or self._desk.agent is not agent:
                self._desk = Desk(agent)
            return self._desk

    def start(
        self, obj_id: str, meta: RaynixlMetadata, tensors: list[Any], index: Sequence[Any] | None = None
    ) -> RaynixlFetch:
        """Start reading an object, or slices of it, into tensors."""
        self._sweep()
        desk = self.desk()
        holding = Holding.from_bytes(meta.holding)
        if meta.nbytes >= _SHARED_NBYTES and holding.agent != desk.agent.name:
            holding = self._choose(desk, obj_id, holding)
        stream = _stream_for(tensors)  # torch gives memory again while kernels that were put there before still use it
        flight = _Flight(desk.shelf.pin(tensors), stream)
        fetch = RaynixlFetch(obj_id, tensors, meta, holding, flight, index)
        fetch.dropped = weakref.finalize(fetch, self._dropped.append, (obj_id, flight))
        with self._lock:
            self._flights.setdefault(obj_id, set()).add(flight)
        try:
            self._post(fetch)
        except _GONE as exc:
            self._go_on(fetch, exc)
        return fetch

    def _post(self, fetch: RaynixlFetch) -> None:
        fetch.tried.add(fetch.holding.agent)
        flight = fetch.flight
        shapes = fetch.metadata.shapes
        flight.transfer = read_into(flight.held, fetch.holding, shapes, fetch.index, stream=flight.stream)

    def _choose(self, desk: Desk, obj_id: str, source: Holding) -> Holding:
        """Return whom to read from, as the source says; the source if it cannot be asked."""
        try:
            return desk.holders.next(source.agent, obj_id) or source
        except RaynixlError:
            return source

    def _go_on(self, fetch: RaynixlFetch, error: RaynixlError) -> None:
        """Read from the next holder: the source if it was not tried, else whoever answers."""
        for holding in self._others(fetch) if _has_settled(fetch.flight) else ():
            fetch.holding = holding
            try:
                self._post(fetch)
                return
            except _GONE:
                continue
        self._finish(fetch)
        raise error

    def _others(self, fetch: RaynixlFetch) -> Iterable[Holding]:
        source = Holding.from_bytes(fetch.metadata.holding)
        if source.agent not in fetch.tried:
            return [source]
        return self.desk().holders.search(fetch.obj_id, fetch.tried)

    def _finish(self, fetch: RaynixlFetch) -> None:
        fetch.dropped.detach()
        self._end(fetch.obj_id, fetch.flight)

    def _end(self, obj_id: str, flight: _Flight) -> None:
        """Let go of a fetch that has ended, well or not."""
        with self._lock:
            flights = self._flights.get(obj_id, set())
            flights.discard(flight)
            if not flights:
                self._flights.pop(obj_id, None)
        _has_settled(flight)  # the target may be pinned
        flight.transfer = None
        flight.held.release()

    def _sweep(self) -> None:
        """End the fetches that nobody waits for any more; until then their regions keep the memory."""
        while self._dropped:
            obj_id, flight = self._dropped.popleft()
            if flight.transfer is not None:
                flight.transfer.cancel()
            self._end(obj_id, flight)

    def _note_borrowed(self, obj_id: str) -> None:
        """Drop what Ray keeps of objects that were fetched here and are referred to no more."""
        ours = {obj_id} if is_borrowed(obj_id) else set()
        with self._lock:
            seen, self._borrowed = self._borrowed | ours, set()
        kept = forget_borrowed(seen)
        with self._lock:
            self._borrowed |= kept


def _has_settled(flight: _Flight) -> bool:
    """Wait until nothing of a fetch writes any more, as a GPU that was given up may; False if something still does."""
    jobs = () if flight.transfer is None else flight.transfer.jobs
    return all(job.wait_settled(_SETTLE_SECONDS) for job in jobs)


def _register_there(_: Any) -> bool:
    """Run in an actor: make the transport known there."""
    register()
    return True


def empty(shape: Sequence[int], dtype: Any, device: str) -> Any:
    """Return memory for a tensor."""
    import torch

    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _stream_for(tensors: Sequence[Any]) -> int | None:
    """Return the stream of this thread that still uses the memory of tensors; several are waited for here."""
    gpus = gpus_under(tensors)
    streams = streams_of(gpus)
    if len(gpus) == len(streams) == 1:
        return streams[0]
    Past(gpus, streams).wait(MADE_SECONDS)
    return None


def _check_target(tensor: Any) -> None:
    """Refuse a target whose memory does not hold its values as they are."""
    if tensor.is_conj() or tensor.is_neg():
        raise ConfigError("a target is a conjugate or negative view of other memory", hint="give plain tensors")


def transport() -> RaynixlTransport:
    """Return this process's transport, made known to Ray first."""
    register()
    found: RaynixlTransport = manager_of(NAME)
    return found

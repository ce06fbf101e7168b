"""Ray Direct Transport over raynixl: tensors of actors' results are read by whoever gets the reference.

from raynixl.integrations import ray_rdt

ray_rdt.register()

@ray.remote
class Trainer:
    @ray.method(tensor_transport="raynixl")
    def weights(self):
        return [self.w, self.w[10:20]]
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray

from raynixl.actors import agent as this_agent
from raynixl.agents import Agent, Transfer
from raynixl.errors import ConfigError, PeerLost, PeerRestarted, PeerUnknown, RaynixlError, RegionStale, RegionUnknown
from raynixl.integrations.rdt_holders import Holders
from raynixl.integrations.rdt_memory import Held, Holding, Index, Shelf, contiguous, read_into
from raynixl.integrations.rdt_ray import (
    CommunicatorMetadata,
    FetchRequest,
    TensorTransportManager,
    TensorTransportMetadata,
    forget_borrowed,
    is_borrowed,
    metadata_of,
    register_once,
)

__all__ = ["Holder", "hold", "pin", "read", "register"]

NAME = "raynixl"
DEVICES = ["cpu", "cuda"]
_SHARED_NBYTES = 1 << 20
"""A smaller object is read from its source without asking who else has it."""
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


@dataclass
class RaynixlFetch(FetchRequest):  # type: ignore[misc]
    """A fetch on its way."""

    metadata: RaynixlMetadata
    holding: Holding
    transfer: Transfer | None
    held: Held
    index: Sequence[Any] | None = None
    tried: set[str] = field(default_factory=set)


class _Desk:
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
        self._desk: _Desk | None = None
        self._borrowed: set[str] = set()
        self._flying: dict[str, set[Transfer]] = {}

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
            ConfigError: tensors of several devices, or of a kind without memory of their own.
        """
        kinds = {tensor.device.type for tensor in rdt_object}
        if len(kinds) > 1:
            raise ConfigError(f"one object's tensors lie on {', '.join(sorted(kinds))}", hint="return one kind")
        if kinds == {"cuda"}:
            _synchronise(rdt_object)
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
        tensors = target_buffers or [
            _empty(shape, dtype, meta.tensor_device or "cpu") for shape, dtype in meta.tensor_meta
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
        while fetch.transfer is not None:
            try:
                fetch.transfer.wait(None if timeout < 0 else timeout)
                break
            except _GONE as exc:
                self._go_on(fetch, exc)
        self._end(fetch)
        return list(fetch.tensors)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """End what is being read of an object."""
        with self._lock:
            flying = list(self._flying.get(obj_id, ()))
        for transfer in flying:
            transfer.cancel()

    # Ours

    def desk(self) -> _Desk:
        """Return this process's desk, new if its agent is."""
        agent = this_agent()
        with self._lock:
            if self._desk is None or self._desk.agent is not agent:
                self._desk = _Desk(agent)
            return self._desk

    def start(
        self, obj_id: str, meta: RaynixlMetadata, tensors: list[Any], index: Sequence[Any] | None = None
    ) -> RaynixlFetch:
        """Start reading an object, or slices of it, into tensors."""
        desk = self.desk()
        holding = Holding.from_bytes(meta.holding)
        if meta.nbytes >= _SHARED_NBYTES and holding.agent != desk.agent.name:
            holding = self._choose(desk, obj_id, holding)
        held = desk.shelf.hold(tensors)
        fetch = RaynixlFetch(obj_id, tensors, meta, holding, None, held, index)
        try:
            self._post(fetch)
        except _GONE as exc:
            self._go_on(fetch, exc)
        weakref.finalize(fetch, self._drop, obj_id, fetch.transfer, held)
        return fetch

    def _post(self, fetch: RaynixlFetch) -> None:
        fetch.tried.add(fetch.holding.agent)
        fetch.transfer = read_into(fetch.held, fetch.holding, fetch.metadata.shapes, fetch.index)
        if fetch.transfer is not None:
            with self._lock:
                self._flying.setdefault(fetch.obj_id, set()).add(fetch.transfer)

    def _choose(self, desk: _Desk, obj_id: str, source: Holding) -> Holding:
        """Return whom to read from, as the source says; the source if it cannot be asked."""
        try:
            return desk.holders.next(source.agent, obj_id) or source
        except RaynixlError:
            return source

    def _go_on(self, fetch: RaynixlFetch, error: RaynixlError) -> None:
        """Read from the next holder: the source if it was not tried, else whoever answers."""
        self._land(fetch)
        source = Holding.from_bytes(fetch.metadata.holding)
        others = [source] if source.agent not in fetch.tried else []
        for holding in others or self.desk().holders.search(fetch.obj_id, fetch.tried):
            fetch.holding = holding
            try:
                self._post(fetch)
                return
            except _GONE:
                continue
        self._end(fetch)
        raise error

    def _land(self, fetch: RaynixlFetch) -> None:
        """Note that a transfer is over."""
        with self._lock:
            flying = self._flying.get(fetch.obj_id, set())
            flying.discard(fetch.transfer)
            if not flying:
                self._flying.pop(fetch.obj_id, None)
        fetch.transfer = None

    def _end(self, fetch: RaynixlFetch) -> None:
        self._land(fetch)
        fetch.held.release()

    def _drop(self, obj_id: str, transfer: Transfer | None, held: Held) -> None:
        """Let go of a fetch that nobody waits for any more."""
        if transfer is not None and not transfer.done:
            transfer.cancel()
        with self._lock:
            self._flying.get(obj_id, set()).discard(transfer)
        held.release()

    def _note_borrowed(self, obj_id: str) -> None:
        """Drop what Ray keeps of objects that were fetched here and are referred to no more."""
        ours = {obj_id} if is_borrowed(obj_id) else set()
        with self._lock:
            seen, self._borrowed = self._borrowed | ours, set()
        kept = forget_borrowed(seen)
        with self._lock:
            self._borrowed |= kept


class Holder:
    """This process as a further holder of an object, until it is closed. Made by `hold`."""

    def __init__(self, transport: RaynixlTransport, ref: Any, source: str, held: Held) -> None:
        self._transport, self._ref, self._source, self._held = transport, ref, source, held
        self._desk = transport.desk()
        self._is_closed = False

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the object no more; the tensors may change then. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._desk.holders.remove(self._ref.hex())
        try:
            self._desk.holders.leave(self._source, self._ref.hex())
        except RaynixlError:  # the source is gone, and whoever would ask it
            pass
        finally:
            self._held.release()
            self._ref = None


def hold(ref: Any, tensors: Sequence[Any], *, timeout: float = 60.0) -> Holder:
    """Give an object that came here to others, too: `tensors` are what it holds, and stay so until the holder closes.

    Who gets the reference next reads from its source and its holders in turn, and from these alone if the source dies.

    Raises:
        ConfigError: the tensors are not those of the object.
        PeerLost: its source is gone.
    """
    meta = metadata_of(ref, timeout)
    transport = _transport()
    wanted = [(tuple(shape), dtype) for shape, dtype in meta.tensor_meta]
    if wanted != [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]:
        raise ConfigError("these are not the object's tensors", hint="give what ray.get(ref) returned, as a list")
    desk = transport.desk()
    held = desk.shelf.hold(tensors)
    holding, source = held.holding(), Holding.from_bytes(meta.holding).agent
    try:
        desk.holders.join(source, ref.hex(), holding)
    except RaynixlError:
        held.release()
        raise
    desk.holders.add(ref.hex(), holding)
    return Holder(transport, ref, source, held)


def pin(tensors: Sequence[Any]) -> Held:
    """Register tensors' memory beforehand, until `release()`: sources and targets that are used again and again."""
    return _transport().desk().shelf.hold(tensors)


def read(ref: Any, *index: Index | tuple[Index, ...] | None, timeout: float = 60.0) -> list[Any]:
    """Read slices of an object's tensors: one index for each tensor, as in `read(ref, slice(0, 8), (slice(None), 0))`.

    Only the bytes of the slices move. None stands for a whole tensor.

    Raises:
        ConfigError: an index does not fit.
        PeerLost: the source is dead, and nobody else holds it.
    """
    meta: RaynixlMetadata = metadata_of(ref, timeout)
    if len(index) != len(meta.tensor_meta):
        raise ConfigError(f"{len(index)} indices for {len(meta.tensor_meta)} tensors", hint="give one for each")
    tensors = [
        _empty(contiguous(shape, dtype.itemsize)[() if one is None else one].shape, dtype, meta.tensor_device or "cpu")
        for one, (shape, dtype) in zip(index, meta.tensor_meta, strict=True)
    ]
    transport = _transport()
    return transport.wait_fetch_complete(transport.start(ref.hex(), meta, tensors, index), timeout)


def _transport() -> RaynixlTransport:
    from raynixl.integrations.rdt_ray import manager_of

    register()
    found: RaynixlTransport = manager_of(NAME)
    return found


def _register_there(_: Any) -> bool:
    """Run in an actor: make the transport known there."""
    register()
    return True


def _empty(shape: Sequence[int], dtype: Any, device: str) -> Any:
    import torch

    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _synchronise(tensors: Sequence[Any]) -> None:
    """Wait for the kernels that make the tensors: readers know nothing of streams."""
    import torch

    for device in {tensor.device for tensor in tensors}:
        torch.cuda.synchronize(device)

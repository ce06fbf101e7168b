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

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from raynixl.errors import ConfigError, RaynixlError
from raynixl.integrations.rdt_memory import Held, Holding
from raynixl.integrations.rdt_ray import metadata_of
from raynixl.integrations.rdt_transport import Desk, RaynixlMetadata, empty, register, transport
from raynixl.integrations.strided import Index, contiguous

__all__ = ["Holder", "hold", "pin", "read", "register"]


class Holder:
    """This process as a further holder of an object, until it is closed. Made by `hold`."""

    def __init__(self, desk: Desk, ref: Any, source: str, held: Held) -> None:
        self._desk, self._ref, self._source, self._held = desk, ref, source, held
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
    wanted = [(tuple(shape), dtype) for shape, dtype in meta.tensor_meta]
    if wanted != [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]:
        raise ConfigError("these are not the object's tensors", hint="give what ray.get(ref) returned, as a list")
    desk = transport().desk()
    held = desk.shelf.hold(tensors)
    holding, source = held.holding(), Holding.from_bytes(meta.holding).agent
    try:
        desk.holders.join(source, ref.hex(), holding)
    except RaynixlError:
        held.release()
        raise
    desk.holders.add(ref.hex(), holding)
    return Holder(desk, ref, source, held)


def pin(tensors: Sequence[Any]) -> Held:
    """Register tensors' memory beforehand, until `release()`: sources and targets that are used again and again."""
    return transport().desk().shelf.pin(tensors)


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
        empty(contiguous(shape, dtype.itemsize)[() if one is None else one].shape, dtype, meta.tensor_device or "cpu")
        for one, (shape, dtype) in zip(index, meta.tensor_meta, strict=True)
    ]
    here = transport()
    return here.wait_fetch_complete(here.start(ref.hex(), meta, tensors, index), timeout)

"""Memory of Ray Direct Transport: tensors' storages registered once, and what travels of a tensor that others read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from raynixl.agents.past import Past
from raynixl.errors import IntegrityError, RaynixlError
from raynixl.integrations.strided import Strided
from raynixl.record import Incarnation, Name, RegionRecord, parse
from raynixl.region import Region, RemoteRegion
from raynixl.weights.space import gpus_of

if TYPE_CHECKING:
    from raynixl.agents import Agent, Transfer
    from raynixl.blocks import Blocks

_SMALL_RUN_NBYTES, _MANY_RUNS = 256, 4096
"""A tensor of more and smaller runs than these is copied at its source instead of read run by run."""
MAX_HOLDING_NBYTES = 64 << 20
MADE_SECONDS = 600.0
"""How long what makes an object's tensors may take on a GPU: steps of training may be queued there."""
_Unsigned = Annotated[int, Field(ge=0, lt=1 << 63)]


class Part(BaseModel):
    """Where one tensor lies: in which region, from where, and how far apart its elements are, in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    region: Annotated[int, Field(ge=-1)]
    offset: _Unsigned
    strides: Annotated[tuple[_Unsigned, ...], Field(strict=False, max_length=64)]


class Holding(BaseModel):
    """Who holds an object's tensors, and where: what travels of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    agent: Name
    incarnation: Incarnation
    regions: Annotated[tuple[RegionRecord, ...], Field(strict=False)]
    parts: Annotated[tuple[Part, ...], Field(strict=False)]

    def to_bytes(self) -> bytes:
        """Return it as bytes for a peer."""
        return self.model_dump_json(exclude_defaults=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Holding:
        """Parse it. Raises `IntegrityError` for what is none."""
        held = parse(Holding, data, what="holding", limit=MAX_HOLDING_NBYTES)
        if any(part.region >= len(held.regions) for part in held.parts):
            raise IntegrityError("a holding names a region that it does not list")
        return held

    def sources(self, wanted: Sequence[tuple[int, Strided]]) -> list[Blocks]:
        """Return the blocks to read for parts, each cut to a `Strided` of the part."""
        remotes = [RemoteRegion(self.agent, self.incarnation, record) for record in self.regions]
        blocks = []
        for number, strided in wanted:
            offsets, run = strided.runs()
            blocks.append(remotes[self.parts[number].region].blocks(offsets, [run]))
        return blocks


@dataclass(slots=True)
class _Storage:
    region: Region
    uses: int


class Held:
    """Tensors whose storages are registered until `release`."""

    def __init__(self, shelf: Shelf, places: Sequence[tuple[int, Strided]], keep: Sequence[Any]) -> None:
        self.shelf = shelf
        self._places = places
        self._keep = keep  # copies that nobody else holds on to

    def blocks(self) -> list[Blocks]:
        """Return where the elements of each tensor lie; empty tensors have no blocks."""
        blocks = []
        for pointer, strided in self._places:
            if strided.nbytes:
                offsets, run = strided.runs()
                blocks.append(self.shelf.region(pointer).blocks(offsets, [run]))
        return blocks

    def holding(self) -> Holding:
        """Return what travels of the tensors."""
        agent = self.shelf.agent
        pointers = list(dict.fromkeys(pointer for pointer, strided in self._places if strided.nbytes))
        numbers = {pointer: number for number, pointer in enumerate(pointers)}
        parts = tuple(
            Part(region=numbers.get(pointer, -1), offset=strided.offset, strides=strided.strides)
            for pointer, strided in self._places
        )
        records = tuple(self.shelf.region(pointer).record() for pointer in pointers)
        return Holding(agent=agent.name, incarnation=agent.incarnation, regions=records, parts=parts)

    def release(self) -> None:
        """Let go of the storages that nobody else uses. Idempotent."""
        places, self._places, self._keep = self._places, (), ()
        self.shelf.release([pointer for pointer, strided in places if strided.nbytes])


class Shelf:
    """The storages that this process's agent has registered for Ray Direct Transport, each once."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._lock = threading.Lock()  # protects _storages; regions are made and ended under it, which is quick
        self._storages: dict[int, _Storage] = {}

    def __len__(self) -> int:
        return len(self._storages)

    def hold(self, tensors: Sequence[Any]) -> Held:
        """Register the storages of tensors for others to read, or copies that they can read.

        What this thread has put on the current streams of the tensors' GPUs is waited for, nothing else there: readers
        know nothing of streams.

        Raises:
            TransferTimeout: that takes longer than `MADE_SECONDS`.
        """
        held = self._hold(tensors, _readable)
        try:
            Past(gpus_under(tensors)).wait(MADE_SECONDS)  # after the copies, which are put there, too
        except RaynixlError:
            held.release()
            raise
        return held

    def pin(self, tensors: Sequence[Any]) -> Held:
        """Register the storages of tensors as they lie, those that are registered already once more."""
        return self._hold(tensors, lambda tensor: tensor)

    def _hold(self, tensors: Sequence[Any], readable: Callable[[Any], Any]) -> Held:
        places, keep, taken = [], [], []
        try:
            for tensor in tensors:
                plain = readable(tensor)
                if plain is not tensor:
                    keep.append(plain)
                pointer = self._take(plain) if plain.numel() else 0
                places.append((pointer, place_of(plain)))
                taken += [pointer] if pointer else []
        except RaynixlError:
            self.release(taken)
            raise
        return Held(self, places, keep)

    def region(self, pointer: int) -> Region:
        """Return the region of a storage by its address."""
        return self._storages[pointer].region

    def release(self, pointers: Sequence[int]) -> None:
        """Use storages once less each; what nobody uses is deregistered."""
        ended = []
        with self._lock:
            for pointer in pointers:
                storage = self._storages[pointer]
                storage.uses -= 1
                if storage.uses == 0:
                    ended.append(self._storages.pop(pointer).region)
        for region in ended:
            if not self.agent.is_closed and region.is_registered:
                self.agent.deregister(region)

    def _take(self, tensor: Any) -> int:
        import torch

        storage = tensor.untyped_storage()
        pointer = int(storage.data_ptr())
        with self._lock:
            known = self._storages.get(pointer)
            if known is None:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._storages[pointer] = _Storage(self.agent.register(whole), 1)
            else:
                known.uses += 1
        return pointer


def gpus_under(tensors: Iterable[Any]) -> set[int]:
    """Return the numbers of the GPUs that tensors lie on."""
    return {space.number for space in gpus_of(tensors)}


def place_of(tensor: Any) -> Strided:
    """Return where a tensor's elements lie in its storage."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    return Strided(tensor.storage_offset() * size, tuple(tensor.shape), strides, size)


def _readable(tensor: Any) -> Any:
    """Return the tensor, or a copy of it if others cannot read it as it lies."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    offsets, run = place_of(plain).runs() if plain.numel() else ((), 0)
    if len(offsets) > _MANY_RUNS and run < _SMALL_RUN_NBYTES:
        plain = plain.contiguous()
    same = plain.data_ptr() == tensor.data_ptr() and plain.stride() == tensor.stride()
    return tensor if same else plain


def read_into(
    held: Held,
    holding: Holding,
    shapes: Sequence[tuple[tuple[int, ...], int]],
    index: Sequence[Any] | None = None,
    *,
    stream: int | None = None,
) -> Transfer | None:
    """Start reading a holding's tensors, or slices of them, into held ones; None if there is nothing to read.

    With `stream`, of CUDA, it begins when what is on that stream now is through.
    """
    wanted = []
    for number, (shape, itemsize) in enumerate(shapes):
        part = holding.parts[number]
        whole = Strided(part.offset, shape, part.strides, itemsize)
        cut = whole if index is None or index[number] is None else whole[index[number]]
        if cut.nbytes:
            wanted.append((number, cut))
    if not wanted:
        return None
    return held.shelf.agent.read(holding.sources(wanted), held.blocks(), stream=stream)

"""Regions: spans of memory registered by their owner (`Region`), and what travels of them (`RemoteRegion`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError

from raynixl.blocks import Blocks, make_table, page_table
from raynixl.errors import BackendUnavailable, ConfigError, IntegrityError, RangeError
from raynixl.memory import Memory, MemoryKind
from raynixl.native import Gate
from raynixl.record import Incarnation, RegionRecord, check_bytes, check_name, parse

_INCARNATION = TypeAdapter(Incarnation)
MAX_REGION_NBYTES = 8192
"""Largest serialised region that is accepted."""


class _Selectable:
    """Ways to select blocks of a region, ours or a peer's."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def nbytes(self) -> int: ...
        @property
        def device(self) -> int: ...
        @property
        def label(self) -> str: ...

    def span(self, offset: int = 0, nbytes: int | None = None) -> Blocks:
        """Select `nbytes` from `offset` (to the end by default)."""
        if not hasattr(offset, "__index__") or not 0 <= offset <= self.nbytes:
            raise RangeError(
                f"offset {offset!r:.40} is outside {self.label} of {self.nbytes} bytes",
                hint="give an offset inside it",
            )
        length = self.nbytes - offset if nbytes is None else nbytes
        return Blocks(self, make_table([offset], [length], device=self.device))

    def blocks(self, offsets: ArrayLike, lengths: ArrayLike) -> Blocks:
        """Select many blocks by byte offset and length; one length may serve all."""
        return Blocks(self, make_table(offsets, lengths, device=self.device))

    def pages(self, ids: ArrayLike, page_nbytes: int) -> Blocks:
        """Select whole pages, by number, of the region cut into pages of `page_nbytes`."""
        return Blocks(self, page_table(ids, page_nbytes, nbytes=self.nbytes, what=self.label, device=self.device))

    def __getitem__(self, key: slice) -> Blocks:
        """Select bytes as a slice does: region[a:b]."""
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise RangeError(f"{self.label} is sliced by [start:stop] in bytes", hint="use blocks() or pages()")
        try:
            start, stop, _ = key.indices(self.nbytes)
        except TypeError as exc:
            raise RangeError(f"{self.label} is sliced by whole numbers", hint="give [start:stop] in bytes") from exc
        return self.span(start, max(0, stop - start))

    def __len__(self) -> int:
        return self.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Region(_Selectable):
    """Memory registered with this process's agent.

    Holds on to the memory until `agent.deregister(region)`. The bytes are the user's to read and write,
    save while a transfer that reads or writes them is in flight.
    """

    id: int
    generation: int
    name: str
    memory: Memory
    keys: dict[str, dict[str, str | int]]
    owner: str
    incarnation: str
    gate: Gate = field(repr=False)
    kind: MemoryKind = MemoryKind.DRAM
    device: int = 0
    nbytes: int = 0

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"region {self.name or self.id!r} of {self.owner!r}"

    @property
    def is_registered(self) -> bool:
        """Whether transfers may still use it."""
        return self.gate.code == 0

    def record(self) -> RegionRecord:
        """Return what travels of it."""
        return RegionRecord(
            id=self.id, generation=self.generation, name=self.name, kind=self.kind, device=self.device,
            nbytes=self.nbytes, writable=self.memory.writable, keys=self.keys,
        )  # fmt: skip

    def describe(self) -> RemoteRegion:
        """Return the descriptor that a peer needs to read and write this region."""
        return RemoteRegion(self.owner, self.incarnation, self.record())

    def array(self, dtype: Any = np.uint8, shape: Sequence[int] | None = None, *, offset: int = 0) -> Any:
        """Return a numpy view of the bytes (host memory only). Views keep the memory alive."""
        if self.kind is not MemoryKind.DRAM:
            raise ConfigError(f"{self.label} is {self.kind.value}, not host memory", hint="use tensor() or cupy()")
        kind = np.dtype(dtype)
        span = self._view(kind, shape, offset)
        flat = _bytes_of(span).view(kind) if span.nbytes else np.empty(0, kind)
        return flat if shape is None else flat.reshape(shape)

    def tensor(self, dtype: Any, shape: Sequence[int], *, offset: int = 0) -> Any:
        """Return a torch view of the bytes, on the GPU where they are there. Views keep the memory alive.

        On a GPU the caller orders what he does with them: a transfer's `stream=` and `Transfer.wait(stream=)`.

        Raises:
            RangeError: they are outside the region, or lie askew.
            ConfigError: the bytes are on a GPU, and this torch is one without CUDA.
        """
        import torch

        if not self._is_host and torch.version.cuda is None:
            raise ConfigError(
                f"{self.label} is on a GPU, and torch {torch.__version__} is built without CUDA",
                hint="install a torch with CUDA, or use cupy()",
            )
        itemsize = torch.empty((), dtype=dtype).element_size()
        span = self._view(np.dtype(f"V{itemsize}"), shape, offset)
        if span.nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu" if self._is_host else f"cuda:{self.device}")
        if self._is_host:
            return torch.frombuffer(_bytes_of(span), dtype=dtype).reshape(tuple(shape))
        return torch.as_tensor(_AddressView(span), device=f"cuda:{self.device}").view(dtype).reshape(tuple(shape))

    def cupy(self, dtype: Any = np.uint8, shape: Sequence[int] | None = None, *, offset: int = 0) -> Any:
        """Return a cupy view of the bytes (memory of a GPU only). Views keep the memory alive.

        Raises:
            RangeError: they are outside the region, or lie askew.
            ConfigError: it is host memory.
            BackendUnavailable: cupy is not installed.
        """
        if self._is_host:
            raise ConfigError(f"{self.label} is host memory", hint="use array() or tensor()")
        try:
            import cupy
        except ImportError as exc:
            hint = "pip install 'raynixl[cu13]' (or cu12), or use tensor()"
            raise BackendUnavailable("cupy is not installed", hint=hint) from exc
        kind = np.dtype(dtype)
        span = self._view(kind, shape, offset)
        memory = cupy.cuda.UnownedMemory(span.address, span.nbytes, span, self.device)
        flat = cupy.ndarray((span.nbytes // kind.itemsize,), kind, cupy.cuda.MemoryPointer(memory, 0))
        return flat if shape is None else flat.reshape(tuple(shape))

    @property
    def _is_host(self) -> bool:
        return self.kind is MemoryKind.DRAM

    def _view(self, kind: np.dtype[Any], shape: Sequence[int] | None, offset: int) -> Memory:
        """Return the part of the memory that a view shows, whole items of it.

        Raises:
            RangeError: it is outside the region, or its items lie askew on a GPU, which ends the process's use of it.
        """
        count = (self.nbytes - offset) // kind.itemsize if shape is None else int(np.prod(shape, dtype=np.int64))
        nbytes = count * kind.itemsize
        if offset < 0 or count < 0 or offset + nbytes > self.nbytes:
            raise RangeError(f"a view of {count} x {kind} at {offset} is outside {self.label}", hint="make it smaller")
        address = self.memory.address + offset
        if not self._is_host and kind.itemsize & (kind.itemsize - 1) == 0 and address % kind.itemsize:
            raise RangeError(
                f"items of {kind.itemsize} bytes at {offset} lie askew in {self.label}", hint="choose another offset"
            )
        return replace(self.memory, address=address, nbytes=nbytes, owner=self.memory)


def _bytes_of(memory: Memory) -> Any:
    """Return a flat uint8 view of host memory that keeps its owner alive."""
    view = _AddressView(memory)
    return np.asarray(view)


class _AddressView:
    """Lends an address range to numpy or torch by its array interface, and keeps the memory's owner alive."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        face = {
            "version": 3, "typestr": "|u1", "shape": (memory.nbytes,),
            "data": (memory.address, not memory.writable),
        }  # fmt: skip
        if memory.kind is MemoryKind.DRAM:
            self.__array_interface__ = face
        else:
            self.__cuda_array_interface__ = face


@dataclass(frozen=True, slots=True)
class RemoteRegion(_Selectable):
    """A peer's region as it travels: who owns it, which incarnation and generation, how backends reach it."""

    owner: str
    incarnation: str
    record: RegionRecord

    @property
    def id(self) -> int:
        """The owner's number for it."""
        return self.record.id

    @property
    def name(self) -> str:
        """Its name at the owner, or ''."""
        return self.record.name

    @property
    def generation(self) -> int:
        """Which registration of it this is."""
        return self.record.generation

    @property
    def kind(self) -> MemoryKind:
        """Where its bytes live."""
        return self.record.kind

    @property
    def device(self) -> int:
        """Device number of its memory."""
        return self.record.device

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.record.nbytes

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"region {self.name or self.id!r} of {self.owner!r}"

    def to_bytes(self) -> bytes:
        """Return the descriptor as bytes for a peer."""
        text = self.record.model_dump_json(exclude_defaults=True)
        return b"\n".join((self.owner.encode(), self.incarnation.encode(), text.encode()))

    @staticmethod
    def from_bytes(data: bytes) -> RemoteRegion:
        """Parse a descriptor.

        Raises:
            IntegrityError: it is truncated, too large, or no descriptor at all.
        """
        what = "region descriptor"
        raw = check_bytes(data, what=what, limit=MAX_REGION_NBYTES)
        owner, incarnation, text = ([*raw.split(b"\n", 2), b"", b""])[:3]
        try:
            name = check_name(owner.decode(), "owner")
            life = _INCARNATION.validate_python(incarnation.decode())
        except (UnicodeDecodeError, ConfigError, ValidationError) as exc:
            raise IntegrityError(
                f"{what} does not say whose it is", hint="it is truncated or not from raynixl"
            ) from exc
        return RemoteRegion(name, life, parse(RegionRecord, text, what=what, limit=MAX_REGION_NBYTES))


def check_descriptor(remote: RemoteRegion, truth: RegionRecord) -> None:
    """Refuse a descriptor that differs from what the region's owner says of it.

    Raises:
        IntegrityError: it was damaged on its way, or made up.
    """
    if remote.record is truth or remote.record == truth:
        return
    fields = [name for name in RegionRecord.model_fields if getattr(remote.record, name) != getattr(truth, name)]
    said = ", ".join(f"{name} {getattr(remote.record, name)!r:.60} is {getattr(truth, name)!r:.60}" for name in fields)
    raise IntegrityError(
        f"the descriptor of {remote.label} is not its owner's: {said}",
        hint="look it up again: agent.peer(name)[region]", peer=remote.owner,
    )  # fmt: skip

"""Memory of other processes' GPUs, opened once for all regions in it, and closed with the last of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from raynixl import cuda
from raynixl.backends.nvlink_export import MOST_CHUNKS
from raynixl.errors import BackendUnavailable, IntegrityError, RegionStale

_HANDLE_LETTERS = 2 * cuda.HANDLE_NBYTES
_MOST_NBYTES = 1 << 48


@dataclass(frozen=True, slots=True)
class Source:
    """What a key says, checked: which allocation on which GPU, and where the region begins in it."""

    uuid: str
    handles: tuple[bytes, ...]
    sizes: tuple[int, ...]
    """How much each handle opens."""
    is_fabric: bool
    owner: tuple[str, int]
    """The process whose it is, and the allocation's number there: together never given twice, as handles may be."""
    offset: int


class _Opened(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def close(self) -> None: ...


class _Handed:
    """An allocation of CUDA IPC, in the current context."""

    def __init__(self, handle: bytes, claimed_nbytes: int) -> None:
        self.address = cuda.ipc_open(handle)
        left = cuda.left_from(self.address)
        self.nbytes = claimed_nbytes if left is None else left

    def close(self) -> None:
        """Unmap it."""
        cuda.give_back("cuIpcCloseMemHandle", self.address)


@dataclass(slots=True, eq=False)
class _Allocation:
    """A peer's allocation as it is mapped here, and how many regions in it are in use."""

    owner: tuple[str, int]
    device: int
    context: int
    opened: _Opened
    users: int = 0


_Place = tuple[int, tuple[bytes, ...]]  # GPU here, handles: two agents of one process export the same ones


class Import:
    """A peer's region as this process reaches it, until it is closed."""

    def __init__(self, address: int, device: int, close: Callable[[], None]) -> None:
        self.address, self.device = address, device
        self._lock = threading.Lock()  # protects _close
        self._close: Callable[[], None] | None = close
        self._pid = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self._close is None else f"at {self.address:#x}"
        return f"<Import on GPU {self.device}, {state}>"

    def close(self) -> None:
        """Let go of it; no transfer uses it any more."""
        if os.getpid() != self._pid:
            return  # CUDA stayed with the parent
        with self._lock:
            close, self._close = self._close, None
        if close is not None:
            close()


class ImportCache:
    """All that a process has opened: CUDA wants each handle opened once, whoever asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _found; held while opening and closing, so that each happens once
        self._found: dict[_Place, _Allocation] = {}

    def __len__(self) -> int:
        return len(self._found)

    def open(self, key: Mapping[str, object], nbytes: int, home_device: int) -> Import:
        """Reach a peer's region of `nbytes`, in the context of its GPU, or of `home_device` if we do not see that.

        Raises:
            IntegrityError: that is no key of such a region, or there is less memory than it says.
            BackendUnavailable: the memory cannot be mapped, here or by anyone.
            RegionStale: its owner has freed it and made it anew, while what there was before is still in use here.
        """
        source = read_key(key, nbytes)
        device = next((one.index for one in cuda.devices() if one.uuid == source.uuid), home_device)
        place = (device, source.handles)
        with self._lock:
            found = self._found.get(place)
            if found is None:
                found = self._found[place] = _open(source, device)
            elif found.owner != source.owner:
                raise RegionStale(
                    "a peer has freed memory and made it anew, while what it was before is still in use here",
                    hint="its owner must deregister memory before freeing it",
                )
            if source.offset + nbytes > found.opened.nbytes:  # what lies behind may be memory of this process
                self._close_unused(place, found)
                raise IntegrityError("a peer's memory is smaller than its key says")
            found.users += 1
        address = found.opened.address + source.offset
        return Import(address, device, lambda: self._release(place, found))

    def _release(self, place: _Place, found: _Allocation) -> None:
        with self._lock:
            found.users -= 1
            self._close_unused(place, found)

    def _close_unused(self, place: _Place, found: _Allocation) -> None:
        if not found.users:
            del self._found[place]
            cuda.let_go(found.context, found.opened.close)


IMPORTS = ImportCache()
"""That of this process."""


def read_key(key: Mapping[str, object], nbytes: int) -> Source:
    """Check what a peer says of a region's memory.

    Raises:
        IntegrityError: it is no key of `nbytes`.
        BackendUnavailable: its owner has no handle for others, and says why.
    """
    refusal = key.get("refusal")
    if isinstance(refusal, str):
        raise BackendUnavailable(refusal.partition(";")[0][:500], hint=refusal.partition(";")[2].strip()[:500])
    is_fabric = "fabric" in key
    text, uuid, process = key.get("fabric" if is_fabric else "handle"), key.get("uuid"), key.get("process")
    offset, size, buffer = (_whole(key.get(name)) for name in ("offset", "size", "buffer"))
    handles = _handles(text)
    sizes = _sizes(key.get("chunks")) if is_fabric else (size,)
    if (
        not isinstance(uuid, str)
        or not isinstance(process, str)
        or len(handles) != len(sizes)
        or (len(handles) != 1 and not is_fabric)
    ):
        raise _no_key()
    if sum(sizes) != size or not 0 < size < _MOST_NBYTES or offset + nbytes > size:
        raise _no_key()
    return Source(uuid, handles, sizes, is_fabric, (process, buffer), offset)


def _handles(text: object) -> tuple[bytes, ...]:
    if not isinstance(text, str) or not 0 < len(text) <= MOST_CHUNKS * _HANDLE_LETTERS or len(text) % _HANDLE_LETTERS:
        raise _no_key()
    try:
        raw = bytes.fromhex(text)
    except ValueError as exc:
        raise _no_key() from exc
    return tuple(raw[at : at + cuda.HANDLE_NBYTES] for at in range(0, len(raw), cuda.HANDLE_NBYTES))


def _sizes(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or len(text) > MOST_CHUNKS * len(f",{_MOST_NBYTES}"):
        raise _no_key()
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise _no_key()
    return tuple(int(word) for word in words)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise _no_key()
    return value


def _no_key() -> IntegrityError:
    return IntegrityError("a peer's key for memory of its GPU is malformed")


def _open(source: Source, device: int) -> _Allocation:
    context = cuda.primary(device)
    with cuda.current(context):
        opened: _Opened
        if source.is_fabric:
            opened = cuda.MappedChunks(tuple(zip(source.handles, source.sizes, strict=True)), device)
        else:
            opened = _Handed(source.handles[0], source.sizes[0])
    return _Allocation(source.owner, device, context, opened)

"""What is owned of CUDA's: arenas on a GPU, pinned ranges of host memory, and events that follow a user's stream."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from operator import index
from typing import Any

from raynixl.cuda import driver, streams
from raynixl.cuda.contexts import a_context, current, device_of_context, let_go, on, primary, relaxed
from raynixl.cuda.library import Driver, current_driver, give_back
from raynixl.cuda.pointers import pinned_address
from raynixl.errors import ConfigError, RaynixlError, TransferTimeout

_GRAIN = 2 << 20
"""Smaller allocations share a block of this size with others of the process, and an IPC handle lends the block."""
_ZERO_SECONDS, _ZERO_PAUSE = 30.0, 50e-6
_SPECIAL_STREAMS = (0, 1, 2)  # the default stream, the legacy one, that of each thread: of whichever context is current


class Arena:
    """Zeroed memory of a GPU from cudaMalloc, which every process of the host can be lent.

    It is freed once: by `close`, or when nothing holds on to the object any more. Views of torch and cupy do.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes, self.device = nbytes, device
        with on(device):
            self.address = driver.alloc(-(-nbytes // _GRAIN) * _GRAIN)
            self._free = weakref.finalize(self, _free, current_driver(), os.getpid(), primary(device), self.address)
            self._free.atexit = False  # what is left then goes with the process
            if not _zero(self.address, nbytes):
                self._free.detach()  # freeing would wait for that GPU
                raise TransferTimeout(
                    f"GPU {device} has not zeroed {nbytes} bytes in {_ZERO_SECONDS:g} s",
                    hint="it hangs, or a kernel has it for itself: see nvidia-smi, and end that",
                )

    def __repr__(self) -> str:
        state = "" if self._free.alive else ", closed"
        return f"<Arena of {self.nbytes} bytes on GPU {self.device} at {self.address:#x}{state}>"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        face = {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False)}
        return {**face, "version": 3, "strides": None, "stream": None}

    def close(self) -> None:
        """Free it now; nothing uses it any more."""
        self._free()


def arena(nbytes: int, device: int) -> Arena:
    """Return zeroed memory of a GPU; other processes find the zeros, too.

    Raises:
        RangeError: the GPU has not that much left.
        ConfigError: there is no such GPU.
        TransferTimeout: the GPU works on something else without end.
    """
    return Arena(nbytes, device)


def _zero(address: int, nbytes: int) -> bool:
    """Zero fresh memory; False if the GPU does not get to it in time."""
    stream, deadline = streams.stream_create(), time.monotonic() + _ZERO_SECONDS
    try:
        driver.memset_async(address, 0, nbytes, stream)
        while not streams.stream_query(stream):
            if time.monotonic() > deadline:
                return False
            time.sleep(_ZERO_PAUSE)
        return True
    finally:
        streams.stream_destroy(stream)


def _free(owner: Driver, pid: int, context: int, address: int) -> None:
    if os.getpid() != pid or owner is not current_driver():
        return  # CUDA stayed with the parent
    let_go(context, lambda: give_back("cuMemFree_v2", address))


class Pin:
    """A range of host memory that GPUs reach until this is closed; counted where several want the same range."""

    def __init__(self, address: int, nbytes: int, device_address: int, *, is_ours: bool) -> None:
        self.address, self.nbytes, self.device_address = address, nbytes, device_address
        self.users = 1
        self._is_ours, self._pid, self._context = is_ours, os.getpid(), a_context()

    def close(self) -> None:
        """Let go of it; no GPU uses it for this holder any more. To be called as often as it was given."""
        if os.getpid() != self._pid:
            return  # CUDA stayed with the parent
        owner = current_driver()
        with owner.lock:
            assert self.users > 0, "closed more often than given"
            self.users -= 1
            if self.users:
                return
            owner.pins.pop((self.address, self.nbytes), None)
            if self._is_ours:
                let_go(self._context, lambda: give_back("cuMemHostUnregister", self.address))


def pin(address: int, nbytes: int) -> Pin:
    """Pin host memory for all GPUs, or take part in a pin that is there: ours, or its owner's. Initialises CUDA.

    Raises:
        ConfigError: part of it is pinned already, by somebody else.
        BackendUnavailable, RangeError: the driver cannot.
    """
    owner = current_driver()
    context = a_context()
    with owner.lock, current(context):
        known: Pin | None = owner.pins.get((address, nbytes))
        if known is not None:
            known.users += 1
            return known
        made = _pin(address, nbytes)
        owner.pins[address, nbytes] = made
        return made


def _pin(address: int, nbytes: int) -> Pin:
    theirs = pinned_address(address, nbytes)
    if theirs is not None:
        return Pin(address, nbytes, theirs, is_ours=False)
    driver.host_register(address, nbytes)
    try:
        return Pin(address, nbytes, driver.host_device_address(address), is_ours=True)
    except RaynixlError:
        driver.host_unregister(address)
        raise


class Event:
    """Comes after what was on a stream when it was recorded. `handle` is CUDA's, back in a pool once this is gone."""

    def __init__(self, owner: Driver, context: int, handle: int) -> None:
        self.handle = handle
        self.device = device_of_context(context)
        self._give_back = weakref.finalize(self, _pooled(owner, context).append, handle)
        self._give_back.atexit = False

    def query(self) -> bool:
        """Whether all that it comes after is done."""
        with relaxed():
            return streams.event_query(self.handle)

    def close(self) -> None:
        """Let go of it. Streams that were told to wait for it still do."""
        self._give_back()


def stream_handle(stream: Any) -> int:
    """Return CUDA's handle of a stream of torch or cupy, or of one that is given by its handle.

    Raises:
        ConfigError: that is no stream.
    """
    for name in ("cuda_stream", "ptr"):
        found = getattr(stream, name, None)
        if isinstance(found, int):
            return found
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    if isinstance(stream, bool) or not hasattr(stream, "__index__") or not 0 <= index(stream) < 1 << 64:
        raise ConfigError(
            f"{type(stream).__name__} is no stream of CUDA",
            hint="give a torch.cuda.Stream, a cupy stream, or a handle of one as a number",
        )
    return index(stream)


def stream_device(stream: Any) -> int | None:
    """Return the GPU whose stream it is, as torch and cupy say it; None where that is not said, as by a number."""
    device = getattr(stream, "device", None)
    for found in (getattr(device, "index", None), getattr(stream, "device_id", None)):
        if isinstance(found, int) and found >= 0:
            return found
    return None


def record(stream: Any, device: int) -> Event:
    """Return an event that comes after what is on a stream now. `device` counts for the default streams only.

    Raises:
        ConfigError: that is no stream.
    """
    handle = stream_handle(stream)
    owner = current_driver()
    context = primary(device) if handle in _SPECIAL_STREAMS else _context_of(handle)
    with current(context):
        try:
            number = _pooled(owner, context).popleft()
        except IndexError:
            number = streams.event_create()
        event = Event(owner, context, number)
        streams.event_record(number, handle)
        return event


def _context_of(handle: int) -> int:
    with current(a_context()):
        return streams.stream_context(handle)


def _pooled(owner: Driver, context: int) -> deque[int]:
    return owner.events.setdefault(context, deque())


def close_kept() -> None:
    """Close what the process keeps of the driver for good, for tests: kept objects that can be, and pooled events."""
    owner = current_driver()
    kept, owner.kept = list(owner.kept.values()), {}
    for one in reversed(kept):
        if hasattr(one, "close"):
            one.close()
    for context, events in owner.events.items():
        with current(context):
            while events:
                streams.event_destroy(events.pop())

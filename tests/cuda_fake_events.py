"""Events of the fake CUDA driver; those of CUDA IPC are words in a memfd, which another process maps."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda_fake_core import INVALID_VALUE, Misuse, Refused, put
from cuda_fake_memory import Block, open_bytes, pack, unpack

if TYPE_CHECKING:
    from cuda_fake import FakeCuda
    from cuda_fake_work import Work

NOT_READY, CAPTURED_EVENT = 600, 907
_DISABLE_TIMING, _INTERPROCESS = 2, 4
_handles = itertools.count(0x6000_0001, 0x10)


def _fresh() -> Any:
    return np.zeros(2, np.uint64)


@dataclass(eq=False)
class Event:
    """How often it was recorded, and how often that came to pass."""

    handle: int
    context: int
    is_timed: bool = False
    is_users: bool = False
    words: Any = field(default_factory=_fresh)
    mapping: mmap.mmap | None = None
    fd: int = -1
    serial: int = 0
    ended_at: float = 0.0
    is_captured: bool = False
    pending: set[int] = field(default_factory=set)
    """Which of its records are still to come: one that was made later may come earlier, on another stream."""

    @property
    def begun(self) -> int:
        """How often it was recorded."""
        return int(self.words[0])

    def begin(self) -> None:
        """It is recorded."""
        self.words[0] += np.uint64(1)
        self.pending.add(self.begun)

    def end(self, count: int) -> None:
        """What it was recorded after is done."""
        self.words[1] = max(int(self.words[1]), count)
        self.pending.discard(count)
        self.ended_at = time.monotonic()

    def moment(self) -> Callable[[], bool]:
        """Return what tells whether it has come to pass as it is recorded now."""
        words, wanted = self.words, self.begun
        return lambda: int(words[1]) >= wanted and wanted not in self.pending


class Events:
    """All events, by handle."""

    def __init__(self, fake: FakeCuda, work: Work) -> None:
        self._fake, self._work = fake, work
        self.events: dict[int, Event] = {}

    def at(self, number: int | None) -> Event:
        """Return an event, which must be alive."""
        if number not in self.events:
            raise Misuse(f"event {number or 0:#x} does not exist, or was destroyed")
        return self.events[number]

    def recorded(self, number: int | None) -> Event:
        """Return an event that has been recorded."""
        event = self.at(number)
        if event.begun == 0:
            raise Misuse("an event is waited for that was never recorded")
        return event

    def leaks(self) -> list[str]:
        """What was not destroyed."""
        return [f"event {one.handle:#x} was never destroyed" for one in self.events.values() if not one.is_users]

    def close(self) -> None:
        """Give back what shared events hold."""
        for event in self.events.values():
            self._drop(event)
        self.events.clear()

    def _share(self, event: Event, fd: int) -> None:
        event.fd, event.mapping = fd, mmap.mmap(fd, 16)
        event.words = np.frombuffer(event.mapping, np.uint64)

    def _drop(self, event: Event) -> None:
        event.words, event.mapping = event.words.copy() if event.mapping is None else event.words, None
        if event.fd >= 0:
            os.close(event.fd)  # queued waits keep the mapping

    def _cuEventCreate(self, out: int, flags: int) -> None:  # noqa: N802
        if flags & _INTERPROCESS and not flags & _DISABLE_TIMING:
            raise Refused(INVALID_VALUE)
        event = Event(next(_handles), self._fake.devices.current, is_timed=not flags & _DISABLE_TIMING)
        if flags & _INTERPROCESS:
            event.serial = Block(0, 0, 16).serial
            fd = os.memfd_create(f"fakecuda-{event.serial}", os.MFD_CLOEXEC)
            os.ftruncate(fd, 16)
            self._share(event, fd)
        self.events[event.handle] = event
        put(out, c_void_p, event.handle)

    def _cuEventDestroy_v2(self, number: int | None) -> None:  # noqa: N802
        self._drop(self.at(number))
        del self.events[number or 0]

    def _cuEventQuery(self, number: int | None) -> int:  # noqa: N802
        if self.at(number).is_captured:
            raise Refused(CAPTURED_EVENT)
        return 0 if self.recorded(number).moment()() else NOT_READY

    def _cuIpcGetEventHandle(self, out: int, number: int | None) -> None:  # noqa: N802
        event = self.at(number)
        if event.fd < 0:
            raise Misuse("an event is exported that was not made for other processes")
        ctypes.memmove(out, pack(Block(0, 0, 16, fd=event.fd), bytes(16), serial=event.serial), 64)

    def _cuIpcOpenEventHandle(self, out: int, handle: Any) -> None:  # noqa: N802
        pid, fd, serial, _, _ = unpack(bytes(handle))
        if pid == os.getpid():
            raise Misuse("an event's handle is opened in the process that made it")
        event = Event(next(_handles), self._fake.devices.current)
        self._share(event, open_bytes(pid, fd, serial))
        self.events[event.handle] = event
        put(out, c_void_p, event.handle)

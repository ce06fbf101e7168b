"""Streams and events of the fake CUDA driver: queues of work, and when it runs."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda_fake_core import INVALID_VALUE, Misuse, Mode, Refused, put
from cuda_fake_events import Events

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

NOT_READY, CAPTURE_UNSUPPORTED, CAPTURE_ISOLATION = 600, 900, 905
SPECIAL = (0, 1, 2)
"""The default stream of a context, the legacy one, that of a thread."""
_RELAXED = 2
_UNSAFE = {
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuMemHostRegister_v2", "cuMemHostUnregister",
    "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuIpcOpenEventHandle", "cuStreamQuery",
    "cuStreamSynchronize", "cuEventQuery", "cuEventSynchronize", "cuModuleLoadData", "cuModuleUnload", "cuMemMap",
    "cuMemUnmap", "cuMemSetAccess", "cuMemCreate",
}  # fmt: skip
_handles = itertools.count(0x5000_0001, 0x10)


def _always() -> bool:
    return True


@dataclass(eq=False)
class Piece:
    """One thing on a stream. `run` returns a generator if it has to be run on later, piece by piece."""

    label: str
    run: Callable[[], Any]
    is_ready: Callable[[], bool] = _always
    touches: tuple[tuple[int, int], ...] = ()
    """Addresses and lengths that are known beforehand."""
    due: float = 0.0
    rest: Any = None

    def step(self) -> bool:
        """Run it, or a part of it; True once it is done."""
        if self.rest is None:
            self.rest = self.run()
            if self.rest is None:
                return True
        return next(self.rest, self) is self


@dataclass(eq=False)
class Stream:
    """A queue of work."""

    handle: int
    context: int
    is_users: bool = False
    pieces: deque[Piece] = field(default_factory=deque)
    captured: list[Piece] | None = None


class Graph:
    """What was put on a stream while it was captured."""

    def __init__(self, work: Work, stream: Stream) -> None:
        self._work, self._stream, self._pieces = work, stream, stream.captured or []

    def launch(self) -> None:
        """Put all of it on the stream again."""
        with self._work.fake.lock:
            for one in self._pieces:
                self._work.queue(self._stream, Piece(one.label, one.run, one.is_ready, one.touches))


class Work:
    """All streams, and who runs what is on them."""

    def __init__(self, fake: FakeCuda, mode: Mode, delay: float) -> None:
        self.fake, self.mode, self._delay = fake, mode, delay
        self.streams: dict[int, Stream] = {}
        self.events = Events(fake, self)
        self.patience = 10.0
        self._modes: dict[int, int] = {}
        self._ended = False
        self._thread: threading.Thread | None = None
        self._running = False

    # What tests ask.

    def stream(self, context: int) -> int:
        """Make a stream as the user's program does, not raynixl."""
        with self.fake.lock:
            made = self._add(context)
            made.is_users = True
            return made.handle

    def put(self, stream: int, run: Callable[[], Any], label: str = "the user's work") -> None:
        """Queue something on a stream as the user's program does."""
        with self.fake.lock:
            self.queue(self.of(stream), Piece(label, run))

    def begin_capture(self, stream: int) -> None:
        """Have what is put on a stream go into a graph."""
        self.of(stream).captured = []

    def end_capture(self, stream: int) -> Graph:
        """Return the graph."""
        found = self.of(stream)
        graph = Graph(self, found)
        found.captured = None
        return graph

    def release(self) -> None:
        """Run all that is held, and whatever comes from now on at once."""
        with self.fake.lock:
            self.mode = Mode.AT_ONCE
            self.wake()

    # What the other parts ask.

    def of(self, handle: int | None, context: int | None = None) -> Stream:
        """Return a stream; the special ones belong to the current context."""
        number = handle or 0
        if number in SPECIAL:
            where = self.fake.devices.current if context is None else context
            key = -(where * 4 + number)
            return self.streams.setdefault(key, Stream(number, where, is_users=True))
        if number not in self.streams:
            raise Misuse(f"stream {number:#x} does not exist, or was destroyed")
        return self.streams[number]

    def ours(self, handle: int | None) -> Stream:
        """Return a stream that raynixl puts work on: in the current context, and not a default one."""
        if (handle or 0) in SPECIAL:
            raise Misuse("work is put on a default stream, which all other work of the process waits for")
        found = self.of(handle)
        if found.context != self.fake.devices.current:
            raise Misuse(f"a stream of context {found.context:#x} is used in {self.fake.devices.current:#x}")
        return found

    def queue(self, stream: Stream, piece: Piece) -> None:
        """Put something on a stream; it runs as the mode says."""
        if stream.captured is not None:
            stream.captured.append(piece)
            return
        piece.due = time.monotonic() + self._delay
        stream.pieces.append(piece)
        self.wake()

    def wake(self) -> None:
        """Run what can run now, or have a thread do it."""
        if self.mode is Mode.AT_ONCE and not self._running:
            self._running = True
            try:
                while self.step():
                    pass
            finally:
                self._running = False
        has_more = self.mode is not Mode.HELD and any(one.pieces for one in list(self.streams.values()))
        if has_more and self._thread is None and not self._ended:
            self._thread = threading.Thread(target=self._serve, name="fake-cuda", daemon=True)
            self._thread.start()
        self.fake.changed.notify_all()

    def step(self, now: float = float("inf")) -> bool:
        """Bring one piece to its end, of the stream that got its work last; False if none can be."""
        heads = [one for one in list(self.streams.values()) if one.pieces]
        for stream in sorted(heads, key=lambda one: one.pieces[0].due, reverse=True):
            piece = stream.pieces[0]
            if piece.due > now or not piece.is_ready():
                continue
            try:
                is_done = piece.step()
            except Misuse as exc:
                self.fake.blame(f"{piece.label}: {exc}")
                is_done = True
            if is_done:
                stream.pieces.popleft()
                self.fake.changed.notify_all()
                return True
        return False

    def pending_on(self, held: Any) -> str:
        """Say which queued work needs memory, or ''."""
        spans = [(held.address, held.nbytes), (getattr(held, "device_address", held.address), held.nbytes)]
        for stream in list(self.streams.values()):
            for piece in stream.pieces:
                for address, nbytes in piece.touches:
                    if any(address < start + size and start < address + nbytes for start, size in spans):
                        return piece.label
        return ""

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Wait as the driver does: work that is held would never end."""
        deadline = time.monotonic() + self.patience
        while not is_done():
            if self.mode is Mode.AT_ONCE and self.step():
                continue
            self.fake.changed.wait(0.001)
            if time.monotonic() > deadline:
                raise Misuse("waited for work that does not end")

    def drain(self) -> None:
        """Let everything run to its end."""
        with self.fake.lock:
            if self.mode is Mode.HELD:
                self.release()
            deadline = time.monotonic() + self.patience
            while any(one.pieces for one in list(self.streams.values())):
                if not self.step():
                    self.fake.changed.wait(0.001)
                if time.monotonic() > deadline:
                    self.fake.blame("work never ends: " + ", ".join(self._stuck()))
                    return

    def stop(self) -> None:
        """End the thread."""
        with self.fake.lock:
            self._ended = True
            self.fake.changed.notify_all()
        if self._thread is not None:
            self._thread.join(5.0)

    def leaks(self) -> list[str]:
        """What was not destroyed."""
        return [
            f"stream {one.handle:#x} was never destroyed" for one in list(self.streams.values()) if not one.is_users
        ]

    def check_capture(self, name: str) -> None:
        """Refuse what breaks a capture: most calls that are not put on a stream, in a thread that is not relaxed."""
        is_captured = any(one.captured is not None for one in list(self.streams.values()))
        if is_captured and name in _UNSAFE and self._modes.get(threading.get_native_id()) != _RELAXED:
            raise Misuse("this breaks the CUDA graph that is captured meanwhile: the thread is not relaxed")

    def _cuThreadExchangeStreamCaptureMode(self, mode: int) -> None:  # noqa: N802
        thread, word = threading.get_native_id(), c_int.from_address(mode)
        word.value, self._modes[thread] = self._modes.get(thread, 0), word.value

    def _stuck(self) -> list[str]:
        return [one.pieces[0].label for one in list(self.streams.values()) if one.pieces]

    def _serve(self) -> None:
        with self.fake.lock:
            while not self._ended:
                if self.mode is Mode.DELAYED:
                    self.step(time.monotonic())
                elif self.mode is Mode.AT_ONCE:
                    self.wake()
                is_idle = not any(one.pieces for one in list(self.streams.values()))
                self.fake.changed.wait(1.0 if is_idle else self._delay / 4)

    def _add(self, context: int) -> Stream:
        made = Stream(next(_handles), context)
        self.streams[made.handle] = made
        return made

    # Functions of the driver.

    def _cuStreamCreateWithPriority(self, out: int, flags: int, priority: int) -> None:  # noqa: N802
        if flags != 1:
            raise Misuse("a stream that waits for the default stream, and that for it")
        put(out, c_void_p, self._add(self.fake.devices.current).handle)

    def _cuStreamDestroy_v2(self, handle: int | None) -> None:  # noqa: N802
        stream = self.of(handle)
        if stream.is_users:
            raise Misuse("a stream is destroyed that raynixl has not made")
        if stream.pieces:  # it still runs, but nobody finds the stream any more
            self.streams[-stream.handle] = self.streams.pop(stream.handle)
            stream.is_users = True
        else:
            del self.streams[stream.handle]

    def _cuStreamQuery(self, handle: int | None) -> int:  # noqa: N802
        stream = self.of(handle)
        if stream.captured is not None:
            raise Refused(CAPTURE_UNSUPPORTED)
        return NOT_READY if stream.pieces else 0

    def _cuStreamSynchronize(self, handle: int | None) -> None:  # noqa: N802
        stream = self.ours(handle)
        if stream.captured is not None:
            raise Refused(CAPTURE_UNSUPPORTED)
        self.wait(lambda: not stream.pieces)

    def _cuStreamWaitEvent(self, handle: int | None, number: int | None, flags: int) -> None:  # noqa: N802
        event, stream = self.events.recorded(number), self.of(handle)
        if (stream.captured is not None) != event.is_captured:
            raise Refused(CAPTURE_ISOLATION)
        is_done = event.moment()
        self.queue(stream, Piece("a wait for an event", lambda: None, is_ready=is_done))

    def _cuStreamIsCapturing(self, handle: int | None, out: int) -> None:  # noqa: N802
        put(out, c_int, int(self.of(handle).captured is not None))

    def _cuStreamGetCtx(self, handle: int | None, out: int) -> None:  # noqa: N802
        put(out, c_void_p, self.of(handle).context)

    def _cuEventRecord(self, number: int | None, handle: int | None) -> None:  # noqa: N802
        event, stream = self.events.at(number), self.of(handle)
        if event.context != stream.context:
            raise Misuse("an event is recorded on a stream of another context")
        event.begin()
        event.is_captured = stream.captured is not None
        count = event.begun
        self.queue(stream, Piece("an event", lambda: event.end(count)))

    def _cuEventSynchronize(self, number: int | None) -> None:  # noqa: N802
        self.wait(self.events.recorded(number).moment())

    def _cuEventElapsedTime(self, out: int, first: int | None, second: int | None) -> None:  # noqa: N802
        one, two = self.events.recorded(first), self.events.recorded(second)
        if not (one.is_timed and two.is_timed):
            raise Refused(INVALID_VALUE)
        put(out, c_float, max(0.0, two.ended_at - one.ended_at) * 1000)

    def _copy(self, target: int, source: int, nbytes: int, handle: int | None) -> None:
        stream, context = self.ours(handle), self.fake.devices.current
        self.fake.memory.view(target, nbytes, context), self.fake.memory.view(source, nbytes, context)

        def run() -> None:
            into = self.fake.memory.view(target, nbytes, context)
            into[:] = self.fake.memory.view(source, nbytes, context)

        touches = ((target, nbytes), (source, nbytes))
        self.queue(stream, Piece(f"a copy of {nbytes} bytes", run, touches=touches))

    def _cuMemcpyAsync(self, target: int, source: int, nbytes: int, stream: int | None) -> None:  # noqa: N802
        self._copy(target, source, nbytes, stream)

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, nbytes: int, stream: int | None) -> None:  # noqa: N802
        self._check_host(source)
        self._copy(target, source, nbytes, stream)

    def _cuMemcpyDtoHAsync_v2(self, target: int, source: int, nbytes: int, stream: int | None) -> None:  # noqa: N802
        self._check_host(target)
        self._copy(target, source, nbytes, stream)

    def _cuMemcpyDtoDAsync_v2(self, target: int, source: int, nbytes: int, stream: int | None) -> None:  # noqa: N802
        self.fake.memory.at(target), self.fake.memory.at(source)
        self._copy(target, source, nbytes, stream)

    def _cuMemcpyPeerAsync(  # noqa: N802
        self, target: int, into: int, source: int, out_of: int, nbytes: int, handle: int | None
    ) -> None:
        stream = self.ours(handle)

        def run() -> None:
            view = self.fake.memory.view(source, nbytes, out_of)
            self.fake.memory.view(target, nbytes, into)[:] = view

        touches = ((target, nbytes), (source, nbytes))
        self.queue(stream, Piece(f"a copy of {nbytes} bytes", run, touches=touches))

    def _check_host(self, address: int) -> None:
        found = self.fake.host.find(address)
        if found is None or not found.address <= address < found.address + found.nbytes:
            raise Misuse(f"host memory at {address:#x} is not pinned: its copy would block the caller")

    def _cuMemsetD8Async(self, address: int, value: int, nbytes: int, handle: int | None) -> None:  # noqa: N802
        stream, context = self.ours(handle), self.fake.devices.current
        self.fake.memory.view(address, nbytes, context)

        def run() -> None:
            self.fake.memory.view(address, nbytes, context)[:] = np.uint8(value)

        self.queue(stream, Piece(f"a fill of {nbytes} bytes", run, touches=((address, nbytes),)))

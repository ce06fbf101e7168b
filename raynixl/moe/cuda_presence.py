"""Presence: while kernels of ours may be at work in peers' memory, its gates are entered, and it stays mapped."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raynixl import cuda
from raynixl.backends.nvlink_watch import Watch
from raynixl.errors import RaynixlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from raynixl.native import Gate

_PAUSE = 2e-4
_SELDOM_SECONDS = 0.02
"""Between two looks while a graph has captured work, which may run at any time."""


class Presence:
    """The gates of peers' memory: entered before work is put on a stream, left once nothing of it is left.

    One thread puts work; the watch's thread leaves. What a CUDA graph has captured may run at any time, so from then on
    the gates are left by `close` alone, or once a peer's gate is closed and no work that was put is left.
    """

    def __init__(self, device: int, gates: Mapping[int, Gate], look: Callable[[], None], name: str) -> None:
        self._device = device
        self._gates = dict(gates)
        self._look_too = look
        self._lock = threading.Lock()  # protects _inside, _leaving, _last
        self._inside: dict[int, Gate] = {}
        self._leaving: list[Gate] = []
        self._last: cuda.Event | None = None
        self._is_under_way = False
        self._is_held = False
        self._next_look = 0.0
        self._watch = Watch(self._look, name)

    @property
    def is_held(self) -> bool:
        """Whether a graph has captured work."""
        return self._is_held

    def closed(self) -> int:
        """Return the ranks that have ended, or let go of their memory, 1 bit each."""
        return sum(1 << rank for rank, gate in self._gates.items() if gate.code)

    def enter(self) -> int:
        """Enter the gates; return those whose ranks are gone, 1 bit each: nothing may touch their memory."""
        gone = 0
        with self._lock:
            self._is_under_way = True
            for rank, gate in self._gates.items():
                if rank not in self._inside:
                    if gate.enter():
                        gone |= 1 << rank
                    else:
                        self._inside[rank] = gate
                elif gate.code:
                    gone |= 1 << rank
                    self._leaving.append(self._inside.pop(rank))
        return gone

    def put(self, stream: int, *, is_captured: bool) -> None:
        """Note that work has been put on a stream: the gates are left when it is through."""
        event = None if is_captured else cuda.record(stream, self._device)
        with self._lock:
            self._is_under_way = False
            if event is None:
                self._is_held = True
            else:
                self._last = event
        self._watch.wake()

    def note(self, stream: int) -> None:
        """Note what else is on a stream, such as replays of graphs."""
        event = cuda.record(stream, self._device)
        with self._lock:
            self._last = event

    def follow(self, stream: int) -> None:
        """Have a stream wait for what was put on another one."""
        last = self._last
        if last is not None and not last.query():
            with cuda.on(self._device):
                cuda.stream_wait_event(stream, last.handle)

    def is_idle(self) -> bool:
        """Whether nothing that was put is left; what a GPU that has failed was to do is over, too."""
        last = self._last
        if last is None:
            return True
        try:
            return last.query()
        except RaynixlError:
            return True

    def wait_idle(self, deadline: float) -> bool:
        """Wait until nothing that was put is left; False at the deadline."""
        while not (is_idle := self.is_idle()) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return is_idle

    def close(self, deadline: float) -> bool:
        """Leave the gates once nothing is left; no graph is replayed any more. False if it takes longer."""
        is_idle = self.wait_idle(deadline)
        with self._lock:
            self._is_held = False
        if is_idle:
            self._look()
            self._watch.close(1.0)
        return is_idle  # otherwise the watch leaves them

    def _look(self) -> bool:
        """Leave gates if nothing is under way; whether there is anything to look at again."""
        if self._is_held and not self._leaving and time.monotonic() < self._next_look:
            return True
        self._next_look = time.monotonic() + _SELDOM_SECONDS
        self._look_too()
        with self._lock:
            if not self._is_under_way and self.is_idle():
                self._last = None
                left, self._leaving = self._leaving, []
                if not self._is_held:
                    left += self._inside.values()
                    self._inside.clear()
                for gate in left:
                    gate.leave()
            return bool(self._leaving or self._inside)

"""Programs that a GPU carries out, and their jobs: the face of the core's `Program` and `Job`."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl import cuda
from raynixl.native import CLOSED, DONE, PENDING, TIMEOUT, Gate, Job, Launcher
from raynixl.native.twin_job import fork_generation

if TYPE_CHECKING:
    from raynixl.backends.nvlink_lane import Lane
    from raynixl.backends.nvlink_mover import Mover
    from raynixl.backends.nvlink_transit import Arrival

INLINE_NBYTES, INLINE_HOST_NBYTES = 64 << 20, 1 << 20
"""What a GPU moves in some 50 us, and where host memory takes part: who posts it looks for its end at once."""
_LOOK_SECONDS = 60e-6
_WAIT_LOOK_SECONDS = 1e-3
"""A sleep is 60 us too long: who waits looks for longer than that would matter."""
_LEAST_PAUSE, _MOST_PAUSE = 20e-6, 1e-3
_PAUSE_SHARE = 1 / 32  # of the time waited so far
_CHECK_SECONDS = 0.01
FULL = 256
"""From here on a stream may be full: the driver then waits, and the interpreter must not."""


@dataclass(eq=False, slots=True)
class Start:
    """What a program puts on a lane. `held` is what its kernel needs until it is through."""

    launcher: Launcher
    held: object = None
    arrivals: tuple[Arrival, ...] = ()
    """What must be on the GPU before; those that are known to be there are forgotten."""
    entries: int = 1
    """What it puts on the stream: its kernel, and each copy before that."""

    def put(self, lane: Lane, sequence: int) -> None:
        """Put it there; its end is this number, 0 for one that the GPU counts itself.

        Raises:
            RaynixlError: CUDA does not take it; a part of it may be on the lane.
        """
        if self.arrivals:
            self.arrivals = tuple(one for one in self.arrivals if not one.precede(lane.stream))
        lane.load += self.entries
        code = self.launcher.run(lane.stream, lane.flag, sequence, lane.counter, lane.load > FULL)
        if code:
            raise cuda.failure(code, "cuLaunchKernel")


class GpuProgram:
    """A list of blocks that a GPU copies; run any number of times, also while an earlier run is in flight."""

    __slots__ = ("_gates", "_is_short", "_mover", "count", "nbytes", "start")

    def __init__(
        self,
        mover: Mover,
        start: Start,
        gates: Sequence[Gate],
        *,
        count: int,
        nbytes: int,
        inline_nbytes: int = INLINE_NBYTES,
    ) -> None:
        self._mover = mover
        self._is_short = nbytes <= inline_nbytes
        self.start = start
        self._gates = tuple(gates)
        self.count = count
        self.nbytes = nbytes

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """Start it; see `Program.run`. What is small has ended when this returns, if the GPU is not busy."""
        if code := self._enter():
            return code
        lane, sequence = self._mover.put(self, None)
        if lane is None:
            return sequence
        if self._is_short and not out_of_line:
            try:
                if self._mover.core.look_for(lane.address, sequence, _LOOK_SECONDS):
                    self.leave()
                    return DONE
            except BaseException:  # Ctrl-C: the GPU goes on, and the gates are left when it is through
                self._mover.watch(GpuJob(self, lane, sequence, timeout))
                raise
        job = GpuJob(self, lane, sequence, timeout)
        self._mover.watch(job)
        return job

    def run_after(self, timeout: float, event: cuda.Event) -> int | Job:
        """Start it once an event has come; this thread does not wait for that. The deadline counts from now."""
        if code := self._enter():
            return code
        lane, sequence = self._mover.put(self, event)
        if lane is None:
            return sequence
        job = GpuJob(self, lane, sequence, timeout)
        self._mover.watch(job)
        return job

    def run_to_end(self, timeout: float, event: cuda.Event) -> int:
        """Run it once an event has come, and wait for its end; return its code, PENDING if it has none in time."""
        if code := self._enter():
            return code
        lane, sequence = self._mover.put(self, event)
        if lane is None:
            return sequence
        try:
            if self._mover.core.look_for(lane.address, sequence, min(timeout, _WAIT_LOOK_SECONDS)):
                self.leave()
                return DONE
        except BaseException:  # Ctrl-C: as in `run`
            self._mover.watch(GpuJob(self, lane, sequence, timeout))
            raise
        job = GpuJob(self, lane, sequence, timeout)
        self._mover.watch(job)
        job.wait(timeout)
        return job.code

    def capture(self, stream: int) -> Captured:
        """Put it on a stream that is being captured into a CUDA graph, or that is none of ours.

        Addresses are fixed, and nothing of the host runs in between. The memory belongs to it until `Captured.close`.

        Raises:
            ConfigError: the stream cannot take it.
            RegionStale, PeerLost, ...: what is said of a transfer whose gate is closed, by its code; see `Captured`.
        """
        return Captured(self._mover, self, stream)

    def enter(self) -> int:
        """Enter all gates, or none; return the code of the one that refused, else 0."""
        return self._enter()

    def leave(self) -> None:
        """Leave all gates."""
        for gate in self._gates:
            gate.leave()

    @property
    def aborted(self) -> int:
        """The code of the first gate whose closing ends those inside, else 0."""
        return next((code for gate in self._gates if (code := gate.aborted)), 0)

    def _enter(self) -> int:
        for number, gate in enumerate(self._gates):
            if code := gate.enter():
                for entered in self._gates[:number]:
                    entered.leave()
                return code
        return 0


class GpuJob:
    """One run of a program. It ends once, with one code; settled once the GPU is through, which nobody can hasten.

    Whoever looks at it finds out how far the GPU is; if nobody does, the mover's thread will.
    """

    __slots__ = ("_armed", "_deadline", "_forks", "_is_settled", "_lock", "_program", "_result", "lane", "sequence")

    def __init__(self, program: GpuProgram, lane: Lane, sequence: int, timeout: float) -> None:
        self.sequence = sequence
        self._program = program
        self.lane = lane
        self._deadline = time.monotonic() + (timeout if timeout > 0 else 0.0)
        self._forks = fork_generation()
        self._lock = threading.Lock()  # protects _result, _armed
        self._result = PENDING
        self._is_settled = False
        self._armed: list[int] = []

    @property
    def code(self) -> int:
        """PENDING until it has ended; looking applies the deadline, and that a gate was closed."""
        if self._result == PENDING:
            if self._forks != fork_generation():
                self._result = CLOSED  # CUDA stayed with the parent
                return CLOSED
            self._program._mover.collect(self.lane)
            if self._result == PENDING:
                if time.monotonic() >= self._deadline:
                    self._end(TIMEOUT)
                elif aborted := self._program.aborted:
                    self._end(aborted)
        return self._result

    @property
    def nbytes_done(self) -> int:
        """All bytes or none: how far a kernel is cannot be seen."""
        return self._program.nbytes if self._result == DONE else 0

    @property
    def settled(self) -> bool:
        """Whether it has ended and the GPU touches its memory no more."""
        return self.code != PENDING and self._has_settled()

    def wait(self, timeout: float) -> bool:
        """Wait for the end. False at the timeout."""
        if self._result != PENDING:
            return True
        if timeout > 0 and self._forks == fork_generation():
            mover = self._program._mover
            if mover.core.look_for(self.lane.address, self.sequence, min(timeout, _WAIT_LOOK_SECONDS)):
                mover.collect(self.lane)
                if self._result != PENDING:
                    return True
        return self._wait_until(lambda: self.code != PENDING, timeout)

    def wait_settled(self, timeout: float) -> bool:
        """Wait until the GPU touches its memory no more. False at the timeout."""
        return self._wait_until(lambda: self.settled, timeout)

    def cancel(self, code: int) -> bool:
        """End it with `code` unless it has ended. The GPU goes on, and the gates stay entered, until it is through."""
        if code < 2:
            raise ValueError("the code of a cancelled job is 2 or more")
        return self._forks == fork_generation() and self._end(code)

    def arm(self, fd: int) -> bool:
        """Have 1 written to a duplicate of the eventfd when it ends; False if it has."""
        if self.code != PENDING:
            return False
        duplicate = os.dup(fd)
        with self._lock:
            if self._result == PENDING:
                self._armed.append(duplicate)
                self._program._mover.hurry()
                return True
        os.close(duplicate)
        return False

    def order(self, stream: int, device: int) -> None:
        """Have what is put on a stream of a GPU from now on wait for ours to be through; this thread does not."""
        self._program._mover.order(self.lane, self.sequence, stream, device)

    def look(self) -> None:
        """End it if its time is over or a gate says so."""
        _ = self.code

    def finish(self, code: int) -> list[int]:
        """Hear that the GPU is through, well or not; return what `ring` is to be told. Called once."""
        self._program.leave()
        self._is_settled = True
        return self._conclude(code) or []

    def _has_settled(self) -> bool:
        if not self._is_settled and self._forks == fork_generation():
            self._program._mover.collect(self.lane)
        return self._is_settled or self._forks != fork_generation()

    def _wait_until(self, is_over: Callable[[], bool], timeout: float) -> bool:
        began = time.monotonic()
        limit = began + (timeout if timeout > 0 else 0.0)
        check = began + _CHECK_SECONDS
        while not is_over():
            now = time.monotonic()
            if now >= limit:
                return False
            if now >= check:
                self._program._mover.check(self.lane)
                check = now + _CHECK_SECONDS
            pause = min(_MOST_PAUSE, max(_LEAST_PAUSE, (now - began) * _PAUSE_SHARE), limit - now)
            if self._result == PENDING:
                pause = min(pause, max(0.0, self._deadline - now))
            time.sleep(pause)
        return True

    def _end(self, code: int) -> bool:
        armed = self._conclude(code)
        ring(armed or [])
        return armed is not None

    def _conclude(self, code: int) -> list[int] | None:
        """Set the code and return who is to be told, None if there is a code already."""
        with self._lock:
            if self._result != PENDING:
                return None
            self._result = code
            armed, self._armed = self._armed, []
        return armed


def ring(armed: list[int]) -> None:
    """Tell those who sleep until a job ends, and let go of their descriptors."""
    for fd in armed:
        with contextlib.suppress(BlockingIOError):  # full, hence readable already
            os.eventfd_write(fd, 1)
        os.close(fd)


class Captured:
    """A program inside a CUDA graph: it runs whenever the graph is replayed, in the graph's order.

    `code` is that of a gate that was closed, and then nothing was put on the stream; else 0.
    """

    def __init__(self, mover: Mover, program: GpuProgram, stream: int) -> None:
        self.code = program.enter()
        self._program = program
        self._mover = mover
        self._lane: Lane | None = None
        self._before = 0
        self._forks = fork_generation()
        if self.code:
            return
        try:
            self._lane, self._before = mover.capture(program, stream)
        except BaseException:
            program.leave()
            raise

    @property
    def runs(self) -> int:
        """How many replays have come to this program's end; 0 in a child that was forked, which sees none of it."""
        if self._lane is None or self._forks != fork_generation():
            return 0
        return self._lane.reached - self._before

    def close(self) -> None:
        """Leave the gates: the graph is gone, or will not be replayed any more, and no replay is in flight."""
        lane, self._lane = self._lane, None
        if lane is not None:
            self._mover.release(lane)
            self._program.leave()

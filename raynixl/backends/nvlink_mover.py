"""The mover of a GPU: makes programs of block lists, and puts them on its lanes."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_uint64
from typing import Any

import numpy as np

from raynixl import cuda
from raynixl.backends.nvlink_kernel import load_kernels
from raynixl.backends.nvlink_lane import WORD_NBYTES, Lane
from raynixl.backends.nvlink_program import FULL, INLINE_HOST_NBYTES, INLINE_NBYTES, GpuJob, GpuProgram, Start, ring
from raynixl.backends.nvlink_slabs import Slabs
from raynixl.backends.nvlink_tiles import Cut, Rows, Tuning, Way, plan
from raynixl.backends.nvlink_transit import Arrival, Transit, wait_until
from raynixl.backends.nvlink_watch import Watch
from raynixl.errors import BackendUnavailable, RaynixlError
from raynixl.native import CLOSED, Gate, Launcher, Native, load
from raynixl.native.twin_job import fork_generation

logger = logging.getLogger(__name__)

_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_WORDS = 2048  # lanes and captured programs at a time
_COUNTER_NBYTES = 16
_LANES, _FULL_LANES, _WAITING_LANES = 4, 16, 512
_CLOSE_SECONDS = 5.0
_CLOSE_PAUSE = 1e-3
_WARM_SECONDS = 30.0
_NO_END = BackendUnavailable("CUDA did not take what would have said that they have ended", hint="see the log")
_NO_ROWS = np.empty((0, 3), np.uint64)
_CALLS = ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuLaunchKernel", "cuMemcpyAsync")


def mover(device: int) -> Mover:
    """Return the mover of a GPU, the same for the whole process. CUDA is initialised, kernels are compiled.

    Raises:
        BackendUnavailable, ConfigError: there is no such GPU, or no cupy to compile with.
    """
    made: Mover = cuda.kept(("mover", device), lambda: Mover(device))
    return made


class Mover:
    """Puts programs on a GPU's lanes. Any thread may use it; it never waits for the whole GPU."""

    def __init__(
        self, device: int, tuning: Tuning | None = None, options: Sequence[str] = (), *, core: Native | None = None
    ) -> None:
        self.device = device
        self.core = load(native=True) if core is None else core
        self.tuning = tuning
        self.context = cuda.primary(device)
        get, push, pop, start, copy = (cuda.function_address(name) for name in _CALLS)
        self._calls = get, push, pop, start, copy
        self.multiprocessors = cuda.device_attribute(device, _MULTIPROCESSORS)
        self.kernels = load_kernels(device, options)
        self.tables = Slabs(self._in_context(cuda.alloc), self._in_context(cuda.free))
        self.pinned = Slabs(self._in_context(cuda.host_alloc), self._in_context(cuda.host_free))
        self._lock = threading.Lock()  # protects _lanes, _waiting, _marks, and what is put on lanes
        self._lanes: list[Lane] = []
        self._waiting: list[Lane] = []
        self._is_closed = False
        self._forks = fork_generation()
        self._words = self.pinned.take(_WORDS * WORD_NBYTES)
        self._counters = self.tables.take(_WORDS * _COUNTER_NBYTES)
        self._marks = list(range(_WORDS))
        np.frombuffer(cuda.host_bytes(self._words.address, self._words.nbytes), np.uint8)[:] = 0
        self.transit = Transit(device, self.tables, self.pinned)
        zeroed = self.transit.zero(self._counters)
        wait_until(zeroed.is_there, _WARM_SECONDS, device)
        self._watch = Watch(self._look, f"raynixl-gpu-{device}")
        with cuda.on(device):
            self._flags = cuda.host_device_address(self._words.address)
            self._lanes.append(self._make_lane(cuda.stream_create(is_urgent=True)))
        self._signal = Start(self.launcher("raynixl_signal", 1, 32, []))
        try:
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def program(self, table: Rows, gates: Sequence[Gate], *, touches_host: bool = False) -> GpuProgram:
        """Compile rows of (source, destination, nbytes); addresses are such as this GPU reaches.

        A table of blocks is on its way to the GPU then; nobody waits for it here.

        Raises:
            RangeError: the GPU has no memory for it.
        """
        cut = plan(table, self.multiprocessors, touches_host=touches_host, tuning=self.tuning)
        nbytes = int(table[:, 2].sum())
        inline = INLINE_HOST_NBYTES if touches_host else INLINE_NBYTES
        return GpuProgram(self, self._start(cut), gates, count=len(table), nbytes=nbytes, inline_nbytes=inline)

    def put(self, program: GpuProgram, event: cuda.Event | None) -> tuple[Lane | None, int]:
        """Put a program, whose gates have been entered, on a lane; return that and its end's number.

        What CUDA does not take is logged, and (None, -EIO) is returned; the gates are left, at once or as soon as what
        it has taken of it is through.
        """
        if self._forks != fork_generation():
            program.leave()
            return None, CLOSED  # CUDA stayed with the parent
        lane: Lane | None = None
        try:
            with self._lock:
                lane = self._free_lane() if event is None or event.query() else self._lane_to_wait(event)
                sequence = lane.take_number()
                program.start.put(lane, sequence)
                return lane, sequence
        except RaynixlError as exc:
            logger.error("GPU %d does not take a transfer: %s", self.device, exc)
            self._abandon(program, lane)
            return None, -errno.EIO
        except BaseException:  # Ctrl-C: what is on the lane goes on
            self._abandon(program, lane)
            raise

    def _abandon(self, program: GpuProgram, lane: Lane | None) -> None:
        """Leave the gates of a program when nothing of it is on the lane any more."""
        if lane is None:
            program.leave()
            return
        with self._lock, suppress(RaynixlError):  # then `check` finds that the stream is through
            sequence = lane.take_number()
            self._signal.put(lane, sequence)
        self.watch(GpuJob(program, lane, sequence, 0.0))
        self.collect(lane)
        self.check(lane)

    def capture(self, program: GpuProgram, stream: int) -> tuple[Lane, int]:
        """Put a program on a stream of somebody else; its end counts up the word of the lane, from the number returned.

        Raises:
            BackendUnavailable, ConfigError: there are too many, or CUDA does not take it.
            TransferTimeout: its table does not come to the GPU.
        """
        wait_until(lambda: self._has_arrived(program), _WARM_SECONDS, self.device)  # what is captured waits for nothing
        with self._lock:
            lane = self._make_lane(stream)
            before = lane.reached
            try:
                program.start.put(lane, 0)
            except RaynixlError:
                self._give_back(lane)
                raise
        return lane, before

    def _has_arrived(self, program: GpuProgram) -> bool:
        with self._lock:
            return all(one.is_there() for one in program.start.arrivals)

    def release(self, lane: Lane) -> None:
        """Take back the word of a captured program."""
        with self._lock:
            self._give_back(lane)

    def watch(self, job: GpuJob) -> None:
        """See to a job's end, whoever else does."""
        with self._lock:
            job.lane.add(job)
        self._watch.wake()

    def hurry(self) -> None:
        """Look more often for a while: somebody sleeps until a job has ended."""
        self._watch.hurry()

    def collect(self, lane: Lane) -> None:
        """Finish the jobs of a lane that have ended."""
        if not lane.has_ended:
            return
        with self._lock:
            armed = lane.finish()
        ring(armed)

    def check(self, lane: Lane) -> None:
        """Finish the jobs of a lane that come to no end by themselves: nothing touches their memory any more."""
        failure = self._failure(lane)
        if failure is None:
            return
        with self._lock:
            if failure is _NO_END:  # nothing is put on it meanwhile
                failure = self._failure(lane)
            armed = lane.finish()
            failed = len(lane.pending) if failure else 0
            if failure:
                armed += lane.fail(-errno.EIO)
            if failure is _NO_END:
                lane.sequence = lane.reached
        if failed:
            logger.error("%d transfers on GPU %d failed: %s", failed, self.device, failure)
        ring(armed)

    def _failure(self, lane: Lane) -> RaynixlError | None:
        """Say why what is on a lane comes to no end; None while the GPU works, or has nothing to do there.

        CUDA says that work has failed whatever it is asked: the context is lost then, and nothing runs there.
        """
        try:
            with cuda.on(self.device):
                is_through = cuda.stream_query(lane.stream)
        except RaynixlError as exc:
            return exc
        return _NO_END if is_through and not lane.is_idle else None

    def order(self, lane: Lane, sequence: int, stream: int, device: int) -> None:
        """Have a stream of a GPU wait for what has this number on a lane.

        Raises:
            ConfigError: no stream of this process.
        """
        if lane.reached < sequence:
            with self._lock, cuda.on(self.device):
                lane.order(stream, device)

    def launcher(
        self, name: str, grid: int, threads: int, values: Sequence[int], *, copies: Rows = _NO_ROWS
    ) -> Launcher:
        """Pack a kernel of this GPU, which ends as lanes want it; `copies` by copy engine go before."""
        packed, rows = np.array(values, np.uint64), np.ascontiguousarray(copies)
        return self.core.Launcher(
            self._calls, self.context, self.kernels.functions[name], (grid, threads), packed, rows
        )

    def close(self) -> None:
        """Give everything back once nothing is in flight; idempotent. Programs must not be run afterwards."""
        if self._is_closed:
            return
        deadline = time.monotonic() + _CLOSE_SECONDS
        lanes = [*self._lanes, *self._waiting]
        while not all(lane.is_idle for lane in lanes) and time.monotonic() < deadline:
            time.sleep(_CLOSE_PAUSE)
        self._is_closed = True
        self._watch.close(_CLOSE_SECONDS)
        for lane in lanes:
            self.collect(lane)
        if not all(lane.is_idle for lane in lanes):
            logger.error("GPU %d does not end its transfers: its memory stays", self.device)
            return
        with cuda.on(self.device):
            for lane in lanes:
                lane.close()
            self.transit.close()
            self._words.close()
            self._counters.close()
            self.tables.close()
            self.pinned.close()
            cuda.module_unload(self.kernels.module)

    def _in_context(self, function: Callable[[int], Any]) -> Callable[[int], Any]:
        def inside(value: int) -> Any:
            with cuda.on(self.device):
                return function(value)

        return inside

    def _make_lane(self, stream: int) -> Lane:
        if not self._marks:
            raise BackendUnavailable("too many transfers are captured in CUDA graphs", hint="close() those not needed")
        mark = self._marks.pop()
        word, flag = self._words.address + mark * WORD_NBYTES, self._flags + mark * WORD_NBYTES
        return Lane(stream, word, flag, self._counters.address + mark * _COUNTER_NBYTES)

    def _give_back(self, lane: Lane) -> None:
        self._marks.append((lane.address - self._words.address) // WORD_NBYTES)

    def _free_lane(self) -> Lane:
        """Return a lane with nothing on it, or that which has the least; the lock is held."""
        lane = self._choose(self._lanes, _LANES)
        return lane if lane.load < FULL or lane.is_idle else self._choose(self._lanes, _FULL_LANES)

    def _lane_to_wait(self, event: cuda.Event) -> Lane:
        """Return a lane that waits for an event. Others are not held up: an event may be long in coming."""
        lane = self._choose(self._waiting, _WAITING_LANES)
        with cuda.on(self.device):
            cuda.stream_wait_event(lane.stream, event.handle)
        return lane

    def _choose(self, lanes: list[Lane], most: int) -> Lane:
        for lane in lanes:
            if lane.is_idle:
                return lane
        if len(lanes) < most and (self._marks or not lanes):
            with cuda.on(self.device):
                lanes.append(self._make_lane(cuda.stream_create(is_urgent=True)))
            return lanes[-1]
        return min(lanes, key=lambda lane: lane.load)

    def _start(self, cut: Cut) -> Start:
        """Return what puts such a list on a lane."""
        if cut.way is Way.ENGINE:
            return Start(self.launcher("raynixl_signal", 1, 32, [], copies=cut.rows), entries=1 + len(cut.rows))
        held: Arrival | None = None
        if cut.way in (Way.SMALL, Way.RANGE):
            values = cut.rows[0].tolist() if len(cut.rows) else [0, 0, 0]
            if cut.way is Way.RANGE:
                values.append(cut.tile_nbytes)
        else:
            held = self.transit.upload(cut.rows)
            values = [held.piece.address, len(cut.rows)]
        launcher = self.launcher(f"raynixl_copy_{cut.way.name.lower()}", cut.grid, cut.threads, values)
        return Start(launcher, held, (held,) if held else ())

    def _warm_up(self) -> None:
        """Run every kernel once: CUDA loads code at first use, which a busy GPU or a capture would be in the way of."""
        dummy = self.tables.take(1)
        where, lane = dummy.address, self._lanes[0]
        copies = {"small": [0, 0, 0], "range": [0, 0, 0, 4096], "tiles": [where, 0], "narrow": [where, 0]}
        launchers = [self.launcher(f"raynixl_copy_{name}", 1, 256, values) for name, values in copies.items()]
        launchers.append(self.launcher("raynixl_digest", 1, 256, [where, 0, 0, 4096, where, where, 0, 0, 0]))
        launchers.append(self.launcher("raynixl_signal", 1, 32, []))
        for launcher in launchers:
            Start(launcher).put(lane, lane.take_number())
        values = [c_uint64(value) for value in (where, where + 1024, where + 2048, 1, 1)]
        with cuda.on(self.device):
            for kind in ("float32", "bfloat16", "float16"):
                function = self.kernels.functions[f"raynixl_quantise_{kind}"]
                cuda.launch(function, (1, 1, 1), (256, 1, 1), values, lane.stream)
            event = cuda.event_create()
            cuda.event_record(event, lane.stream)
            wait_until(lambda: cuda.event_query(event), _WARM_SECONDS, self.device)
            cuda.event_destroy(event)
        if not lane.is_idle:
            raise BackendUnavailable(f"kernels on GPU {self.device} do not reach the host's memory")

    def _all_lanes(self) -> list[Lane]:
        return [*self._lanes, *self._waiting]

    def _look(self) -> bool:
        """Look at all jobs; return whether some are left."""
        lanes = [lane for lane in self._all_lanes() if lane.pending]
        for lane in lanes:
            self.check(lane)
            self.collect(lane)
            for job in list(lane.pending):
                job.look()
        return any(lane.pending for lane in lanes)

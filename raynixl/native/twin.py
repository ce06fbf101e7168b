"""The copy engine in Python threads and ctypes: same interface and meaning as the compiled core, slower."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.conditions import Condition
from raynixl.native import syscalls
from raynixl.native.codes import CANCELLED, CLOSED, COPY, DONE, TIMEOUT, VM_READ, VM_WRITE
from raynixl.native.syscalls import copy, look_for, mapped
from raynixl.native.twin_cuda import Launcher, enter_cuda
from raynixl.native.twin_delta import delta_apply, delta_encode
from raynixl.native.twin_digest import digest_copy, digest_rows
from raynixl.native.twin_job import Gate, Job, deadline_after, fork_generation, leave_gates
from raynixl.native.twin_moe import post_line, put_fields, put_rows, ring, route, take_ids, wait_lines
from raynixl.native.twin_moe_send import Way, send_rows
from raynixl.native.twin_moe_sums import REDUCE_VARIANTS, reduce_rows
from raynixl.native.twin_rma import rma
from raynixl.native.twin_ucx import Rail

__all__ = [
    "NAME",
    "Engine",
    "Gate",
    "Job",
    "Launcher",
    "Program",
    "REDUCE_VARIANTS",
    "Rail",
    "Way",
    "copy",
    "delta_apply",
    "delta_encode",
    "digest_copy",
    "digest_rows",
    "enter_cuda",
    "look_for",
    "mapped",
    "post_line",
    "put_fields",
    "put_rows",
    "reduce_rows",
    "ring",
    "rma",
    "route",
    "send_rows",
    "take_ids",
    "wait_lines",
]

NAME = "ctypes"

_BYTES_PER_THREAD = 2 << 20  # less than this is copied before another thread has woken
_KEEP_GIL = 16 << 10
_COPY_PIECE = 1 << 20
_VM_PIECE = 4 << 20
_EXIT_TIMEOUT = 2.0

Segments = npt.NDArray[np.uint64]


class Program:
    """A list of segments cut into pieces once and run many times."""

    def __init__(self, engine: Engine, mode: int, pid: int, segments: Segments, gates: Sequence[Gate]) -> None:
        self._engine = engine
        self._mode = mode
        self._pid = pid
        self._gates = tuple(gates)
        self.count = len(segments)
        self.nbytes = int(segments[:, 2].sum())
        self._table, bounds = _cut(segments, _COPY_PIECE if mode == COPY else _VM_PIECE)
        self._bounds = bounds
        self.pieces = len(bounds) - 1
        self._sizes = np.add.reduceat(self._table[:, 2], bounds[:-1]).tolist()
        self._single = tuple(self._table[0].tolist()) if len(self._table) == 1 and mode == COPY else None

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """Enter all gates, then copy here if it is small, else hand a job to the engine's threads."""
        if self.nbytes > self._engine.inline_nbytes or out_of_line:
            return self._post(timeout, None)
        if not self._engine.usable():
            return CLOSED
        entered: list[Gate] = []
        try:
            return self._enter(entered) or self._copy_here(timeout)
        finally:
            try:
                leave_gates(entered)
            except BaseException:  # Ctrl-C here
                leave_gates(entered)
                raise

    def run_digesting(self, timeout: float, shift: int, seed: int) -> int | Job:
        """Run as a job that digests what it copies, at the position (address it goes to + shift) modulo 2^64."""
        return self._post(timeout, (shift, seed) if self._mode == COPY else None)

    def digest(self, piece: int, shift: int, seed: int) -> tuple[int, int]:
        """Return the digest of a piece, as it has landed."""
        rows = self._table[self._bounds[piece] : self._bounds[piece + 1]]
        zeros = np.zeros(len(rows), np.uint64)
        sums = np.zeros((1, 2), np.uint64)
        digest_rows(np.stack([rows[:, 1], rows[:, 2], rows[:, 1] + np.uint64(shift), zeros], axis=1), sums, seed)
        first, second = sums[0].tolist()
        return first, second

    def closed(self) -> int:
        """Return the code of the first gate whose closing stops those inside, else 0."""
        return next((gate.aborted for gate in self._gates if gate.aborted), 0)

    def piece_nbytes(self, piece: int) -> int:
        """Bytes of one piece."""
        return int(self._sizes[piece])

    def copy(self, piece: int) -> int:
        """Copy one piece; return 0 or -errno."""
        rows = self._table[self._bounds[piece] : self._bounds[piece + 1]]
        if self._mode == COPY:
            return syscalls.copy_rows(rows)
        return syscalls.move_rows(rows, self._pid, write=self._mode == VM_WRITE)

    def _enter(self, entered: list[Gate]) -> int:
        """Enter all gates; return 0, or the code of the one that refuses."""
        for gate in self._gates:
            if refused := gate.enter(entered):
                return refused
        return 0

    def _post(self, timeout: float, digest: tuple[int, int] | None) -> int | Job:
        """Enter all gates and have the engine's threads copy; the code if that is refused."""
        if not self._engine.usable():
            return CLOSED
        entered: list[Gate] = []
        job = Job(self._engine, self, entered, deadline_after(timeout), digest)
        try:
            refused = self._enter(entered) or self._engine.post(job, self.nbytes)
            if refused:
                job.cancel(refused)  # which leaves what was entered
        except BaseException:  # Ctrl-C: perhaps nobody has heard of the job
            job.cancel(CANCELLED)
            raise
        return refused or job

    def _copy_here(self, timeout: float) -> int:
        if self._single is not None and self.nbytes <= _KEEP_GIL:
            source, destination, nbytes = self._single
            syscalls.copy_small(destination, source, nbytes)
            return DONE
        deadline = deadline_after(timeout)
        for piece in range(self.pieces):
            if piece > 0 and time.monotonic() >= deadline:
                return TIMEOUT
            if piece > 0 and (closed := self.closed()):
                return closed
            if error := self.copy(piece):
                return error
        return DONE


def _cut(segments: Segments, limit: int) -> tuple[Segments, list[int]]:
    """Split rows larger than `limit`, and return the new rows with the bounds of the pieces."""
    lengths = segments[:, 2]
    parts = ((lengths - np.uint64(1)) // np.uint64(limit) + np.uint64(1)).astype(np.int64)
    if int(parts.max()) > 1:
        row = np.repeat(np.arange(len(segments)), parts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
        offset = nth.astype(np.uint64) * np.uint64(limit)
        table = segments[row]
        table[:, :2] += offset[:, None]
        table[:, 2] = np.minimum(table[:, 2] - offset, np.uint64(limit))
    else:
        table = segments
    group = (np.cumsum(table[:, 2]) - np.uint64(1)) // np.uint64(limit)
    starts = np.flatnonzero(np.diff(group)) + 1
    return np.ascontiguousarray(table), [0, *starts.tolist(), len(table)]


def _check(mode: int, segments: Segments, gates: Sequence[Gate]) -> None:
    if mode not in (COPY, VM_READ, VM_WRITE):
        raise ValueError("unknown mode")
    shaped = isinstance(segments, np.ndarray) and segments.ndim == 2 and segments.shape[1] == 3
    if not (shaped and segments.dtype == np.uint64 and segments.flags.c_contiguous):
        raise TypeError("segments must be a C-contiguous (N, 3) array of uint64")
    if not all(isinstance(gate, Gate) for gate in gates):
        raise TypeError("gates must be gates of this core")
    if len(segments) == 0:
        raise ValueError("a program needs at least one segment")
    lengths = segments[:, 2]
    if not lengths.all():
        raise ValueError("a segment of 0 bytes")
    ends = segments[:, :2] + lengths[:, None]
    if (ends < segments[:, :2]).any() or lengths.sum(dtype=np.float64) >= 2.0**64:
        raise ValueError("a segment reaches past the end of memory")


class Engine:
    """A few daemon threads that copy; asleep while there is nothing to do."""

    def __init__(self, threads: int, inline_nbytes: int = 1 << 20) -> None:
        if threads < 1:
            raise ValueError("an engine needs at least one thread")
        if inline_nbytes < 0:
            raise ValueError("inline_nbytes is negative")
        self.threads = threads
        self.inline_nbytes = inline_nbytes
        self._forks = fork_generation()
        self._changed = Condition()  # protects all below; held for list operations only
        self._jobs: dict[Job, None] = {}  # pending ones, oldest first
        self._crew: list[threading.Thread] = []
        self._idle = 0
        self._unsettled: set[Job] = set()
        self._next_deadline = math.inf
        self._closing = False
        # The threads must not touch memory that the interpreter frees when it goes.
        atexit.register(self.close, _EXIT_TIMEOUT)

    def usable(self) -> bool:
        """Whether it has not been closed, and this is the process that made it."""
        return not self._closing and self._forks == fork_generation()

    def program(self, mode: int, pid: int, segments: Segments, gates: Sequence[Any]) -> Program:
        """Compile rows of (source address, destination address, nbytes), which are copied."""
        _check(mode, segments, gates)
        return Program(self, mode, pid, segments.copy(), gates)

    def post(self, job: Job, nbytes: int) -> int:
        """Queue a job whose gates have been entered, and wake the threads it needs; return 0, or CLOSED."""
        wanted = min(self.threads, (nbytes - 1) // _BYTES_PER_THREAD + 1)
        job.participants = wanted
        with self._changed:
            if self._closing:
                return CLOSED
            self._unsettled.add(job)
            self._jobs[job] = None
            self._next_deadline = min(self._next_deadline, job.deadline)
            self._start_threads(min(wanted - self._idle, self.threads - len(self._crew)))
            self._changed.notify(wanted)
            return 0

    def close(self, timeout: float) -> bool:
        """End all jobs with CLOSED and join the threads."""
        if self._forks != fork_generation():
            return True
        deadline = deadline_after(timeout)
        with self._changed:
            self._closing = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        for job in jobs:
            job.cancel(CLOSED)
        with self._changed:
            settled = self._changed.wait_for(lambda: not self._unsettled, max(0.0, deadline - time.monotonic()))
        for thread in [one for one in self._crew if one.is_alive()]:
            thread.join(max(0.0, deadline - time.monotonic()))
        ended = settled and not any(thread.is_alive() for thread in self._crew)
        if ended:
            atexit.unregister(self.close)
        return ended

    def wake(self) -> None:
        """Hear that a place has become free while pieces remain."""
        with self._changed:
            self._changed.notify()

    def retire(self, job: Job) -> None:
        """Hear that a job has ended."""
        with self._changed:
            self._jobs.pop(job, None)

    def settled(self, job: Job) -> None:
        """Hear that nobody copies for a job any more."""
        with self._changed:
            self._unsettled.discard(job)
            if self._closing:
                self._changed.notify_all()

    def expire(self, now: float) -> None:
        """End the jobs whose deadline has passed."""
        if now < self._next_deadline:
            return
        with self._changed:
            late = [job for job in self._jobs if job.deadline <= now]
            self._next_deadline = min((job.deadline for job in self._jobs if job.deadline > now), default=math.inf)
        for job in late:
            job.cancel(TIMEOUT)

    def _start_threads(self, wanted: int) -> None:
        for _ in range(wanted):
            thread = threading.Thread(target=self._serve, name="raynixl-copy", daemon=True)
            self._crew.append(thread)
            thread.start()

    def _serve(self) -> None:
        while (job := self._next_job()) is not None:
            job.participate(math.inf)
            del job

    def _next_job(self) -> Job | None:
        with self._changed:
            while not self._closing:
                job = next((job for job in self._jobs if job.has_place()), None)
                if job is not None:
                    return job
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
        return None

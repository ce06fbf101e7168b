"""Staging: host memory that no GPU reaches goes through pinned buffers, one being copied while the other is moved."""

from __future__ import annotations

import errno
import logging
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.base import Local, Op, Request
from raynixl.backends.nvlink_job import StagedJob
from raynixl.backends.nvlink_mover import mover
from raynixl.errors import AgentClosed
from raynixl.memory import MemoryKind, address_of
from raynixl.native import CANCELLED, COPY, DONE, PENDING, Gate, Job, Program

logger = logging.getLogger(__name__)

PIECE_NBYTES = 8 << 20
"""What is staged at once: two such buffers make a GPU's link busy, and a piece is copied in about a millisecond."""
_WORKERS = 2
_HOST = 2  # the host's place among what is under way
SETTLE_SECONDS = 30.0

Rows = npt.NDArray[np.uint64]


class Hung(Exception):
    """What uses a buffer goes on for longer than can be waited for."""


class Bounce:
    """Two pinned buffers of one piece each."""

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, 2 * PIECE_NBYTES)
        address = address_of(self._mapping)
        self._pin = cuda.pin(address, 2 * PIECE_NBYTES)
        self.host = (address, address + PIECE_NBYTES)
        self.device = (self._pin.device_address, self._pin.device_address + PIECE_NBYTES)

    def close(self) -> None:
        """Give the memory back; nothing uses it any more."""
        self._pin.close()
        self._mapping.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one piece: the row that each is of, its offset inside a buffer, source, destination, length."""

    row: Rows
    offset: Rows
    source: Rows
    target: Rows
    nbytes: Rows

    @property
    def total(self) -> int:
        """Bytes of the piece."""
        return int(self.nbytes.sum())


def cut(table: Rows, piece_nbytes: int = PIECE_NBYTES) -> list[Piece]:
    """Cut rows of (source, destination, nbytes) into pieces that fill a buffer each, the last one excepted."""
    ends = np.cumsum(table[:, 2], dtype=np.uint64)
    starts = ends - table[:, 2]
    bounds = np.arange(0, int(ends[-1]), piece_nbytes, dtype=np.uint64)
    cuts = np.union1d(starts, bounds)
    row = np.searchsorted(ends, cuts, side="right")
    inside = cuts - starts[row]
    nbytes = np.diff(np.append(cuts, ends[-1]))
    columns = (
        row.astype(np.uint64),
        cuts % np.uint64(piece_nbytes),
        table[row, 0] + inside,
        table[row, 1] + inside,
        nbytes,
    )
    edges = [*np.searchsorted(cuts, bounds).tolist(), len(cuts)]
    return [Piece(*(column[start:end] for column in columns)) for start, end in pairwise(edges)]


class Staging:
    """The threads and buffers that stage for one agent; there are none before the first transfer that needs them."""

    def __init__(self, local: Local, make: Callable[[], Bounce] = Bounce) -> None:
        self.local = local
        self._make = make
        self._lock = threading.Lock()  # protects all below
        self._pool: ThreadPoolExecutor | None = None
        self._idle: list[Bounce] = []
        self._jobs: set[StagedJob] = set()
        self._is_closed = False

    def program(self, device: int, request: Request, table: Rows) -> StagedProgram:
        """Compile rows of (source, destination, nbytes) between host memory of this process and a GPU."""
        is_ours = any(region.kind is MemoryKind.DRAM for region in request.local)  # no request has it on both sides
        is_upload = is_ours == (request.op is Op.WRITE)
        return StagedProgram(self, device, table, request.gates, is_upload=is_upload)

    def start(self, job: StagedJob, work: Callable[[StagedJob, Bounce], int], leave: Callable[[], None]) -> None:
        """Have a thread do a job's work, and leave its gates afterwards.

        Raises:
            AgentClosed: the backend is closed.
            RuntimeError: the process has no more threads.
        """
        with self._lock:
            if self._is_closed:
                raise AgentClosed("the agent is closing")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="raynixl-stage")
            self._jobs.add(job)
            try:
                self._pool.submit(self._work, job, work, leave)
            except RuntimeError:  # the process may have no more threads; it stays in the pool's queue all the same
                self._jobs.discard(job)
                job.is_refused = True
                raise

    def close(self, timeout: float) -> None:
        """End what is staged and let go of the buffers; nothing is staged afterwards."""
        with self._lock:
            self._is_closed = True
            jobs, pool = list(self._jobs), self._pool
        for job in jobs:
            job.cancel(CANCELLED)
        deadline = time.monotonic() + timeout
        for job in jobs:
            job.wait_settled(max(0.001, deadline - time.monotonic()))
        if pool is not None:
            pool.shutdown(wait=not self._jobs)
        with self._lock:
            idle, self._idle = self._idle, []
        for bounce in idle:
            bounce.close()

    def _work(self, job: StagedJob, work: Callable[[StagedJob, Bounce], int], leave: Callable[[], None]) -> None:
        if job.is_refused:
            return
        code, bounce = job.code, None
        try:
            if code == PENDING:
                bounce = self._take()
                code = work(job, bounce)
        except Hung:
            logger.exception("a GPU does not end a copy: what it may still touch is never given back")
            job.end(-errno.EIO)
            return
        except Exception:  # thread edge: whoever waits gets the code, and we say what it was
            logger.exception("staging failed")
            code = -errno.EIO
        finally:
            with self._lock:
                self._jobs.discard(job)
        if bounce is not None:
            with self._lock:
                self._idle.append(bounce)
        leave()  # before anyone can see the end: who sees it may take the memory back
        job.end(code)
        job.settle()

    def _take(self) -> Bounce:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._make()


class StagedProgram:
    """Rows between host memory and a GPU, moved piece by piece, inside the gates from the start to the end."""

    def __init__(self, staging: Staging, device: int, table: Rows, gates: Sequence[Gate], *, is_upload: bool) -> None:
        self.staging = staging
        self.device = device
        self.gates = gates
        self.is_upload = is_upload
        self.count = len(table)
        self._cuts = cut(table)
        self.nbytes = int(table[:, 2].sum())
        self._programs: dict[tuple[int, int], tuple[Program, Program]] = {}  # by piece and buffer

    def run(self, timeout: float, out_of_line: bool = False) -> int | Job:
        """Start; see `Program.run`."""
        inside: list[Gate] = []
        for gate in self.gates:
            if code := gate.enter():
                _leave(inside)
                return code
            inside.append(gate)
        job = StagedJob(timeout)
        try:
            self.staging.start(job, self._move, lambda: _leave(inside))
        except RuntimeError:
            _leave(inside)
            return -errno.EAGAIN
        except BaseException:
            _leave(inside)
            raise
        return job

    def aborted(self) -> int:
        """Return the code of the first gate whose closing stops those inside, 0 if there is none."""
        return next((code for gate in self.gates if (code := gate.aborted)), 0)

    def _move(self, job: StagedJob, bounce: Bounce) -> int:
        """Move all pieces through the buffers; return the code of the first that failed."""
        moved: list[Job | int] = [DONE, DONE, DONE]  # what a GPU does with each buffer, and the host with one of them
        code = DONE
        step = self._upload if self.is_upload else self._download
        try:
            code = step(job, bounce, moved)
        finally:
            for one in moved:
                if not isinstance(one, int):
                    if code != DONE:
                        one.cancel(CANCELLED)
                    if not one.wait_settled(SETTLE_SECONDS):
                        raise Hung(f"not within {SETTLE_SECONDS:g} s")
        return code

    def _upload(self, job: StagedJob, bounce: Bounce, moved: list[Job | int]) -> int:
        for number, piece in enumerate(self._cuts):
            host, gpu = self._compiled(number, bounce)
            if code := _end_of(moved[number % 2], job) or self.aborted():
                return code
            moved[_HOST] = host.run(job.left)
            if code := _end_of(moved[_HOST], job):
                return code
            moved[number % 2] = gpu.run(job.left)
            job.count(piece.total)
        return _end_of(moved[0], job) or _end_of(moved[1], job)

    def _download(self, job: StagedJob, bounce: Bounce, moved: list[Job | int]) -> int:
        for number in range(len(self._cuts) + 1):
            if number < len(self._cuts):
                moved[number % 2] = self._compiled(number, bounce)[1].run(job.left)
            if number:
                if code := _end_of(moved[(number - 1) % 2], job) or self.aborted():
                    return code
                moved[_HOST] = self._compiled(number - 1, bounce)[0].run(job.left)
                if code := _end_of(moved[_HOST], job):
                    return code
                job.count(self._cuts[number - 1].total)
        return DONE

    def _compiled(self, number: int, bounce: Bounce) -> tuple[Program, Program]:
        """Return the programs that copy a piece in the host and that move it to or from the GPU."""
        host, device = bounce.host[number % 2], bounce.device[number % 2]
        programs = self._programs.get((number, host))
        if programs is None:
            piece = self._cuts[number]
            first, second = (host, device) if self.is_upload else (device, host)
            into = np.stack([piece.source, piece.offset + np.uint64(first), piece.nbytes], axis=1)
            out = np.stack([piece.offset + np.uint64(second), piece.target, piece.nbytes], axis=1)
            in_host, in_gpu = (into, out) if self.is_upload else (out, into)
            programs = (
                self._in_host(np.ascontiguousarray(in_host), piece, bounce),
                mover(self.device).program(np.ascontiguousarray(in_gpu), [], touches_host=True),
            )
            self._programs[(number, host)] = programs
        return programs

    def _in_host(self, rows: Rows, piece: Piece, bounce: Bounce) -> Program:
        """Compile what is between a buffer and the memory that no GPU reaches: (source, destination, nbytes)."""
        return self.staging.local.engine.program(COPY, 0, rows, [])


def _leave(gates: Sequence[Gate]) -> None:
    for gate in gates:
        gate.leave()


def _end_of(result: Job | int, job: StagedJob) -> int:
    """Wait for one part of a job; return its code, or why the job has ended meanwhile."""
    if isinstance(result, int):
        return result
    while not result.wait(min(0.1, job.left)):
        if job.code != PENDING:
            return job.code
    return result.code

"""Baselines that copy in this process: plain memcpy, and a bare loop of process_vm calls, both by ctypes.

Each moves exactly the bytes that ours moves, between the same memory, with as many threads.

memcpy: one range at each side is one libc memcpy (for each thread). Scattered blocks are one C loop of block
copies (numpy.take) in the destination's order, which is kinder to it than the list's own order is to ours. A peer's
arena is mapped here by its descriptor, so it is the very same memory; plain memory of a peer cannot be reached by
memcpy, so a plain copy of the same size here stands in for it.

process_vm: process_vm_readv or writev with at most 1,024 iovecs a call, all iovecs built beforehand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from raynixl.bench.layout import Bytes, Layout
from raynixl.errors import PeerLost, RaynixlError

_MAX_IOVECS = 1024
Task = Callable[[], object]


@dataclass(frozen=True, slots=True)
class ThreadTeam:
    """A few threads that do their shares of one job together; the caller does the first."""

    pool: ThreadPoolExecutor
    threads: int

    @staticmethod
    def start(threads: int) -> ThreadTeam:
        """Start the threads."""
        return ThreadTeam(ThreadPoolExecutor(max(1, threads - 1)), threads)

    def close(self) -> None:
        """Join the threads."""
        self.pool.shutdown()

    def run(self, tasks: Sequence[Task]) -> None:
        """Do all tasks at the same time."""
        if len(tasks) == 1:
            tasks[0]()
            return
        others = [self.pool.submit(task) for task in tasks[1:]]
        tasks[0]()
        for other in others:
            other.result(120.0)


class TaskRunner:
    """Runs tasks on a team, or one after another where that is faster for jobs so small."""

    def __init__(self, impl: str, team: ThreadTeam, tasks: Sequence[Task], alone: Sequence[Task]) -> None:
        self.impl = impl
        self.prepare_seconds = 0.0
        self.memory: tuple[Bytes, ...] = ()  # kept alive: the tasks hold bare addresses into it
        self._run: Task = lambda: team.run(tasks)
        if team.threads == 1 or _best(lambda: _all(alone)) < _best(self._run):
            self._run = alone[0] if len(alone) == 1 else lambda: _all(alone)

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each."""
        run, times = self._run, []
        for _ in range(count):
            start = perf_counter_ns()
            run()
            times.append(perf_counter_ns() - start)
        return times


def _all(tasks: Sequence[Task]) -> None:
    for task in tasks:
        task()


def _best(run: Task) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _cuts(total: int, parts: int, grain: int) -> list[tuple[int, int]]:
    """Cut [0, total) into at most `parts` pieces at multiples of `grain`."""
    step = max(grain, -(-total // parts // grain) * grain)
    return [(start, min(total, start + step)) for start in range(0, total, step)]


def memcpy(layout: Layout, source: Bytes, target: Bytes, team: ThreadTeam) -> TaskRunner:
    """Return the baseline that copies with plain memcpy inside this process."""
    start = time.perf_counter()
    make = _range_tasks if layout.is_contiguous else _take_tasks
    tasks, alone = make(layout, source, target, team.threads), make(layout, source, target, 1)
    seconds = (time.perf_counter() - start) / 2
    runner = TaskRunner("memcpy", team, tasks, alone)
    runner.prepare_seconds, runner.memory = seconds, (source, target)
    return runner


def _range_tasks(layout: Layout, source: Bytes, target: Bytes, threads: int) -> list[Task]:
    libc = ctypes.CDLL(None)
    copy = libc.memcpy
    copy.argtypes, copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    to, source_at = target.ctypes.data, source.ctypes.data

    def task(start: int, stop: int) -> Task:
        return lambda: copy(to + start, source_at + start, stop - start)

    return [task(start, stop) for start, stop in _cuts(layout.nbytes, threads, 4096)]


def _take_tasks(layout: Layout, source: Bytes, target: Bytes, threads: int) -> list[Task]:
    rows = source.reshape(layout.blocks, layout.block_nbytes)
    into = target.reshape(layout.blocks, layout.block_nbytes)
    order = layout.source_of_place

    def task(start: int, stop: int) -> Task:
        ids, out = order[start:stop], into[start:stop]
        return lambda: np.take(rows, ids, axis=0, out=out, mode="clip")

    return [task(start, stop) for start, stop in _cuts(layout.blocks, threads, 1)]


@dataclass(frozen=True, slots=True)
class Foreign:
    """Memory of another process: whose, and where."""

    pid: int
    address: int


def process_vm(layout: Layout, ours: Bytes, theirs: Foreign, *, is_write: bool, team: ThreadTeam) -> TaskRunner:
    """Return the baseline that moves the bytes with bare process_vm calls."""
    start = time.perf_counter()
    source, target = layout.source_ids, layout.target_ids
    local, remote = (
        _iovecs(layout, ours.ctypes.data, source if is_write else target),
        _iovecs(layout, theirs.address, target if is_write else source),
    )
    seconds = time.perf_counter() - start
    if layout.is_contiguous:
        local, remote = _merged(local, layout), _merged(remote, layout)

    def make(threads: int) -> list[Task]:
        if len(local) > 1:
            cuts = _cuts(len(local), threads, 1)
            pieces = [(local[a:b], remote[a:b]) for a, b in cuts]
        else:
            pieces = [(_part(local, a, b), _part(remote, a, b)) for a, b in _cuts(layout.nbytes, threads, 4096)]
        return [_vm_task(theirs.pid, *piece, is_write=is_write) for piece in pieces]

    runner = TaskRunner("process_vm", team, make(team.threads), make(1))
    runner.prepare_seconds, runner.memory = seconds, (ours,)
    return runner


def _iovecs(layout: Layout, base: int, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return (address, length) rows."""
    rows = np.empty((layout.blocks, 2), np.uint64)
    rows[:, 0] = ids * layout.block_nbytes + base
    rows[:, 1] = layout.block_nbytes
    return rows


def _merged(rows: NDArray[np.uint64], layout: Layout) -> NDArray[np.uint64]:
    return np.array([[rows[0, 0], layout.nbytes]], np.uint64)


def _part(row: NDArray[np.uint64], start: int, stop: int) -> NDArray[np.uint64]:
    return np.array([[int(row[0, 0]) + start, stop - start]], np.uint64)


def _vm_task(pid: int, local: NDArray[np.uint64], remote: NDArray[np.uint64], *, is_write: bool) -> Task:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_writev if is_write else libc.process_vm_readv
    iovecs = (ctypes.c_void_p, ctypes.c_ulong)
    call.argtypes, call.restype = (ctypes.c_int, *iovecs, *iovecs, ctypes.c_ulong), ctypes.c_ssize_t
    calls = []
    for start in range(0, len(local), _MAX_IOVECS):
        count = min(_MAX_IOVECS, len(local) - start)
        nbytes = int(local[start : start + count, 1].sum())
        at = start * local.strides[0]
        calls.append(((pid, local.ctypes.data + at, count, remote.ctypes.data + at, count, 0), nbytes))

    def run(_kept: object = (local, remote)) -> None:  # the calls hold bare addresses into these
        for arguments, nbytes in calls:
            moved = call(*arguments)
            if moved != nbytes:
                raise _vm_error(pid, moved, ctypes.get_errno())

    return run


def _vm_error(pid: int, moved: int, number: int) -> RaynixlError:
    if moved >= 0:
        return RaynixlError(f"process_vm moved only {moved} bytes", hint="use smaller sizes: a call moves up to 2 GiB")
    if number == errno.ESRCH:
        return PeerLost(f"the target process {pid} is gone", hint="run the command again", peer="target")
    return RaynixlError(f"process_vm failed: {os.strerror(number)}", hint="see `raynixl doctor`")

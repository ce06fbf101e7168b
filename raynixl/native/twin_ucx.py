"""Rails and mappings of the ctypes twin: a worker of UCX, who looks after it, and the memory it may reach.

No Python code runs inside UCX but the handler of endpoint errors: a completion only puts its request into a queue, by
a function of CPython that runs no bytecode, so that neither an exception nor a signal can come between. What it means
is found out by a thread of the rail, which exists while there is work. Hence locks may be held over calls of UCX.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import queue
import threading
import time
from typing import Final, Protocol

from raynixl.native import twin_ucp as ucp
from raynixl.native.codes import CLOSED, PENDING
from raynixl.native.twin_cuda import take_cuda_context
from raynixl.native.twin_endpoint import Endpoint
from raynixl.native.twin_job import deadline_after, fork_generation

__all__ = ["Mapping", "Rail", "RmaWork"]

_IDLE_SWEEPS = 20
_EXIT_TIMEOUT = 2.0
_FIRST_LOOK = 0.0002  # seconds; UCX marks a request complete after its callback: a look can come too early
_LAST_LOOK = 0.05  # for what completes without a callback: operations of an endpoint that has failed


class RmaWork(Protocol):
    """A job as its rail sees it."""

    @property
    def code(self) -> int:
        """PENDING until it has ended; looking applies the deadline."""

    @property
    def is_handed_over(self) -> bool:
        """Whether the rail's thread owns it."""

    @property
    def is_settled(self) -> bool:
        """Whether UCX has let go of the memory."""

    @property
    def ended(self) -> float:
        """When it ended."""

    def advance(self) -> None:
        """Take what has completed, and post more."""

    def apply_gates(self) -> None:
        """End it if a gate was closed with abort."""

    def reset(self) -> None:
        """Close its endpoints with RESET."""


class Rail:
    """One worker of UCX, the memory mapped for it, and the endpoints to peers made on it."""

    def __init__(self, context: int, worker: int, bell: int) -> None:
        self.ucp: Final = ucp.library()
        self.context: Final = context
        self.worker: Final = worker
        self._forks = fork_generation()
        self._bell = os.dup(bell)
        self._closed = False
        self._released = False
        self._watched = False
        self._idle_sweeps = 0
        self._tokens = itertools.count(1)
        self._completed: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        # UCX holds these two as long as there are endpoints: the exit handler keeps the rail until it is closed.
        self.on_completed: Final = ucp.SendCallback(self._completed.put)
        self.on_error: Final = ucp.ErrorCallback(self._failed)
        self._lock = threading.Lock()  # protects what follows; held for list operations only
        self._endpoints: dict[int, Endpoint] = {}  # until UCX has let go of them
        self._jobs: dict[RmaWork, None] = {}  # until they are settled
        self._thread: threading.Thread | None = None
        atexit.register(self.close, _EXIT_TIMEOUT)

    @property
    def address(self) -> bytes:
        """What a peer needs to make an endpoint to it."""
        packed, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
        status = self.ucp.worker_get_address(self.worker, ctypes.byref(packed), ctypes.byref(nbytes))
        ucp.check("UCX gives no worker address", status)
        try:
            return ctypes.string_at(packed.value or 0, nbytes.value)
        finally:
            self.ucp.worker_release_address(self.worker, packed)

    @property
    def is_usable(self) -> bool:
        """Whether it has not been closed, and this is the process that made it."""
        return not self._closed and self._forks == fork_generation()

    @property
    def is_alive(self) -> bool:
        """Whether keys and mappings can be given back."""
        return not self._released and self._forks == fork_generation()

    @property
    def is_forked(self) -> bool:
        """Whether the worker is the parent's."""
        return self._forks != fork_generation()

    def map(self, address: int, nbytes: int, memory_type: int) -> Mapping:
        """Make memory reachable."""
        self.check_usable()
        return Mapping(self, address, nbytes, memory_type)

    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint to a peer's worker; does not wait for the peer."""
        self.check_usable()
        self._reap()
        endpoint = Endpoint(self, next(self._tokens))
        endpoint.create(address)
        if not self.is_usable:  # closed meanwhile
            endpoint.close(CLOSED)
        return endpoint

    def sweep(self, grace: float) -> bool:
        """Look after the jobs that were handed over; False once there have been none for many sweeps."""
        if self.is_forked:
            return False
        with self._lock:
            jobs = list(self._jobs)
        self._reap()
        now = time.monotonic()
        for job in jobs:
            if job.code == PENDING:
                job.apply_gates()
            if job.code != PENDING and not job.is_settled and now - job.ended >= grace:
                job.reset()
        self._idle_sweeps = 0 if jobs else self._idle_sweeps + 1
        if self._idle_sweeps < _IDLE_SWEEPS:
            return True
        with self._lock:
            self._idle_sweeps = 0
            self._watched = bool(self._jobs)
            return self._watched

    def close(self, timeout: float) -> bool:
        """Run nothing more and close every endpoint; True once UCX has let go of all."""
        if self.is_forked:
            return False
        deadline = deadline_after(timeout)
        self._closed = True
        for endpoint in self._living():
            endpoint.close(CLOSED)
        while not self._reap() or self._jobs:
            if time.monotonic() >= deadline:
                return False
            if self.progress() == 0:
                time.sleep(0.0001)
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._completed.put(None)
            thread.join(max(0.0, deadline - time.monotonic()) + _EXIT_TIMEOUT)
        if self._bell >= 0:
            bell, self._bell = self._bell, -1
            os.close(bell)
        atexit.unregister(self.close)
        return True

    def serve(self) -> bool:
        """This core has no thread of its own: in Python it would serve nobody while Python is busy."""
        return False

    def release(self) -> None:
        """Touch the worker no more: it is about to be destroyed."""
        self._released = True

    def check_usable(self) -> None:
        """Raise RuntimeError if it has been closed."""
        if not self.is_usable:
            raise RuntimeError("the rail is closed")

    def progress(self) -> int:
        """Let UCX do what there is to do; how much there was."""
        take_cuda_context()
        return int(self.ucp.worker_progress(self.worker))

    def signal(self) -> None:
        """Have UCX's own thread look."""
        self.ucp.worker_signal(self.worker)

    def ring(self) -> None:
        """Ring the bell."""
        if (bell := self._bell) >= 0:
            with contextlib.suppress(BlockingIOError):  # full, hence readable already
                os.eventfd_write(bell, 1)

    def enlist(self, job: RmaWork) -> None:
        """Hear of a job that starts."""
        with self._lock:
            self._jobs[job] = None

    def adopt(self, job: RmaWork) -> None:
        """Carry on a job that its caller has left."""
        with self._lock:
            if self._thread is None and job in self._jobs:
                self._thread = threading.Thread(target=self._serve, name="raynixl-ucx", daemon=True)
                self._thread.start()
            is_first, self._watched = not self._watched, True
        self._completed.put(0)
        if is_first:
            self.ring()

    def retire(self, job: RmaWork) -> None:
        """Hear that a job has settled."""
        with self._lock:
            self._jobs.pop(job, None)

    def remember(self, token: int, endpoint: Endpoint) -> None:
        """Hear of an endpoint that UCX will know by its token."""
        with self._lock:
            self._endpoints[token] = endpoint

    def forget(self, token: int) -> None:
        """Hear that UCX has let go of an endpoint."""
        with self._lock:
            self._endpoints.pop(token, None)

    def _living(self) -> list[Endpoint]:
        with self._lock:
            return list(self._endpoints.values())

    def _reap(self) -> bool:
        """Let go of the endpoints that UCX has let go of; whether none is left."""
        return not sum(not endpoint.is_gone for endpoint in self._living())

    def _failed(self, token: int, _ep: int, status: int) -> None:
        """Hear from UCX, inside it, that an endpoint has failed."""
        if (endpoint := self._endpoints.get(token)) is not None:
            endpoint.failed(status)

    def _serve(self) -> None:
        pause = _FIRST_LOOK
        while True:
            try:
                item = self._completed.get(timeout=pause if self._jobs else None)
                pause = _FIRST_LOOK
            except queue.Empty:
                item, pause = 0, min(2 * pause, _LAST_LOOK)
            if item is None or self._drain():
                return
            with self._lock:
                jobs = [job for job in self._jobs if job.is_handed_over]
            for job in jobs:
                job.advance()

    def _drain(self) -> bool:
        """Take out what needs no look of its own; whether the thread is to end."""
        with contextlib.suppress(queue.Empty):
            while self._completed.get_nowait() is not None:
                pass
            return True
        return False


class Mapping:
    """Memory of this process that UCX may read and write, on one rail."""

    def __init__(self, rail: Rail, address: int, nbytes: int, memory_type: int) -> None:
        mask = ucp.MAP_ADDRESS | ucp.MAP_LENGTH | ucp.MAP_MEMORY_TYPE
        params = ucp.MemMapParams(mask, address, nbytes, 0, 0, memory_type)
        memh = ctypes.c_void_p()
        status = rail.ucp.mem_map(rail.context, ctypes.byref(params), ctypes.byref(memh))
        ucp.check(f"UCX does not map {nbytes} bytes", status)
        self.rail: Final = rail
        self.address: Final = address
        self.nbytes: Final = nbytes
        self.memory_type: Final = memory_type
        self.memh = memh.value

    @property
    def key(self) -> bytes:
        """What a peer needs to reach it, in UCX's own form."""
        if self.memh is None:
            raise RuntimeError("the mapping is gone")
        library = self.rail.ucp
        packed, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
        status = library.rkey_pack(self.rail.context, self.memh, ctypes.byref(packed), ctypes.byref(nbytes))
        ucp.check("UCX packs no key", status)
        try:
            return ctypes.string_at(packed.value or 0, nbytes.value)
        finally:
            library.rkey_buffer_release(packed)

    def unmap(self) -> None:
        """Let UCX forget it. Idempotent."""
        memh, self.memh = self.memh, None
        if memh is not None and self.rail.is_alive:
            self.rail.ucp.mem_unmap(self.rail.context, memh)

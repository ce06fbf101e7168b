"""UCX for tests of the core: a rail of this process, and a process to reach; run as a script it is that process."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import warm
from native_tools import address_of

from raynixl.backends.ucx_options import merge
from raynixl.backends.ucx_runtime import load_ucxx
from raynixl.host import process_state
from raynixl.native import Gate, Job, Native, Program, load
from raynixl.native.ucx import HOST_MEMORY, Endpoint, Mapping, RemoteKey

INLINE = 1 << 20
TIMEOUT = 30.0


@dataclass(frozen=True)
class Export:
    """What is to be known of memory to reach it."""

    worker: bytes
    key: bytes
    address: int
    nbytes: int


@dataclass(frozen=True)
class Way:
    """An endpoint to a peer, and the key of its memory there."""

    endpoint: Endpoint
    key: RemoteKey
    address: int


class Side:
    """A rail of this process, on a context and a worker of ucxx, with a thread that serves it."""

    def __init__(self, core: Native, tls: str) -> None:
        ucxx = load_ucxx()
        options = merge({"TLS": tls}, {}, device="", is_local=True)
        options.pop("LOG_LEVEL")  # of the whole library
        features = (ucxx.Feature.RMA, ucxx.Feature.AM, ucxx.Feature.WAKEUP)
        self._context = ucxx.UCXContext(options, feature_flags=features)
        self._worker = ucxx.UCXWorker(self._context)
        self.core = core
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.rail = core.Rail(self._context.handle, self._worker.handle, self.bell)
        self._is_served_by_ucxx = not self.rail.serve()
        if self._is_served_by_ucxx:
            self._worker.start_progress_thread(polling_mode=False, epoll_timeout=-1)
        self._arrays: list[np.ndarray] = []
        self._mappings: list[Mapping] = []
        self._keys: list[RemoteKey] = []

    def map(self, array: np.ndarray) -> Mapping:
        """Make an array reachable on the rail, and keep it."""
        self._arrays.append(array)
        self._mappings.append(self.rail.map(address_of(array), array.nbytes, HOST_MEMORY))
        return self._mappings[-1]

    def export(self, array: np.ndarray) -> Export:
        """Make an array reachable for peers."""
        return Export(self.rail.address, self.map(array).key, address_of(array), array.nbytes)

    def reach(self, export: Export) -> Way:
        """Make an endpoint to a peer, and take the key of its memory."""
        endpoint = self.rail.connect(export.worker)
        key = endpoint.unpack(export.key, export.address, export.nbytes)
        self._keys.append(key)
        return Way(endpoint, key, export.address)

    def writer(self, source: np.ndarray, way: Way, gates: Sequence[Gate] = (), repeat: int = 1) -> Program:
        """A program that writes an array to the start of the peer's memory, so many times."""
        rows = rma_rows(*[(0, address_of(source), way.address, source.nbytes)] * repeat)
        return self.core.rma(True, [(self.map(source), way.key)], rows, gates, INLINE)

    def reader(self, target: np.ndarray, way: Way, gates: Sequence[Gate] = (), repeat: int = 1) -> Program:
        """A program that reads the start of the peer's memory into an array, so many times."""
        rows = rma_rows(*[(0, address_of(target), way.address, target.nbytes)] * repeat)
        return self.core.rma(False, [(self.map(target), way.key)], rows, gates, INLINE)

    def settle(self, job: Job, timeout: float = TIMEOUT) -> bool:
        """Wait until UCX has let go of a job's memory, looking after the rail meanwhile."""
        deadline = time.monotonic() + timeout
        while not job.wait_settled(0.02):
            if time.monotonic() > deadline:
                return False
            self.rail.sweep(0.0)
        return True

    def close(self) -> None:
        """Close the rail, give back keys and mappings, and destroy the worker."""
        assert self.rail.close(10.0)
        for key in self._keys:
            key.destroy()
        for mapping in self._mappings:
            mapping.unmap()
        self.rail.release()
        if self._is_served_by_ucxx:
            self._worker.stop_progress_thread()
        os.close(self.bell)


def rma_rows(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Rows of (path, our address, the peer's address, nbytes)."""
    return np.array(rows, dtype=np.uint64).reshape(-1, 4)


def until(condition: Callable[[], Any], timeout: float = TIMEOUT) -> bool:
    """Wait until it holds; False at the timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def moving(program: Program, timeout: float = TIMEOUT) -> Job:
    """A job of which something has arrived, and not all."""
    job = program.run(timeout)
    assert not isinstance(job, int)
    assert until(lambda: job.nbytes_done > 0 or job.code != 1)
    assert job.code == 1
    return job


class Target:
    """A process whose memory is reached over UCX. We map the same file and look at the bytes directly."""

    def __init__(self, path: Path, nbytes: int, tls: str) -> None:
        with path.open("wb") as file:
            file.truncate(nbytes)
        self.tls = tls
        self.memory = _mapped(path, nbytes)
        self._child = warm.popen(
            [sys.executable, __file__, str(path), tls], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "UCX_LOG_LEVEL": "fatal"},
        )  # fmt: skip
        assert self._child.stdout is not None
        assert select.select([self._child.stdout], [], [], TIMEOUT)[0]
        said = json.loads(self._child.stdout.readline())
        key, worker = bytes.fromhex(said["key"]), bytes.fromhex(said["worker"])
        self.export = Export(worker, key, said["address"], nbytes)

    def stop(self) -> None:
        """Freeze the process, and wait until it is frozen."""
        os.kill(self._child.pid, signal.SIGSTOP)
        assert until(lambda: process_state(self._child.pid) == "T")

    def kill(self) -> None:
        """Kill the process at once."""
        self._child.kill()
        self._child.wait(TIMEOUT)

    def resume(self) -> None:
        """Let the process run again."""
        os.kill(self._child.pid, signal.SIGCONT)

    def close(self) -> None:
        """Have the process leave, and see that it does so well unless it was killed."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if self._child.poll() is None:
            os.kill(self._child.pid, signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            assert self._child.wait(TIMEOUT) in (0, -signal.SIGKILL)
        finally:
            self._child.kill()
            self._child.wait()
            self._child.stdout.close()


def _mapped(path: Path, nbytes: int) -> np.ndarray:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=np.uint8)


def serve(path: Path, tls: str) -> None:
    """Let the file's bytes be read and written until standard input ends."""
    memory = _mapped(path, path.stat().st_size)
    side = Side(load(native=True), tls)
    export = side.export(memory)
    said = {"worker": export.worker.hex(), "key": export.key.hex(), "address": export.address}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    side.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])

"""Memory of GPUs in the benchmarks: filled and read through host memory, and the baselines that copy it by the driver.

`cudamemcpy` is one cuMemcpyDtoDAsync (HtoD, DtoH) of as many bytes as ours moves: between the very same memory for one
block, and what copying gives at best for a list of blocks, which it does not scatter. `cudamemcpy_loop` moves the very
blocks, by one bare call through ctypes for each; `cudamemcpy_loop_c` does so in C. Each run ends with one
cuStreamSynchronize. The arguments of all calls are made beforehand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from raynixl import cuda
from raynixl.bench.layout import Bytes, Layout
from raynixl.bench.scene import REGION, Contender, Scene
from raynixl.bench.spec import VRAM, TransferSpec
from raynixl.cuda.library import current_driver, failure
from raynixl.errors import ConfigError
from raynixl.memory import MemoryKind
from raynixl.region import Region

_BOUNCE_NBYTES = 32 << 20
Rows = NDArray[np.uint64]
_COPIES = {
    (True, True): "cuMemcpyDtoDAsync_v2",
    (True, False): "cuMemcpyDtoHAsync_v2",
    (False, True): "cuMemcpyHtoDAsync_v2",
}
"""The driver's function, by whether source and target are a GPU's."""


class CopyStream:
    """A stream of a GPU that copies what it is told, in order."""

    def __init__(self, device: int) -> None:
        self.device = device
        with cuda.on(device):
            self.handle = cuda.stream_create()

    def close(self) -> None:
        """Let go of it; idempotent."""
        handle, self.handle = self.handle, 0
        if handle:
            with cuda.on(self.device):
                cuda.stream_destroy(handle)


def upload(region: Region, source: Bytes) -> None:
    """Copy bytes of the host into a region on a GPU; they are there on return."""
    with _Bounce(region) as bounce:
        for at in range(0, region.nbytes, len(bounce.view)):
            part = source[at : at + len(bounce.view)]
            bounce.view[: len(part)] = part
            bounce.copy(cuda.memcpy_h2d_async, region.memory.address + at, bounce.address, len(part))


def download(region: Region) -> Bytes:
    """Return a copy of a region on a GPU."""
    target = np.empty(region.nbytes, np.uint8)
    with _Bounce(region) as bounce:
        for at in range(0, region.nbytes, len(bounce.view)):
            part = target[at : at + len(bounce.view)]
            bounce.copy(cuda.memcpy_d2h_async, bounce.address, region.memory.address + at, len(part))
            part[:] = bounce.view[: len(part)]
    return target


class _Bounce:
    """Pinned memory and a stream, to fill and to read a region."""

    def __init__(self, region: Region) -> None:
        nbytes = min(region.nbytes, _BOUNCE_NBYTES)
        self._stream = CopyStream(region.device)
        with cuda.on(region.device):
            self.address = cuda.host_alloc(nbytes)
        self.view: Bytes = np.frombuffer(cuda.host_bytes(self.address, nbytes), np.uint8)

    def __enter__(self) -> _Bounce:
        return self

    def __exit__(self, *_: object) -> None:
        del self.view
        with cuda.on(self._stream.device):
            cuda.host_free(self.address)
        self._stream.close()

    def copy(self, copy: Callable[[int, int, int, int], None], target: int, source: int, nbytes: int) -> None:
        """Copy from address to address, and wait until it is done."""
        with cuda.on(self._stream.device):
            copy(target, source, nbytes, self._stream.handle)
            cuda.stream_synchronize(self._stream.handle)


class CudaMemcpy:
    """The driver's own copies, by one call or by one for each block."""

    def __init__(self, spec: TransferSpec, name: str) -> None:
        ours, theirs = spec.memories
        source, target = (ours, theirs) if spec.is_write else (theirs, ours)
        self._copy = _COPIES[source == VRAM, target == VRAM]
        self._name = name
        self._device = spec.gpus[0] if ours == VRAM else spec.gpus[1]
        self._is_theirs_vram = theirs == VRAM
        self._make = {"cudamemcpy": _call, "cudamemcpy_loop": _loop, "cudamemcpy_loop_c": _loop_in_c}[name]

    def contend(self, scene: Scene) -> list[Contender]:
        """Copy between our memory and the target's very own, opened here."""
        stream = scene.kept.enter_context(closing(CopyStream(self._device)))
        ours, theirs = self._ours(scene), self._theirs(scene)
        began = time.perf_counter()
        is_one = self._name == "cudamemcpy"
        layout = Layout(scene.layout.nbytes, 1, is_random=False) if is_one else scene.layout
        source, target = (ours, theirs) if scene.is_write else (theirs, ours)
        run = self._make(self._copy, rows_of(layout, source, target), stream.handle)
        runner = CopyRunner(self._name, stream, run, time.perf_counter() - began)

        def once() -> object:
            return runner.sample(1)

        return [Contender(runner, lambda: scene.check_in_order(once) if is_one else scene.check(once))]

    def close(self) -> None:
        """Nothing is held beyond a scene."""

    def _ours(self, scene: Scene) -> int:
        """Return the address of our memory; an arena is pinned while the scene lasts, plain memory is as it is."""
        memory = scene.region.memory
        if scene.region.kind is MemoryKind.DRAM and scene.memory == "arena":
            scene.kept.enter_context(closing(cuda.pin(memory.address, memory.nbytes)))
        return memory.address

    def _theirs(self, scene: Scene) -> int:
        """Return the address here of the target's memory."""
        if scene.pid == os.getpid():
            return int(scene.far["address"])
        if self._is_theirs_vram:
            from raynixl.backends.nvlink_import import IMPORTS

            key = scene.target.ask("export", name=REGION)["key"]
            opened = scene.kept.enter_context(closing(IMPORTS.open(key, scene.layout.nbytes, self._device)))
            return int(opened.address)
        from raynixl.bench.baselines import reach

        there, _ = reach(scene)
        scene.kept.callback(lambda _kept: None, there)
        scene.kept.enter_context(closing(cuda.pin(there.ctypes.data, there.nbytes)))
        return int(there.ctypes.data)


class CopyRunner:
    """Issues calls to a stream and waits for it, again and again."""

    def __init__(self, impl: str, stream: CopyStream, run: Callable[[], int], prepare_seconds: float) -> None:
        self.impl, self.prepare_seconds = impl, prepare_seconds
        self._stream, self._run = stream, run

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each, from the first call to when the last copy is done."""
        run, handle, times = self._run, self._stream.handle, []
        synchronize = current_driver().library.cuStreamSynchronize
        with cuda.on(self._stream.device):
            for _ in range(count):
                start = perf_counter_ns()
                code = run() or synchronize(handle)
                times.append(perf_counter_ns() - start)
                if code:
                    raise failure(code, "a copy")
        return times


def rows_of(layout: Layout, source: int, target: int) -> Rows:
    """Return the copies of a layout: source address, target address, bytes."""
    rows = np.empty((layout.blocks, 3), np.uint64)
    rows[:, 0] = layout.source_ids * layout.block_nbytes + source
    rows[:, 1] = layout.target_ids * layout.block_nbytes + target
    rows[:, 2] = layout.block_nbytes
    return rows


def _call(name: str, rows: Rows, stream: int) -> Callable[[], int]:
    ((source, target, nbytes),) = rows.tolist()
    copy = getattr(current_driver().library, name)
    return lambda: int(copy(target, source, nbytes, stream))


def _loop(name: str, rows: Rows, stream: int) -> Callable[[], int]:
    copy = getattr(current_driver().library, name)
    calls = [(target, source, nbytes, stream) for source, target, nbytes in rows.tolist()]

    def run() -> int:
        for target, source, nbytes, into in calls:
            if code := copy(target, source, nbytes, into):
                return int(code)
        return 0

    return run


def _loop_in_c(name: str, rows: Rows, stream: int) -> Callable[[], int]:
    try:
        from raynixl import _native
    except ImportError as exc:
        raise ConfigError(
            "cudamemcpy_loop_c is a loop of the compiled core, which is not built", hint="leave that baseline out"
        ) from exc
    address = cuda.function_address(name)
    return lambda: _native.cuda_copy_loop(address, stream, rows)

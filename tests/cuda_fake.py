"""A CUDA driver for machines without one, stricter than the true one: see `install`.

It stands where `raynixl.cuda` loads libcuda, and answers the same functions through real C function pointers. Memory
of its GPUs is host memory that two processes can share. Its parts: `cuda_fake_devices` (contexts), `cuda_fake_memory`
(allocations and CUDA IPC), `cuda_fake_chunks` (virtual memory and fabric handles), `cuda_fake_host` (pinned memory),
`cuda_fake_work` (streams and copies), `cuda_fake_events`,
`cuda_fake_kernels`.

What CUDA forgives or punishes late is an error at once here (`Misuse`): the call returns 999, and `finish` raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cuda_fake_chunks import Chunks
from cuda_fake_core import MISUSE, Misuse, Mode, Refused
from cuda_fake_devices import PRIMARY, Devices
from cuda_fake_host import Host
from cuda_fake_kernels import Kernel, Kernels
from cuda_fake_memory import Block, Memory
from cuda_fake_work import Work

from raynixl import cuda
from raynixl.cuda import Origin
from raynixl.cuda.prototypes import PROTOTYPES

__all__ = ["PRIMARY", "FakeCuda", "Mode", "install"]

NOT_INITIALIZED = 3
_NAMES = {
    1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 3: "CUDA_ERROR_NOT_INITIALIZED",
    100: "CUDA_ERROR_NO_DEVICE", 101: "CUDA_ERROR_INVALID_DEVICE", 201: "CUDA_ERROR_INVALID_CONTEXT",
    217: "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", 400: "CUDA_ERROR_INVALID_HANDLE", 500: "CUDA_ERROR_NOT_FOUND",
    600: "CUDA_ERROR_NOT_READY", 700: "CUDA_ERROR_ILLEGAL_ADDRESS", 712: "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
    719: "CUDA_ERROR_LAUNCH_FAILED", 801: "CUDA_ERROR_NOT_SUPPORTED",
    900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", MISUSE: "CUDA_ERROR_UNKNOWN",
}  # fmt: skip


class FakeCuda:
    """The driver, and what a test asks it. Attributes named cu... are its functions."""

    def __init__(
        self,
        *,
        gpus: int = 2,
        mode: Mode = Mode.AT_ONCE,
        visible: tuple[int, ...] | None = None,
        has_peer_access: bool = True,
        repeats_handles: bool = False,
        delay: float = 0.002,
        is_host: bool = False,
    ) -> None:
        self.lock = threading.RLock()  # protects everything in all parts
        self.changed = threading.Condition(self.lock)
        self.calls: Counter[str] = Counter()
        self.misuses: list[str] = []
        self._failures: dict[str, list[int]] = {}
        self._watchers: dict[str, Callable[..., None]] = {}
        self._pid = os.getpid()
        self._said: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self.devices = Devices(self, tuple(range(gpus)) if visible is None else visible, has_peer_access)
        self.is_host = is_host
        """Whether addresses of GPUs are those of the host: kernels that were compiled for it take them as they are."""
        self.memory = Memory(self, repeats_handles)
        self.chunks = Chunks(self)
        self.host = Host(self)
        self.work = Work(self, mode, delay)
        self.kernels = Kernels(self)
        self._parts = (self.devices, self.memory, self.chunks, self.host, self.work, self.work.events, self.kernels)
        self._bind()

    def _bind(self) -> None:
        parts = (self, *self._parts)
        for name, types in PROTOTYPES.items():
            run = next(getattr(part, f"_{name}") for part in parts if hasattr(part, f"_{name}"))
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._called(name, run)))
        whole = self._called("cuCtxSynchronize", self._cuCtxSynchronize)
        self.cuCtxSynchronize = ctypes.CFUNCTYPE(ctypes.c_int)(whole)

    def _called(self, name: str, run: Callable[..., int | None]) -> Callable[..., int]:
        def called(*arguments: Any) -> int:
            with self.lock:
                self.calls[name] += 1
                try:
                    if os.getpid() != self._pid:
                        return NOT_INITIALIZED
                    if name in self._watchers:
                        self._watchers[name](*arguments)
                    if self._failures.get(name):
                        return self._failures[name].pop(0)
                    self.work.check_capture(name)
                    return run(*arguments) or 0
                except Refused as exc:
                    return exc.code
                except Misuse as exc:
                    self.blame(f"{name}: {exc}")
                except Exception:  # noqa: BLE001  C is the caller
                    self.blame(f"the fake itself failed in {name}: {traceback.format_exc()}")
                return MISUSE

        return called

    def blame(self, text: str) -> None:
        """Note a misuse, with where it came from."""
        frames = [one for one in traceback.extract_stack() if "cuda_fake" not in one.filename]
        self.misuses.append(f"{text}\n" + "".join(traceback.format_list(frames[-4:])))

    # What tests ask.

    def make(
        self,
        nbytes: int,
        *,
        device: int = 0,
        origin: Origin = Origin.MALLOC,
        handle_types: int = 0,
        context: int | None = None,
        chunks: tuple[int, ...] = (),
    ) -> int:
        """Allocate as the user's program does, not raynixl: it is no leak. `chunks` piece virtual memory together."""
        with self.lock:
            owner = self.devices.retain(device) if context is None else context
            if origin is Origin.VIRTUAL:
                return self.chunks.make(chunks or (nbytes,), device, owner, handle_types)
            made = Block(device=device, context=owner, nbytes=nbytes, origin=origin, handle_types=handle_types)
            made.is_users = True
            return self.memory.add(made).address

    def drop(self, address: int) -> None:
        """Free what `make` made."""
        with self.lock:
            self.memory.remove(self.memory.at(address))

    def view(self, address: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return bytes of a GPU, or pinned ones, whose address must be valid."""
        with self.lock:
            return self.memory.view(address, nbytes)

    def fail(self, name: str, code: int, *, times: int = 1) -> None:
        """Have the next calls of a function return a code."""
        self._failures.setdefault(name, []).extend([code] * times)

    def forgive(self, name: str) -> None:
        """Have a function work again."""
        self._failures.pop(name, None)

    def watch(self, name: str, look: Callable[..., None]) -> None:
        """Have somebody look at the arguments of each call of a function."""
        self._watchers[name] = look

    def kernel(self, name: str, *types: Any) -> Callable[[Kernel], Kernel]:
        """Say what a kernel does: a Python function of (gpu, grid, *values); a generator is stepped until it ends."""
        return self.kernels.define(name, *types)

    def release(self) -> None:
        """Let held work run, all of it, and what comes then as well."""
        self.work.release()

    def step(self) -> bool:
        """Run one piece of held work; False if there is none that could."""
        with self.lock:
            return self.work.step()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold all work meanwhile; then it runs."""
        mode, self.work.mode = self.work.mode, Mode.HELD
        try:
            yield
        finally:
            with self.lock:
                self.work.mode = mode
                self.work.wake()

    def leaks(self) -> list[str]:
        """Say what is still held."""
        with self.lock:
            return [leak for part in self._parts for leak in part.leaks()]

    def finish(self) -> None:
        """Take it out, and raise on every misuse and on everything that was not given back."""
        gc.collect()  # arenas are freed with their last view
        try:
            self.work.drain()
            cuda.close_kept()
            self.work.drain()
            found = self.misuses + self.leaks()
        finally:
            self.discard()
        assert not found, "misuse of CUDA:\n" + "\n".join(found)

    def discard(self) -> None:
        """Take it out, whatever state it is in: a test has failed."""
        self.work.stop()
        while self._undo:
            self._undo.pop()()
        for part in (self.memory, self.chunks, self.work.events):
            part.close()

    def install(self) -> None:
        """Put it in the driver's place in this process."""
        self.at_end(cuda.replace_driver(self))

    def at_end(self, undo: Callable[[], None]) -> None:
        """Have something done when it is taken out."""
        self._undo.append(undo)

    def _cuCtxSynchronize(self) -> int:  # noqa: N802
        raise Misuse("the whole device is waited for")

    def _cuGetErrorName(self, code: int, out: int) -> int:  # noqa: N802
        text = _NAMES.get(code)
        if text is None:
            return 1
        if code == MISUSE and self.misuses:
            text = f"{text}: {self.misuses[-1].splitlines()[0]}"
        self._said = [*self._said[-8:], ctypes.create_string_buffer(text.encode())]
        ctypes.c_void_p.from_address(out).value = ctypes.addressof(self._said[-1])
        return 0


def install(**settings: Any) -> FakeCuda:
    """Put a fake driver in CUDA's place in this process, and return it; `finish()` takes it out.

    In a child process the same line does: two processes that have it share memory by IPC handles.
    """
    fake = FakeCuda(**settings)
    fake.install()
    return fake

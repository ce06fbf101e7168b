"""Kernels of the fake CUDA driver: Python functions, found by name, over memory that is checked."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuda_fake_core import Misuse, Refused, put
from cuda_fake_work import Piece

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

NOT_FOUND = 500
_MOST_THREADS = 1024
Kernel = Callable[..., Any]
_handles = itertools.count(0x7000_0001, 0x10)


@dataclass(frozen=True)
class Gpu:
    """Memory as a kernel reaches it."""

    fake: FakeCuda
    context: int

    def view(self, address: int, nbytes: int) -> Any:
        """Return bytes of GPUs or pinned ones that this kernel may use."""
        self.fake.host.refuse_address_of_host(address)
        return self.fake.memory.view(address, nbytes, self.context)


class Kernels:
    """What is known by name, and what is loaded."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self._known: dict[str, tuple[Kernel, tuple[Any, ...]]] = {}
        self._modules: dict[int, int] = {}
        self._functions: dict[int, tuple[str, int]] = {}
        self.launches: list[str] = []

    def define(self, name: str, *types: Any) -> Callable[[Kernel], Kernel]:
        """Say what a kernel does, and of which types its arguments are."""

        def keep(run: Kernel) -> Kernel:
            self._known[name] = (run, types)
            return run

        return keep

    def leaks(self) -> list[str]:
        """What is still loaded."""
        return [f"module {one:#x} was never unloaded" for one in self._modules]

    def _cuModuleLoadData(self, out: int, image: int | None) -> None:  # noqa: N802
        handle = next(_handles)
        self._modules[handle] = self._fake.devices.current
        put(out, c_void_p, handle)

    def _cuModuleUnload(self, module: int | None) -> None:  # noqa: N802
        if module not in self._modules:
            raise Misuse("a module is unloaded that is not loaded")
        del self._modules[module]
        self._functions = {one: (name, of) for one, (name, of) in self._functions.items() if of != module}

    def _cuModuleGetFunction(self, out: int, module: int | None, name: int | None) -> None:  # noqa: N802
        if module not in self._modules:
            raise Misuse("a function of a module that is not loaded")
        text = ctypes.string_at(name or 0).decode()
        if text not in self._known:
            raise Refused(NOT_FOUND)
        handle = next(_handles)
        self._functions[handle] = (text, module)
        put(out, c_void_p, handle)

    def _cuLaunchKernel(self, function: int | None, *rest: Any) -> None:  # noqa: N802
        x, y, z, bx, by, bz, _, stream, packed, _ = rest
        if function not in self._functions:
            raise Misuse("a kernel is launched that is not loaded")
        name, module = self._functions[function]
        context = self._fake.devices.current
        if self._modules[module] != context:
            raise Misuse(f"kernel {name} is launched in another context than it was loaded in")
        if min(x, y, z, bx, by, bz) < 1 or bx * by * bz > _MOST_THREADS:
            raise Misuse(f"kernel {name} is launched with grid {(x, y, z)} and block {(bx, by, bz)}")
        run, types = self._known[name]
        values = _arguments(packed, types)
        self.launches.append(name)
        gpu = Gpu(self._fake, context)
        touches = tuple((one, 1) for one, kind in zip(values, types, strict=True) if kind is c_uint64)
        start = self._fake.work.ours(stream)
        self._fake.work.queue(start, Piece(f"kernel {name}", lambda: run(gpu, (x, y, z), *values), touches=touches))


def _arguments(packed: int | None, types: tuple[Any, ...]) -> tuple[Any, ...]:
    if not types:
        return ()
    pointers = (c_void_p * len(types)).from_address(packed or 0)
    found = []
    for pointer, kind in zip(pointers, types, strict=True):
        value = kind.from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(kind)))
        found.append(value.value if hasattr(value, "value") else value)
    return tuple(found)

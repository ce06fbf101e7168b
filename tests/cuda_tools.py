"""A CUDA driver for machines without one: it knows allocations that a test made up, contexts, and who asked what."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raynixl.cuda import Origin

INVALID = 1  # CUDA_ERROR_INVALID_VALUE
PRIMARY = 0x1000  # the primary context of GPU n is PRIMARY + n


@dataclass(frozen=True)
class Piece:
    """One allocation on a made-up GPU."""

    address: int
    nbytes: int
    device: int = 0
    context: int = 0xC0
    origin: Origin = Origin.MALLOC
    handle_types: int = 0


class _Function:
    """A function of the driver, called as ctypes calls one."""

    def __init__(self, run: Callable[..., int]) -> None:
        self._run = run

    def __call__(self, *arguments: Any) -> int:
        return self._run(*arguments)


@dataclass
class FakeDriver:
    """In place of the library that `raynixl.cuda` loads; `retained` are the primary contexts that were asked for."""

    pieces: list[Piece]
    gpus: int = 2
    retained: list[int] = field(default_factory=list)
    is_broken: bool = False

    def __post_init__(self) -> None:
        self._threads = threading.local()
        current = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
        self.cuCtxGetCurrent = current(self._get_current)
        self.cuCtxSetCurrent = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._set_current)
        for name in (
            "cuPointerGetAttribute", "cuMemRetainAllocationHandle", "cuMemRelease", "cuCtxPushCurrent_v2",
            "cuCtxPopCurrent_v2", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDeviceGetPCIBusId",
        ):  # fmt: skip
            setattr(self, name, _Function(getattr(self, f"_{name}")))

    @property
    def stack(self) -> list[int]:
        """The contexts that this thread has pushed."""
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        stack: list[int] = self._threads.stack
        return stack

    def _find(self, address: int) -> Piece | None:
        return next((one for one in self.pieces if one.address <= address < one.address + one.nbytes), None)

    def _get_current(self, into: Any) -> int:
        into[0] = self.stack[-1] if self.stack else None
        return 0

    def _set_current(self, context: int | None) -> int:
        self.stack[-1:] = [context or 0]
        return 0

    def _cuPointerGetAttribute(self, into: Any, attribute: Any, address: Any) -> int:  # noqa: N802
        piece = self._find(address.value)
        if piece is None:
            return INVALID
        pool = 0xF001 if piece.origin is Origin.POOL else 0
        values = {
            1: piece.context, 2: 2, 9: piece.device, 11: piece.address, 12: piece.nbytes, 16: piece.handle_types,
            17: pool,
        }  # fmt: skip
        into._obj.value = values[attribute.value]
        return 0

    def _cuMemRetainAllocationHandle(self, into: Any, address: Any) -> int:  # noqa: N802
        piece = self._find(address.value)
        if piece is None or piece.origin is not Origin.VIRTUAL:
            return INVALID
        into._obj.value = 0x4A
        return 0

    def _cuMemRelease(self, handle: Any) -> int:  # noqa: N802
        assert handle.value == 0x4A
        return 0

    def _cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        if self.is_broken:
            return INVALID
        self.stack.append(context.value)
        return 0

    def _cuCtxPopCurrent_v2(self, into: Any) -> int:  # noqa: N802
        into._obj.value = self.stack.pop()
        return 0

    def _cuDeviceGet(self, into: Any, device: Any) -> int:  # noqa: N802
        number = getattr(device, "value", device)
        into._obj.value = number
        return 0 if 0 <= number < self.gpus else INVALID

    def _cuDevicePrimaryCtxRetain(self, into: Any, device: Any) -> int:  # noqa: N802
        self.retained.append(device.value)
        into._obj.value = PRIMARY + device.value
        return 0

    def _cuDeviceGetPCIBusId(self, text: Any, _nbytes: int, device: Any) -> int:  # noqa: N802
        text.value = f"0000:{device.value + 1:02x}:00.0".encode()
        return 0

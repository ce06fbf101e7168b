"""The twin's way into a CUDA context: threads take it before they drive UCX, which asks CUDA about events there."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

_entered: list[Callable[[], None]] = []
_taken = threading.local()


def enter_cuda(context: int, get_current: int, set_current: int) -> None:
    """Have every thread that drives UCX from now on do so in a context. See `raynixl.native.Native`."""
    get = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(get_current)
    put = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(set_current)

    def take() -> None:
        current = ctypes.c_void_p()
        if get(ctypes.addressof(current)) == 0 and not current.value:
            put(context)

    if not _entered:
        _entered.append(take)


def take_cuda_context() -> None:
    """Enter the context, if there is one and this thread has none; once for each thread."""
    if _entered and not hasattr(_taken, "is_taken"):
        _taken.is_taken = True
        _entered[0]()

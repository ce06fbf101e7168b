"""What the twin does with CUDA: threads enter a context before they drive UCX, and kernels are started."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p

import numpy as np
import numpy.typing as npt

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


class Launcher:
    """A kernel of a GPU, packed once; see `raynixl.native.Launcher`."""

    def __init__(
        self,
        functions: tuple[int, int, int, int, int],
        context: int,
        function: int,
        shape: tuple[int, int],
        values: npt.NDArray[np.uint64],
        copies: npt.NDArray[np.uint64],
    ) -> None:
        self._get = ctypes.CFUNCTYPE(c_int, c_void_p)(functions[0])
        self._push = ctypes.CFUNCTYPE(c_int, c_void_p)(functions[1])
        self._pop = ctypes.CFUNCTYPE(c_int, c_void_p)(functions[2])
        self._launch = ctypes.CFUNCTYPE(c_int, c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p)(functions[3])
        self._copy = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_size_t, c_void_p)(functions[4])
        self._context = context
        self._before = (function, shape[0], 1, 1, shape[1], 1, 1, 0)
        self._values = values.copy()
        self._copies: list[list[int]] = copies.tolist()

    def run(self, stream: int, flag: int, number: int, counter: int, may_wait: bool) -> int:
        """Put it on a stream, with these numbers as its last arguments; return the driver's error, or 0."""
        current = c_void_p()
        if self._get(ctypes.addressof(current)) == 0 and current.value == self._context:
            return self._start(stream, flag, number, counter)
        if code := self._push(self._context):
            return int(code)
        try:
            return self._start(stream, flag, number, counter)
        finally:
            self._pop(ctypes.addressof(current))

    def _start(self, stream: int, *end: int) -> int:
        for source, target, nbytes in self._copies:
            if code := self._copy(target, source, nbytes, stream):
                return int(code)
        numbers = np.append(self._values, np.array(end, np.uint64))
        first = numbers.ctypes.data
        packed = (c_void_p * len(numbers))(*range(first, first + numbers.nbytes, numbers.itemsize))
        return int(self._launch(*self._before, stream, ctypes.addressof(packed), None))

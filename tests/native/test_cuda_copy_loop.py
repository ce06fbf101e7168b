"""The loop of copies in C that the benchmark compares with, over a driver function made up here."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

_native = pytest.importorskip("raynixl._native", reason="the compiled core is not built")
pytestmark = pytest.mark.pure
Copy = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
BAD = 700


def run(copy: object, rows: np.ndarray) -> int:
    code: int = _native.cuda_copy_loop(ctypes.cast(copy, ctypes.c_void_p).value, 7, rows)
    return code


def test_every_row_is_copied_in_order_on_the_stream() -> None:
    source, target, streams = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8), []

    @Copy
    def copy(to: int, from_: int, nbytes: int, stream: int) -> int:
        streams.append(stream)
        ctypes.memmove(to, from_, nbytes)
        return 0

    cuts = [(0, 10), (10, 1), (11, 89)]
    rows = np.array([(source.ctypes.data + at, target.ctypes.data + at, n) for at, n in cuts], np.uint64)
    assert run(copy, rows) == 0
    assert np.array_equal(source, target)
    assert streams == [7, 7, 7]


def test_the_first_error_ends_it_and_is_returned() -> None:
    calls = []

    @Copy
    def copy(to: int, _from: int, _nbytes: int, _stream: int) -> int:
        calls.append(to)
        return BAD if to == 2 else 0

    rows = np.array([(9, to, 1) for to in (1, 2, 3)], np.uint64)
    assert run(copy, rows) == BAD
    assert calls == [1, 2]

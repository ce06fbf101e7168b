"""What the core does with CUDA: it starts kernels, looks at words, and opens gates to who works outside of it."""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np
import pytest

from raynixl.native import STALE, Native

pytestmark = pytest.mark.pure

CONTEXT, STREAM, FUNCTION = 0x1000, 0x2000, 0x3000
NO_ROWS = np.empty((0, 3), np.uint64)


class Calls:
    """Functions as the driver has them, which note what they are called with."""

    def __init__(self, current: int = 0) -> None:
        self.seen: list[Any] = []
        self.stack = [current]
        self.codes: dict[str, int] = {}
        kinds = (c_int, c_void_p)
        self._kept = (
            ctypes.CFUNCTYPE(*kinds)(self._get),
            ctypes.CFUNCTYPE(*kinds)(self._push),
            ctypes.CFUNCTYPE(*kinds)(self._pop),
            ctypes.CFUNCTYPE(c_int, c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p)(self._launch),
            ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_size_t, c_void_p)(self._copy),
        )
        get, push, pop, launch, copy = (ctypes.cast(one, c_void_p).value or 0 for one in self._kept)
        self.addresses = get, push, pop, launch, copy

    def _get(self, out: int) -> int:
        c_uint64.from_address(out).value = self.stack[-1]
        return 0

    def _push(self, context: int) -> int:
        self.seen.append(("push", context))
        self.stack.append(context)
        return self.codes.get("push", 0)

    def _pop(self, out: int) -> int:
        self.seen.append(("pop",))
        c_uint64.from_address(out).value = self.stack.pop()
        return 0

    def _launch(self, function: int, *rest: int) -> int:
        *shape, stream, packed, extra = rest
        assert extra is None
        pointers = (c_void_p * 6).from_address(packed)
        values = [c_uint64.from_address(one).value for one in pointers]
        self.seen.append(("launch", function, tuple(shape), stream, values))
        return self.codes.get("launch", 0)

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self.seen.append(("copy", source, target, nbytes, stream))
        return self.codes.get("copy", 0)


def packed(core: Native, calls: Calls, copies: Any = NO_ROWS) -> Any:
    values = np.array([1, (1 << 64) - 2, 3], np.uint64)
    return core.Launcher(calls.addresses, CONTEXT, FUNCTION, (70_000, 256), values, copies)


LAUNCHED = ("launch", FUNCTION, (70_000, 1, 1, 256, 1, 1, 0), STREAM, [1, (1 << 64) - 2, 3, 40, 50, 60])


@pytest.mark.parametrize("may_wait", [False, True])
def test_a_kernel_is_started_in_its_context_with_all_its_arguments(core: Native, may_wait: bool) -> None:
    calls = Calls()
    launcher = packed(core, calls)
    assert launcher.run(STREAM, 40, 50, 60, may_wait) == 0
    assert calls.seen == [("push", CONTEXT), LAUNCHED, ("pop",)]
    assert calls.stack == [0]


def test_a_context_that_is_current_stays_as_it_is(core: Native) -> None:
    calls = Calls(CONTEXT)
    launcher = packed(core, calls)
    for _ in range(3):
        assert launcher.run(STREAM, 40, 50, 60, False) == 0
    assert calls.seen == [LAUNCHED] * 3


def test_copies_go_before_the_kernel(core: Native) -> None:
    calls = Calls(CONTEXT)
    rows = np.array([[10, 20, 1 << 40], [30, 40, 5]], np.uint64)
    launcher = packed(core, calls, rows)
    rows[:] = 0
    assert launcher.run(STREAM, 40, 50, 60, False) == 0
    assert calls.seen == [("copy", 10, 20, 1 << 40, STREAM), ("copy", 30, 40, 5, STREAM), LAUNCHED]


@pytest.mark.parametrize(("call", "expected"), [("push", 1), ("copy", 3), ("launch", 5)])
def test_the_first_error_is_returned_and_the_context_is_as_before(core: Native, call: str, expected: int) -> None:
    calls = Calls()
    calls.codes[call] = 700
    assert packed(core, calls, np.array([[1, 2, 3]] * 2, np.uint64)).run(STREAM, 40, 50, 60, False) == 700
    assert len(calls.seen) == expected
    assert calls.stack == [0] or call == "push"


def test_a_word_is_looked_at_until_it_is_large_enough(core: Native) -> None:
    word = np.zeros(1, np.uint64)
    at = word.ctypes.data
    assert core.look_for(at, 0, 0.0)
    began = time.monotonic()
    assert not core.look_for(at, 5, 0.02)
    assert time.monotonic() - began >= 0.02
    assert not core.look_for(at, 5, -1.0)
    thread = threading.Timer(0.02, lambda: word.__setitem__(0, 7))
    thread.start()
    assert core.look_for(at, 5, 10.0)
    thread.join()
    assert core.look_for(at, 7, 0.0)
    assert not core.look_for(at, (1 << 64) - 1, 0.0)


def test_who_works_outside_of_the_core_passes_gates_too(core: Native) -> None:
    gate = core.Gate()
    assert (gate.enter(), gate.enter(), gate.inflight, gate.aborted) == (0, 0, 2, 0)
    gate.close(STALE, abort=False)
    assert (gate.enter(), gate.inflight, gate.aborted) == (STALE, 2, 0)
    assert not gate.drain(0.01)
    gate.close(STALE + 1)
    assert (gate.code, gate.aborted) == (STALE, STALE)
    gate.leave()
    thread = threading.Timer(0.02, gate.leave)
    thread.start()
    assert gate.drain(10.0)
    thread.join()
    assert gate.inflight == 0

"""Both implementations of the copy engine, and small tools to point them at memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from native_tools import INLINE, wait_threads_gone

from raynixl.native import Engine, Native, load


@pytest.fixture(params=["native", "ctypes"])
def core(request: pytest.FixtureRequest) -> Native:
    """The compiled core, and its twin."""
    core = load(request.param == "native")
    if request.param == "native" and core.NAME != "native":
        pytest.skip("the compiled core was not built")
    return core


@pytest.fixture
def make_engine(core: Native) -> Iterator[Callable[..., Engine]]:
    """Engines that must close, and leave no thread, when the test ends."""
    before = set(os.listdir("/proc/self/task"))
    engines: list[Engine] = []

    def make(threads: int = 2, inline_nbytes: int = INLINE) -> Engine:
        engines.append(core.Engine(threads, inline_nbytes))
        return engines[-1]

    yield make
    assert all(engine.close(10.0) for engine in engines)
    if threading.active_count() == 1:
        wait_threads_gone(before)


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """An engine of two threads that copies up to 256 KiB inline."""
    return make_engine()

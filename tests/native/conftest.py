"""Both implementations of the copy engine, and small tools to point them at memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from native_tools import BIG, INLINE, MIB, address_of, random_bytes, table, wait_threads_gone
from rail_tools import Side, Target, Way

from raynixl.native import COPY, Engine, Native, load


@pytest.fixture(params=["native", "ctypes"])
def core(request: pytest.FixtureRequest) -> Native:
    """The compiled core, and its twin."""
    core = load(request.param == "native")
    if request.param == "native" and core.NAME != "native":
        pytest.skip("the compiled core was not built")
    return core


@pytest.fixture
def both() -> tuple[Native, Native]:
    """The compiled core and its twin, to be compared."""
    compiled = load(native=True)
    if compiled.NAME != "native":
        pytest.skip("the compiled core was not built")
    return compiled, load(native=False)


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


@pytest.fixture(scope="module")
def big() -> tuple[np.ndarray, np.ndarray]:
    """A source and a target that take milliseconds to copy."""
    return random_bytes(BIG), np.zeros(BIG, dtype=np.uint8)


@pytest.fixture
def long_program(core: Native, engine: Engine, big: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple]:
    """A program of about a second (the same bytes again and again), with its gate."""
    gate = core.Gate()
    source, target = big
    row = (address_of(source), address_of(target), BIG)
    yield engine.program(COPY, 0, table(*[row] * 200), [gate]), gate
    assert gate.drain(30.0)


# UCX


@pytest.fixture
def make_side(core: Native) -> Iterator[Callable[[str], Side]]:
    """Rails of this process; they must close, and give everything back, when the test ends."""
    sides: list[Side] = []

    def make(tls: str) -> Side:
        sides.append(Side(core, tls))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


@pytest.fixture
def make_target(tmp_path: Path) -> Iterator[Callable[[str], Target]]:
    """Processes to be read and written, that a test may stop or kill."""
    targets: list[Target] = []

    def make(tls: str, nbytes: int = 16 * MIB) -> Target:
        targets.append(Target(tmp_path / f"memory{len(targets)}", nbytes, tls))
        return targets[-1]

    yield make
    for target in targets:
        target.close()


@pytest.fixture(scope="module", params=["cma,tcp", "tcp"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A process with 32 MiB, over one lane or the other, that all tests of a file share: they do it no harm."""
    directory: Path = tmp_path_factory.mktemp("target")
    target = Target(directory / "memory", 32 * MIB, request.param)
    yield target
    target.close()


@pytest.fixture
def side(target: Target, make_side: Callable[[str], Side]) -> Side:
    """A rail that speaks what the target speaks."""
    return make_side(target.tls)


@pytest.fixture
def way(side: Side, target: Target) -> Way:
    """The way to the target."""
    target.memory[:] = 0
    return side.reach(target.export)

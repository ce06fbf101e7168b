"""What only the ctypes twin promises over UCX: who holds what, and for how long."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_tools import KIB, MIB, finish, random_bytes
from rail_tools import Side, until

from raynixl.backends.ucx_presence import is_installed
from raynixl.native import DONE, RESET, load
from raynixl.native.twin_endpoint import Endpoint

pytestmark = pytest.mark.pure

LONE = """
import sys
from raynixl.native import load
core = load({native})
assert not any(name.partition(".")[0] == "ucxx" for name in sys.modules)
assert "libucp" not in open("/proc/self/maps").read()
try:
    core.Rail(1, 1, 0)
except RuntimeError as error:
    assert "libucp" in str(error)
else:
    sys.exit("made a rail of nothing")
"""


@pytest.mark.parametrize("native", [True, False])
def test_a_core_needs_no_ucx_until_it_makes_a_rail(native: bool) -> None:
    assert subprocess.run([sys.executable, "-c", LONE.format(native=native)], timeout=60, check=False).returncode == 0


@pytest.fixture
def alone() -> tuple[Side, Callable[[], int]]:
    """A rail of the twin, and how many threads it has."""
    if not is_installed():
        pytest.skip("ucxx is not installed")
    side = Side(load(native=False), "cma,tcp")

    def threads() -> int:
        return sum(thread.name == "raynixl-ucx" for thread in threading.enumerate())

    yield side, threads
    side.close()
    assert threads() == 0


def test_its_thread_is_there_once_there_is_work_for_it(alone: tuple[Side, Callable[[], int]]) -> None:
    side, threads = alone
    memory, source = np.zeros(4 * MIB, dtype=np.uint8), random_bytes(4 * MIB)
    way = side.reach(side.export(memory))
    assert threads() == 0
    for _ in range(3):
        assert finish(side.writer(source, way).run(30.0)) == DONE
    assert threads() == 1
    assert np.array_equal(memory, source)


def test_endpoints_that_are_gone_are_forgotten_though_nobody_asks(alone: tuple[Side, Callable[[], int]]) -> None:
    side, _threads = alone
    export = side.export(np.zeros(64, dtype=np.uint8))
    for _ in range(30):
        side.rail.connect(export.worker).close(RESET)

    def living() -> int:
        side.rail.sweep(1.0)
        gc.collect()
        return sum(isinstance(one, Endpoint) for one in gc.get_objects())

    assert until(lambda: living() == 0)


@pytest.mark.parametrize("limit", [2 * KIB, 8 * KIB - 64, 256 * KIB - 64])
def test_no_read_asks_for_more_than_its_endpoint_lets_pass(alone: tuple[Side, Callable[[], int]], limit: int) -> None:
    side, _threads = alone
    source, target = random_bytes(MIB), np.zeros(MIB, dtype=np.uint8)
    way = side.reach(side.export(source))
    way.endpoint.limit_reads(limit)
    program: Any = side.reader(target, way)
    assert program.rows[:, 3].max() <= limit
    assert finish(program.run(30.0)) == DONE
    assert np.array_equal(source, target)

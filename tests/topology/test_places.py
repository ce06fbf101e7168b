"""The NUMA node of memory is asked of the kernel, without touching the memory."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from raynixl.topology import memory_place, numa_node_of
from raynixl.topology.places import _move_pages

NODES = Path("/sys/devices/system/node")


def resident(array: np.ndarray) -> int:
    """How many bytes of a mapping are in memory, as /proc tells."""
    start = f"{array.ctypes.data:x}-"
    text = Path("/proc/self/smaps").read_text()
    match = re.search(rf"^{start}.*?^Rss: +(\d+) kB", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    return int(match[1]) << 10


def can_ask() -> bool:
    array = np.ones(1 << 16, np.uint8)
    return numa_node_of(array.ctypes.data, array.nbytes) >= 0


@pytest.mark.skipif(not can_ask(), reason="the kernel or the container does not answer move_pages")
def test_touched_memory_is_at_a_node_of_this_machine() -> None:
    array = np.ones(8 << 20, np.uint8)
    node = numa_node_of(array.ctypes.data, array.nbytes)
    assert (NODES / f"node{node}").exists()
    assert memory_place(array.ctypes.data + 12_345, 1).numa_node >= 0


def test_memory_that_was_never_touched_is_nowhere_and_stays_untouched() -> None:
    with mmap.mmap(-1, 64 << 20) as fresh:
        array = np.frombuffer(fresh, np.uint8)
        before = resident(array)
        assert numa_node_of(array.ctypes.data, array.nbytes) == -1
        assert resident(array) == before
        del array


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [
        (0, 4096),
        (4096, 1 << 40),
        (1 << 47, 4096),
        ((1 << 64) - 4096, 4096),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (1 << 70, 1),
        (-4096, 4096),
        (4096, 0),
        (4096, -1),
    ],
)
def test_addresses_where_nothing_is_have_no_node(address: int, nbytes: int) -> None:
    assert numa_node_of(address, nbytes) == -1


def test_a_machine_whose_system_calls_are_not_known_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.ones(1 << 16, np.uint8)
    monkeypatch.setattr("raynixl.topology.places.platform.machine", lambda: "riscv64")
    _move_pages.cache_clear()
    try:
        assert numa_node_of(array.ctypes.data, array.nbytes) == -1
    finally:
        _move_pages.cache_clear()

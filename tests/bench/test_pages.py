"""Memory in huge pages is so where the kernel has them: comparisons of who walks pages depend on it."""

import re
from pathlib import Path

import pytest

from raynixl.bench.pages import huge_memory, is_huge, user_memory

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_kib_at(address):
    """How much of the mapping at an address lies in huge pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.mark.parametrize("nbytes", [1, 4096, 1 << 20, (4 << 20) + 5])
def test_huge_memory_lies_in_huge_pages_whatever_its_size(nbytes):
    if not MODE.exists() or "[never]" in MODE.read_text():
        pytest.skip("this kernel gives no huge pages")
    memory = huge_memory(nbytes)
    assert memory.nbytes == nbytes
    assert not memory.any()
    memory[:] = 7
    if _huge_kib_at(memory.ctypes.data) == 0:
        pytest.skip("the kernel has no huge page free")
    assert _huge_kib_at(memory.ctypes.data) >= 2048


def test_which_memory_is_huge_is_known_beforehand():
    assert is_huge("huge", 1)
    assert is_huge("user", 64 << 20), "numpy asks for it"
    assert not is_huge("user", 1 << 20)
    assert not is_huge("arena", 4096)
    assert user_memory(5).tolist() == [0] * 5

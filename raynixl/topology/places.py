"""Where a piece of memory is: its NUMA node, and for a GPU's the device's way through the PCI tree."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_SAMPLES: Final = 16
_MOVE_PAGES: Final = {"x86_64": 279, "aarch64": 239}
_PAGE: Final = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class Place:
    """Where memory is. `name` is how people call it; node -1 and path '' mean not known."""

    name: str = "the memory"
    numa_node: int = -1
    pci_path: str = ""


def memory_place(address: int, nbytes: int) -> Place:
    """Return the place of a range of this process's host memory."""
    return Place(numa_node=numa_node_of(address, nbytes))


def numa_node_of(address: int, nbytes: int) -> int:
    """Return the NUMA node that holds more than half of the pages looked at, or -1 if none does or none says.

    Looks at a few pages spread over the range and faults none in: those never touched say nothing. Addresses that
    are not mapped, kernels and containers that do not answer are -1, too.
    """
    if nbytes <= 0 or address < 0 or address + nbytes > 1 << 64:
        return -1
    first, last = address // _PAGE, (address + nbytes - 1) // _PAGE
    count = min(_SAMPLES, last - first + 1)
    pages = (ctypes.c_void_p * count)(
        *((first + (last - first) * i // max(1, count - 1)) * _PAGE for i in range(count))
    )
    status = (ctypes.c_int * count)(*([-1] * count))
    query = _move_pages()
    # With no list of nodes it moves nothing and only says where each page is. get_mempolicy would fault pages in.
    if query is None or query(0, count, pages, None, status, 0) != 0:
        return -1
    nodes = Counter(node for node in status if node >= 0)
    node, seen = nodes.most_common(1)[0] if nodes else (-1, 0)
    return node if 2 * seen > nodes.total() else -1


@functools.cache
def _move_pages() -> Callable[..., int] | None:
    """Return move_pages(2), for which the C library has no function; None on a machine whose number is not known."""
    number = _MOVE_PAGES.get(platform.machine())
    if number is None:
        return None
    syscall: Any = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    integer, pointer = ctypes.c_long, ctypes.c_void_p
    syscall.argtypes = (integer, integer, integer, pointer, pointer, pointer, integer)
    return functools.partial(syscall, number)

"""What is not memory is not registered, and memory that goes away ends in an error."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from agent_scenes import N, Scene, naming, refused
from agent_tools import PATIENCE, random_bytes

from raynixl import Agent, BackendUnavailable, ConfigError, MemoryKind, MemorySpan, RangeError


class _Lying:
    """Says that it has memory, by more than one protocol, and has none."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("nothing here")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


MEMORY: dict[str, tuple[Callable[[], Any], Any]] = {
    "nothing": (lambda: None, ConfigError),
    "a number": (lambda: 5, ConfigError),
    "text": (lambda: "text", ConfigError),
    "a list": (lambda: [1, 2], ConfigError),
    "an object": (object, ConfigError),
    "a class": (lambda: bytearray, ConfigError),
    "a failing protocol": (_Lying, ConfigError),
    "a module of torch": (lambda: torch.nn.Linear(2, 2), ConfigError),
    "a dtype of torch": (lambda: torch.float32, ConfigError),
    "a meta tensor": (lambda: torch.empty(8, device="meta"), ConfigError),
    "a sparse tensor": (lambda: torch.eye(4).to_sparse(), ConfigError),
    "a strided tensor": (lambda: torch.zeros(8, 8)[:, :4], ConfigError),
    "a transposed tensor": (lambda: torch.zeros(4, 8).T, ConfigError),
    "an empty tensor": (lambda: torch.empty(0), RangeError),
    "a strided array": (lambda: np.zeros((8, 8))[:, :4], ConfigError),
    "a reversed array": (lambda: np.zeros(8)[::-1], ConfigError),
    "an array of objects": (lambda: np.array([None, "x"]), ConfigError),
    "an empty array": (lambda: np.zeros(0), RangeError),
    "empty bytes": (lambda: b"", RangeError),
    "a strided view": (lambda: memoryview(bytearray(16))[::2], ConfigError),
    "unmapped memory": (lambda: MemorySpan(4096, 8192), RangeError),
    "memory that ends unmapped": (lambda: MemorySpan(*_half_unmapped()), RangeError),
    "the null address": (lambda: MemorySpan(0, 8), RangeError),
    "a negative address": (lambda: MemorySpan(-4096, 8), RangeError),
    "an address of 2^64": (lambda: MemorySpan(2**64, 8), RangeError),
    "memory that wraps": (lambda: MemorySpan(2**64 - 8, 16), RangeError),
    "memory of 2^63 bytes": (lambda: MemorySpan(4096, 2**63), RangeError),
    "memory of 2^64-1 bytes": (lambda: MemorySpan(4096, 2**64 - 1), RangeError),
    "memory of no bytes": (lambda: MemorySpan(4096, 0), RangeError),
    "memory of negative bytes": (lambda: MemorySpan(4096, -8), RangeError),
    "a float address": (lambda: MemorySpan(4096.0, 8), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "a float length": (lambda: MemorySpan(4096, 8.5), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "a text address": (lambda: MemorySpan("4096", 8), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "no length": (lambda: MemorySpan(4096, None), (RangeError, ConfigError)),  # type: ignore[arg-type]
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE


def _map(pages: int) -> int:
    address = _libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def _half_unmapped() -> tuple[int, int]:
    address = _map(2)
    assert _libc.munmap(address + PAGE, PAGE) == 0
    return address, 2 * PAGE


def test_what_is_not_memory_is_refused(scene: Scene) -> None:
    regions = scene.alice.statistics().regions
    for name, (make, kind) in MEMORY.items():
        with naming(name):
            refused(lambda: scene.alice.register(make()), kind)  # noqa: B023 - called at once
    assert scene.alice.statistics().regions == regions
    scene.check_unharmed()


def test_arenas_of_impossible_sizes_are_refused(scene: Scene) -> None:
    sizes: list[Any] = [0, -1, -(2**63), 2**62, 2**63, 2**64, 10**30, 1.5, 4096.0, math.nan, "4096", None, []]
    for nbytes in sizes:
        with naming(repr(nbytes)):
            refused(lambda: scene.alice.empty(nbytes), (RangeError, ConfigError))  # noqa: B023 - called at once
    scene.check_unharmed()


def test_arenas_of_other_kinds_are_refused(scene: Scene) -> None:
    kinds: list[Any] = ["vram", "", None, 5, MemoryKind.DRAM, "DRAM"]
    for kind in kinds:
        with naming(repr(kind)):
            refused(lambda: scene.alice.empty(N, kind=kind), (ConfigError, BackendUnavailable))  # noqa: B023
    scene.check_unharmed()


def test_memory_unmapped_after_registration_ends_in_an_error(new_agent: Callable[..., Agent]) -> None:
    """Only process_vm asks the kernel; a plain copy of memory that its owner unmapped ends the process, as in C."""
    alice, bob = new_agent("alice", backends=("shm",)), new_agent("bob", backends=("shm",))
    alice.peer(bob.record())
    kept, address = random_bytes(4 * PAGE), _map(4)
    mine, kept_region = alice.register(np.zeros(4 * PAGE, np.uint8)), bob.register(kept)
    theirs = bob.register(MemorySpan(address, 4 * PAGE)).describe()
    alice.write(mine, theirs).wait(PATIENCE)
    assert _libc.munmap(address + PAGE, 3 * PAGE) == 0
    for action in (lambda: alice.write(mine, theirs), lambda: alice.read(theirs, mine)):
        error = refused(action, RangeError)
        assert "not mapped" in error.message
    alice.write(mine[:PAGE], theirs[:PAGE]).wait(PATIENCE)
    alice.read(kept_region.describe(), mine).wait(PATIENCE)
    assert np.array_equal(mine.array(), kept)
    assert _libc.munmap(address, PAGE) == 0

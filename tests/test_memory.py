"""Memory: what stands behind objects, and arenas that can neither shrink nor run out later."""

from __future__ import annotations

import array
import gc
import mmap
import os
import resource
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from raynixl import ConfigError, MemoryKind, MemorySpan, RangeError
from raynixl.memory import PAGE_NBYTES, allocate, available_nbytes, check_sealed, resolve

pytestmark = pytest.mark.pure


class _Device:
    def __init__(self, **face: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (4, 8), "typestr": "<f4", "data": (4096, False), "version": 3} | face


SOURCES: dict[str, tuple[Callable[[], Any], int, bool]] = {
    "bytes": (lambda: b"12345678", 8, False),
    "bytearray": (lambda: bytearray(8), 8, True),
    "array": (lambda: array.array("d", [1.0, 2.0]), 16, True),
    "numpy": (lambda: np.zeros((3, 5), np.int16), 30, True),
    "fortran": (lambda: np.asfortranarray(np.zeros((3, 5))), 120, True),
    "read-only numpy": (lambda: np.broadcast_to(np.float64(1), (1,)), 8, False),
    "torch": (lambda: torch.zeros(3, 5, dtype=torch.bfloat16), 30, True),
    "torch, 0-d": (lambda: torch.tensor(1.0), 4, True),
    "anonymous mapping": (lambda: mmap.mmap(-1, PAGE_NBYTES), PAGE_NBYTES, True),
    "span": (lambda: MemorySpan(4096, 77, writable=False), 77, False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_memory_is_found_without_a_copy(name: str) -> None:
    make, nbytes, writable = SOURCES[name]
    memory = resolve(make())
    assert (memory.kind, memory.device, memory.nbytes, memory.writable) == (MemoryKind.DRAM, 0, nbytes, writable)
    assert memory.address > 0


def test_memory_on_a_gpu_is_told_by_its_interface() -> None:
    memory = resolve(_Device())
    assert (memory.kind, memory.address, memory.nbytes, memory.writable) == (MemoryKind.VRAM, 4096, 128, True)
    assert not resolve(_Device(data=(4096, True))).writable
    with pytest.raises(ConfigError, match="contiguous"):
        resolve(_Device(strides=(64, 4)))
    with pytest.raises(RangeError):
        resolve(_Device(shape=(0,)))


def test_addresses_are_those_of_the_bytes() -> None:
    data = np.arange(16, dtype=np.uint8)
    assert resolve(data).address == data.ctypes.data
    assert resolve(memoryview(data)[4:]).address == data.ctypes.data + 4
    tensor = torch.arange(16)
    assert resolve(tensor[2:]).address == tensor.data_ptr() + 16


def test_what_is_registered_of_a_parameter_outlives_its_exchange() -> None:
    class Array(np.ndarray):
        """One that can be watched."""

    data = np.arange(16, dtype=np.float32).view(Array)
    parameter, watched = torch.nn.Parameter(torch.from_numpy(data)), weakref.ref(data)
    memory = resolve(parameter)
    parameter.data = torch.zeros(16)
    del data
    gc.collect()
    assert watched() is not None, "peers still write there"
    del memory
    gc.collect()
    assert watched() is None


def test_a_closed_mapping_is_refused() -> None:
    mapping = mmap.mmap(-1, PAGE_NBYTES)
    mapping.close()
    with pytest.raises(ConfigError):
        resolve(mapping)


def test_arenas_are_zero_sealed_and_leave_nothing() -> None:
    for nbytes in (1, PAGE_NBYTES, (2 << 20) + 5):
        memory = allocate(nbytes)
        try:
            check_sealed(memory.fd, nbytes)
            view = np.frombuffer(memory.owner, np.uint8)
            assert len(view) == nbytes
            assert not view.any()
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, 0)
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, nbytes + PAGE_NBYTES)
            with pytest.raises(RangeError, match="smaller"):
                check_sealed(memory.fd, nbytes + 1)
            del view
        finally:
            os.close(memory.fd)


def test_more_than_the_host_has_is_refused_before_it_is_touched() -> None:
    with pytest.raises(RangeError, match="are free"):
        allocate(available_nbytes() * 4)


def test_unsealed_memory_of_a_peer_is_refused() -> None:
    fd = os.memfd_create("raynixl-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE_NBYTES)
        with pytest.raises(RangeError, match="not sealed"):
            check_sealed(fd, PAGE_NBYTES)
    finally:
        os.close(fd)


def test_memory_is_shown_without_the_bytes_behind_it() -> None:
    assert "array" not in repr(resolve(np.zeros(100_000)))


def test_memory_that_finds_no_descriptor_is_refused_with_what_to_do() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(RangeError, match="ulimit -n"):
            allocate(4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

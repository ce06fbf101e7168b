"""What the CUDA driver is asked about memory, with a driver made up: no machine needs a GPU for this."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from cuda_tools import PRIMARY, FakeDriver, Piece

from raynixl import cuda
from raynixl.cuda import FABRIC, POSIX_FD, Origin
from raynixl.errors import ConfigError, RangeError
from raynixl.memory import MemoryKind, resolve

A, B, C = 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F20_0000_0000
MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Three allocations on two GPUs."""
    made = FakeDriver(
        [
            Piece(A, MIB),
            Piece(B, 2 * MIB, device=1, context=0, origin=Origin.VIRTUAL, handle_types=POSIX_FD),
            Piece(C, MIB, device=1, context=0, origin=Origin.POOL, handle_types=FABRIC),
        ]
    )
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(cuda, "_primaries", {})
    return made


@pytest.mark.parametrize(
    ("address", "device", "context", "origin", "handle_types"),
    [
        (A, 0, 0xC0, Origin.MALLOC, 0),
        (B, 1, 0, Origin.VIRTUAL, POSIX_FD),
        (C, 1, 0, Origin.POOL, FABRIC),
    ],
)
@pytest.mark.usefixtures("driver")
def test_the_driver_tells_whose_memory_it_is_and_how_it_was_made(address, device, context, origin, handle_types):
    found = cuda.examine(address + 4096, 4096)
    assert (found.device, found.context, found.origin, found.handle_types) == (device, context, origin, handle_types)
    assert found.start == address


@pytest.mark.usefixtures("driver")
def test_memory_beyond_its_allocation_is_refused():
    cuda.examine(A + 4096, MIB - 4096)
    with pytest.raises(RangeError, match="beyond its allocation"):
        cuda.examine(A + 4096, MIB - 4095)


@pytest.mark.usefixtures("driver")
def test_virtual_memory_may_be_pieced_together():
    assert cuda.examine(B, 64 * MIB).origin is Origin.VIRTUAL


@pytest.mark.usefixtures("driver")
def test_memory_that_is_on_no_gpu_is_refused():
    with pytest.raises(ConfigError, match="on no GPU"):
        cuda.examine(0x1234, 1)


def test_without_a_driver_there_is_no_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "_driver", lambda: None)
    assert not cuda.has_driver()
    assert cuda.bus_id(0) == ""
    assert cuda.device_of(A) == 0
    with pytest.raises(ConfigError, match="driver"):
        cuda.examine(A, 1)


def test_memory_is_worked_on_in_its_own_context_or_the_primary_one_which_is_retained_once(driver):
    assert cuda.context_for(cuda.examine(A, 1)) == 0xC0
    assert driver.retained == []
    assert {cuda.context_for(cuda.examine(one, 1)) for one in (B, C, B)} == {PRIMARY + 1}
    assert driver.retained == [1]


def test_a_context_is_current_meanwhile_and_no_longer(driver):
    with cuda.current(0xC0):
        assert driver.stack == [0xC0]
    assert driver.stack == []
    with pytest.raises(ZeroDivisionError), cuda.current(0xC0):
        _ = 1 // 0
    assert driver.stack == []


def test_a_context_that_was_destroyed_is_an_error(driver):
    driver.is_broken = True
    with pytest.raises(ConfigError, match="CUDA error 1"), cuda.current(0xC0):
        pass


@pytest.mark.usefixtures("driver")
def test_gpus_are_found_on_the_bus():
    assert (cuda.bus_id(1), cuda.bus_id(7)) == ("0000:02:00.0", "")


def _array(address: int, **more: Any) -> Any:
    face = {"shape": (1024,), "typestr": "<f4", "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=face, **more)


@pytest.mark.usefixtures("driver")
def test_arrays_on_a_gpu_are_memory_of_that_gpu():
    cupy_like, numba_like = _array(A, device=SimpleNamespace(id=3)), _array(B)
    for source, device, address in ((cupy_like, 3, A), (numba_like, 1, B)):
        found = resolve(source)
        assert (found.kind, found.device, found.address, found.nbytes) == (MemoryKind.VRAM, device, address, 4096)
        assert found.owner is source

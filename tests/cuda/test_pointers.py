"""What the driver tells of memory: whose it is, how it was made, and what cannot be memory of a GPU."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import Any

import cuda_fake
import pytest
from cuda_fake import PRIMARY, FakeCuda

from raynixl import cuda
from raynixl.cuda import FABRIC, POSIX_FD, Origin
from raynixl.errors import ConfigError, RangeError
from raynixl.memory import MemoryKind, address_of, resolve

pytestmark = pytest.mark.pure

MIB = 1 << 20


@pytest.mark.parametrize(
    ("device", "origin", "handle_types"),
    [
        (0, Origin.MALLOC, 0), (1, Origin.VIRTUAL, POSIX_FD), (1, Origin.VIRTUAL, FABRIC), (1, Origin.POOL, FABRIC),
        (0, Origin.MANAGED, 0),
    ],
)  # fmt: skip
def test_the_driver_tells_whose_memory_it_is_and_how_it_was_made(fake_cuda: FakeCuda, device, origin, handle_types):
    address = fake_cuda.make(MIB, device=device, origin=origin, handle_types=handle_types)
    found = cuda.examine(address + 4096, 4096)
    assert (found.device, found.origin, found.handle_types) == (device, origin, handle_types)
    assert (found.start, found.nbytes) == (address, MIB)
    assert found.context == (0 if origin is Origin.VIRTUAL else PRIMARY + device)


def test_memory_that_is_made_anew_at_the_same_address_has_another_id(fake_cuda: FakeCuda):
    first = fake_cuda.make(MIB)
    before = cuda.examine(first, 1)
    fake_cuda.drop(first)
    assert fake_cuda.make(MIB) == first, "addresses are given again"
    assert cuda.examine(first, 1).buffer_id != before.buffer_id


def test_memory_beyond_its_allocation_is_refused(fake_cuda: FakeCuda):
    address = fake_cuda.make(MIB)
    cuda.examine(address + 4096, MIB - 4096)
    with pytest.raises(RangeError, match="beyond its allocation"):
        cuda.examine(address + 4096, MIB - 4095)
    assert cuda.left_from(address + 4096) == MIB - 4096
    assert cuda.left_from(0x1234) is None


def test_virtual_memory_may_be_pieced_together(fake_cuda: FakeCuda):
    address = fake_cuda.make(0, origin=Origin.VIRTUAL, chunks=(2 * MIB, 2 * MIB))
    assert cuda.examine(address + MIB, 3 * MIB).origin is Origin.VIRTUAL


def test_memory_that_is_on_no_gpu_is_refused(fake_cuda: FakeCuda):
    with pytest.raises(ConfigError, match="on no GPU"):
        cuda.examine(0x1234, 1)
    with mmap.mmap(-1, 4096) as mapping:
        fake_cuda.host.pin(address_of(mapping), 4096).is_users = True
        with pytest.raises(ConfigError, match="on no GPU"):
            cuda.examine(address_of(mapping), 1)


def test_without_a_driver_there_is_no_memory_of_a_gpu(request: pytest.FixtureRequest):
    request.addfinalizer(cuda.replace_driver(None))
    assert not cuda.has_driver()
    assert cuda.devices() == ()
    assert cuda.bus_id(0) == ""
    assert cuda.device_of(4096) == 0
    assert cuda.pinned_address(4096, 1) is None
    with pytest.raises(ConfigError, match="driver"):
        cuda.examine(4096, 1)
    with pytest.raises(ConfigError, match="driver"):
        cuda.arena(1, 0)


def test_memory_is_worked_on_in_its_own_context_or_the_primary_one(fake_cuda: FakeCuda):
    own = fake_cuda.devices.make_context(0)
    assert cuda.context_for(cuda.examine(fake_cuda.make(MIB, context=own), 1)) == own
    virtual = [fake_cuda.make(MIB, device=1, origin=Origin.VIRTUAL) for _ in range(2)]
    assert fake_cuda.devices.retained == []
    assert {cuda.context_for(cuda.examine(one, 1)) for one in virtual} == {PRIMARY + 1}
    assert fake_cuda.devices.retained == [1], "it is retained once"


def test_asking_about_memory_does_not_initialise_cuda():
    fake = cuda_fake.install()
    cuda.examine(fake.make(MIB), 1)
    cuda.device_of(4096)
    cuda.pinned_address(4096, 1)
    assert fake.calls["cuInit"] == 0
    fake.finish()


def test_host_memory_that_its_owner_has_pinned_is_known_and_where_gpus_reach_it(fake_cuda: FakeCuda):
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as mapping:
        address = address_of(mapping)
        assert cuda.pinned_address(address, 1) is None
        pinned = fake_cuda.host.pin(address, 2 * mmap.PAGESIZE)
        beside = fake_cuda.host.pin(address + 2 * mmap.PAGESIZE, mmap.PAGESIZE)
        pinned.is_users = beside.is_users = True
        assert cuda.pinned_address(address + 5, 100) == pinned.device_address + 5
        assert cuda.pinned_address(address, 3 * mmap.PAGESIZE) is None, "pinned in two pieces"
        assert cuda.pinned_address(address + 3 * mmap.PAGESIZE - 1, 2) is None, "its end is not"
        assert cuda.pinned_address(fake_cuda.make(MIB), 1) is None, "memory of a GPU"


def test_where_gpus_reach_pinned_memory_is_asked_in_a_context_since_no_answer_comes_without(fake_cuda: FakeCuda):
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        pinned = fake_cuda.host.pin(address_of(mapping), mmap.PAGESIZE)
        pinned.is_users = True
        fake_cuda.watch(
            "cuPointerGetAttribute", lambda _out, attribute, _at: seen.append((attribute, fake_cuda.devices.stack[:]))
        )
        seen: list[tuple[int, list[int]]] = []
        assert cuda.pinned_address(address_of(mapping), mmap.PAGESIZE) == pinned.device_address
        assert (3, [PRIMARY]) in seen
        assert (3, []) not in seen


def _array(address: int, **more: Any) -> Any:
    face = {"shape": (1024,), "typestr": "<f4", "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=face, **more)


def test_arrays_on_a_gpu_are_memory_of_that_gpu(fake_cuda: FakeCuda):
    first, second = fake_cuda.make(MIB), fake_cuda.make(MIB, device=1)
    cupy_like, numba_like = _array(first, device=SimpleNamespace(id=3)), _array(second)
    for source, device, address in ((cupy_like, 3, first), (numba_like, 1, second)):
        found = resolve(source)
        assert (found.kind, found.device, found.address, found.nbytes) == (MemoryKind.VRAM, device, address, 4096)
        assert found.owner is source


def test_native_code_is_given_the_functions_that_get_and_set_a_context(fake_cuda: FakeCuda):
    get, put = cuda.current_functions()
    seen = ctypes.c_void_p(5)
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(get)(ctypes.addressof(seen)) == 0
    assert seen.value is None
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(put)(fake_cuda.devices.make_context(1)) == 0
    assert len(fake_cuda.devices.stack) == 1
    fake_cuda.devices.stack.clear()

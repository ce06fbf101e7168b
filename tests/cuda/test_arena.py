"""What is owned: arenas on a GPU, pinned host memory, events that follow a user's stream."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_fake import PRIMARY, FakeCuda

from raynixl import cuda
from raynixl.errors import ConfigError, RangeError, TransferTimeout
from raynixl.memory import MemoryKind, address_of, allocate_on, resolve

pytestmark = pytest.mark.pure

MIB, PAGE = 1 << 20, mmap.PAGESIZE


def test_an_arena_is_zeroed_memory_that_torch_and_cupy_can_view(fake_cuda: FakeCuda):
    arena = cuda.arena(1000, 1)
    assert not fake_cuda.view(arena.address, 1000).any()
    face = arena.__cuda_array_interface__
    assert (face["shape"], face["typestr"], face["data"]) == ((1000,), "|u1", (arena.address, False))
    memory = resolve(arena)
    assert (memory.kind, memory.device, memory.address, memory.nbytes) == (MemoryKind.VRAM, 1, arena.address, 1000)
    assert fake_cuda.devices.stack == []


def test_an_arena_shares_its_allocation_with_nothing_that_a_handle_would_lend(fake_cuda: FakeCuda):
    arena = cuda.arena(1000, 0)
    found = cuda.examine(arena.address, 1000)
    assert (found.start, found.nbytes) == (arena.address, 2 * MIB)


def test_an_arena_is_freed_with_its_last_view(fake_cuda: FakeCuda):
    memory = allocate_on(0, 1000)
    view, address = memory.owner.__cuda_array_interface__, memory.address
    assert view["data"][0] == address
    del memory
    gc.collect()
    assert fake_cuda.memory.find(address) is None
    assert fake_cuda.calls["cuMemFree_v2"] == 1


def test_an_arena_is_freed_once_however_often_it_is_closed(fake_cuda: FakeCuda):
    arena = cuda.arena(1000, 0)
    threads = [threading.Thread(target=arena.close) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(5)
    arena.close()
    assert "closed" in repr(arena)
    del arena
    gc.collect()
    assert fake_cuda.calls["cuMemFree_v2"] == 1


def test_an_arena_belongs_to_the_process_that_made_it(fake_cuda: FakeCuda):
    arena = cuda.arena(1000, 0)
    pid = os.fork()
    if pid == 0:
        arena.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert not fake_cuda.view(arena.address, 1000).any()


def test_an_arena_that_cannot_be_zeroed_is_freed(fake_cuda: FakeCuda):
    fake_cuda.fail("cuMemsetD8Async", 1)
    with pytest.raises(ConfigError, match="cuMemsetD8Async"):
        cuda.arena(1000, 0)
    gc.collect()
    assert fake_cuda.leaks() == []


def test_an_arena_on_a_gpu_that_does_nothing_is_a_timeout_and_not_waited_for(fake_cuda: FakeCuda, monkeypatch):
    monkeypatch.setattr(sys.modules["raynixl.cuda.arena"], "_ZERO_SECONDS", 0.05)
    with fake_cuda.held(), pytest.raises(TransferTimeout, match="GPU 0 has not zeroed 1000 bytes"):
        cuda.arena(1000, 0)
    assert fake_cuda.calls["cuMemFree_v2"] == 0, "that would wait for the GPU"
    for block in list(fake_cuda.memory.blocks.values()):
        fake_cuda.drop(block.address)


def test_an_arena_that_a_gpu_has_no_room_for_is_refused(fake_cuda: FakeCuda):
    with pytest.raises(RangeError, match="OUT_OF_MEMORY"):
        allocate_on(1, 100 << 30)
    with pytest.raises(ConfigError, match="GPU 5"):
        allocate_on(5, 100)


def test_host_memory_is_pinned_once_for_all_who_want_it(fake_cuda: FakeCuda):
    with mmap.mmap(-1, 4 * PAGE) as mapping:
        address = address_of(mapping)
        first, second = cuda.pin(address, 4 * PAGE), cuda.pin(address, 4 * PAGE)
        assert fake_cuda.calls["cuMemHostRegister_v2"] == 1
        mapping[10:14] = b"here"
        assert bytes(fake_cuda.view(first.device_address + 10, 4)) == b"here"
        assert first.device_address == second.device_address
        first.close()
        assert cuda.pinned_address(address, 4 * PAGE) == second.device_address
        second.close()
        assert cuda.pinned_address(address, 4 * PAGE) is None
        third = cuda.pin(address, 4 * PAGE)
        third.close()


def test_host_memory_that_its_owner_has_pinned_stays_pinned(fake_cuda: FakeCuda):
    with mmap.mmap(-1, 4 * PAGE) as mapping:
        theirs = fake_cuda.host.pin(address_of(mapping), 4 * PAGE)
        theirs.is_users = True
        pin = cuda.pin(address_of(mapping) + PAGE, PAGE)
        assert pin.device_address == theirs.device_address + PAGE
        pin.close()
        assert fake_cuda.host.ranges == [theirs]


def test_memory_of_which_a_part_is_pinned_already_is_refused(fake_cuda: FakeCuda):
    with mmap.mmap(-1, 4 * PAGE) as mapping:
        theirs = fake_cuda.host.pin(address_of(mapping), PAGE)
        theirs.is_users = True
        with pytest.raises(ConfigError, match="ALREADY_REGISTERED"):
            cuda.pin(address_of(mapping), 4 * PAGE)


def test_pinning_that_fails_halfway_is_undone(fake_cuda: FakeCuda):
    fake_cuda.fail("cuMemHostGetDevicePointer_v2", 1)
    with mmap.mmap(-1, PAGE) as mapping:
        with pytest.raises(ConfigError, match="cuMemHostGetDevicePointer"):
            cuda.pin(address_of(mapping), PAGE)
        assert fake_cuda.host.ranges == []
        cuda.pin(address_of(mapping), PAGE).close()


def test_memory_is_pinned_in_the_context_that_there_is_rather_than_in_a_new_one(fake_cuda: FakeCuda):
    with mmap.mmap(-1, PAGE) as mapping:
        with cuda.on(1):
            pin = cuda.pin(address_of(mapping), PAGE)
        pin.close()
    assert fake_cuda.devices.retained == [1]


def test_streams_of_torch_and_cupy_and_handles_are_streams():
    assert cuda.stream_handle(SimpleNamespace(cuda_stream=77)) == 77
    assert cuda.stream_handle(SimpleNamespace(ptr=78)) == 78
    assert cuda.stream_handle(SimpleNamespace(__cuda_stream__=lambda: (0, 79))) == 79
    assert cuda.stream_handle(np.uint64(80)) == 80


def test_streams_say_whose_they_are_and_numbers_do_not():
    assert cuda.stream_device(SimpleNamespace(cuda_stream=0, device=SimpleNamespace(index=3))) == 3
    assert cuda.stream_device(SimpleNamespace(ptr=0, device_id=2)) == 2
    assert cuda.stream_device(SimpleNamespace(ptr=0, device_id=-1)) is None, "that of whichever GPU is current"
    assert cuda.stream_device(SimpleNamespace(cuda_stream=0, device="cuda")) is None
    assert cuda.stream_device(0) is None


@pytest.mark.parametrize("wrong", [None, "0", 1.5, True, -1, 1 << 64, object()])
def test_what_is_no_stream_is_refused(wrong: object):
    with pytest.raises(ConfigError, match=r"is no stream of CUDA; give a torch\.cuda\.Stream"):
        cuda.stream_handle(wrong)


def test_an_event_comes_after_what_is_on_the_users_stream(fake_cuda: FakeCuda):
    theirs = fake_cuda.work.stream(cuda.primary(1))
    with fake_cuda.held():
        fake_cuda.work.put(theirs, lambda: None)
        event = cuda.record(SimpleNamespace(cuda_stream=theirs), device=0)
        assert event.device == 1, "the stream knows its GPU"
        assert not event.query()
    assert event.query()


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_an_event_on_a_default_stream_is_one_of_the_gpu_that_is_meant(fake_cuda: FakeCuda, stream: int):
    with cuda.on(0):
        event = cuda.record(stream, device=1)
    assert event.device == 1
    assert event.query()
    assert PRIMARY + 1 in {one.context for one in fake_cuda.work.events.events.values()}


def test_events_are_used_again_once_they_are_let_go(fake_cuda: FakeCuda):
    for _ in range(100):
        cuda.record(0, 0).close()
    first = cuda.record(0, 0)
    handle = first.handle
    del first
    gc.collect()
    second, third = cuda.record(0, 0), cuda.record(0, 0)
    assert handle == second.handle != third.handle
    assert fake_cuda.calls["cuEventCreate"] == 2


def test_a_stream_that_was_destroyed_is_an_error(fake_cuda: FakeCuda):
    fake_cuda.fail("cuStreamGetCtx", 400)
    with pytest.raises(Exception, match="give one that is alive"):
        cuda.record(0x1234, 0)


def test_ten_thousand_arenas_pins_and_events_leave_nothing(fake_cuda: FakeCuda, nothing_left):
    with mmap.mmap(-1, PAGE) as mapping, cuda.on(0):
        address, before = address_of(mapping), cuda.memory_info()
        for _ in range(10_000):
            arena, pin = cuda.arena(100, 0), cuda.pin(address, PAGE)
            cuda.record(0, 0).close()
            pin.close()
            arena.close()
        assert cuda.memory_info() == before
    assert [one.partition(" ")[0] for one in fake_cuda.leaks()] == ["event"], "one that waits in its pool"


def test_what_a_lost_context_does_not_take_back_is_said_and_no_error(fake_cuda: FakeCuda, caplog):
    with mmap.mmap(-1, PAGE) as mapping:
        arena, pin = cuda.arena(1000, 0), cuda.pin(address_of(mapping), PAGE)
        fake_cuda.fail("cuMemFree_v2", 700)
        fake_cuda.fail("cuMemHostUnregister", 700)
        arena.close()
        pin.close()
        assert caplog.text.count("memory of a GPU is not given back") == 2
        assert "a kernel has failed" in caplog.text
        fake_cuda.drop(arena.address)
        fake_cuda.host.ranges.clear()


@pytest.mark.parametrize("step", ["cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode"])
def test_a_context_that_cannot_be_entered_any_more_ends_no_letting_go(fake_cuda: FakeCuda, caplog, step: str):
    with mmap.mmap(-1, PAGE) as mapping:
        arena, pin = cuda.arena(1000, 0), cuda.pin(address_of(mapping), PAGE)
        fake_cuda.fail(step, 700, times=2)
        arena.close()
        pin.close()
        assert fake_cuda.devices.stack == []
        if step == "cuCtxPushCurrent_v2":
            assert caplog.text.count("memory of a GPU is not given back") == 2
            fake_cuda.drop(arena.address)
            fake_cuda.host.ranges.clear()


def test_the_end_of_the_process_is_no_failure_to_give_something_back(fake_cuda: FakeCuda, caplog):
    arena = cuda.arena(1000, 0)
    fake_cuda.fail("cuMemFree_v2", 4)
    arena.close()
    assert caplog.text == ""
    fake_cuda.drop(arena.address)

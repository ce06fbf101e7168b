"""Streams, events, copies and kernels: what comes after what, with work that is held or runs late."""

from __future__ import annotations

import mmap
from ctypes import Structure, c_uint32, c_uint64

import numpy as np
import pytest
from cuda_fake import FakeCuda, Mode
from cuda_fixtures import fake_driver

from raynixl import cuda
from raynixl.errors import BackendUnavailable, ConfigError
from raynixl.memory import address_of

pytestmark = pytest.mark.pure

NBYTES = 1000


def test_copies_go_between_gpus_and_pinned_host_memory(fake_cuda: FakeCuda):
    bytes_ = np.random.default_rng(1).integers(0, 256, NBYTES, np.uint8)
    first, second, there = cuda.arena(NBYTES, 0), cuda.arena(NBYTES, 0), cuda.arena(NBYTES, 1)
    with cuda.on(0):
        stream, host = cuda.stream_create(), cuda.host_alloc(2 * NBYTES)
        view = np.frombuffer(cuda.host_bytes(host, 2 * NBYTES), np.uint8)
        view[:NBYTES] = bytes_
        cuda.memcpy_h2d_async(first.address, host, NBYTES, stream)
        cuda.memcpy_d2d_async(second.address, first.address, NBYTES, stream)
        cuda.memcpy_peer_async(there.address, cuda.primary(1), second.address, cuda.primary(0), NBYTES, stream)
        cuda.enable_peer(0, 1)
        cuda.memset_async(second.address, 0, NBYTES, stream)
        cuda.memcpy_async(second.address, there.address, NBYTES, stream)
        cuda.memcpy_d2h_async(host + NBYTES, second.address, NBYTES, stream)
        cuda.stream_synchronize(stream)
        assert cuda.stream_query(stream)
        assert (view[NBYTES:] == bytes_).all()
        cuda.host_free(host)
        cuda.stream_destroy(stream)


def test_a_stream_waits_for_an_event_of_another_and_the_host_does_not(fake_cuda: FakeCuda):
    arena, copy = cuda.arena(NBYTES, 0), cuda.arena(NBYTES, 0)
    with cuda.on(0):
        first, second, event = cuda.stream_create(), cuda.stream_create(is_urgent=True), cuda.event_create()
        with fake_cuda.held():
            cuda.memset_async(arena.address, 9, NBYTES, first)
            cuda.event_record(event, first)
            cuda.stream_wait_event(second, event)
            cuda.memcpy_async(copy.address, arena.address, NBYTES, second)
            assert not cuda.event_query(event)
            assert not cuda.stream_query(second)
        assert cuda.event_query(event)
        assert (fake_cuda.view(copy.address, NBYTES) == 9).all()
        cuda.event_destroy(event)
        cuda.stream_destroy(first)
        cuda.stream_destroy(second)


def test_without_an_event_the_latest_stream_runs_first():
    with fake_driver(mode=Mode.DELAYED) as fake:
        arena, copy = cuda.arena(NBYTES, 0), cuda.arena(NBYTES, 0)
        with cuda.on(0):
            first, second = cuda.stream_create(), cuda.stream_create()
            with fake.held():
                cuda.memset_async(arena.address, 9, NBYTES, first)
                cuda.memcpy_async(copy.address, arena.address, NBYTES, second)
            cuda.stream_synchronize(first)
            cuda.stream_synchronize(second)
            assert not fake.view(copy.address, NBYTES).any(), "an ordering that is missing shows"
            cuda.stream_destroy(first)
            cuda.stream_destroy(second)
        arena.close()
        copy.close()


def test_an_event_that_is_recorded_again_is_waited_for_as_it_was(fake_cuda: FakeCuda):
    is_over: list[bool] = []

    def busy():
        while not is_over:
            yield

    with cuda.on(0):
        first, second, event = cuda.stream_create(), cuda.stream_create(), cuda.event_create()
        with fake_cuda.held():
            cuda.event_record(event, first)
            cuda.stream_wait_event(second, event)
            fake_cuda.work.put(first, busy)
            cuda.event_record(event, first)
            while fake_cuda.step():
                pass
            assert cuda.stream_query(second)
            assert not cuda.event_query(event)
            is_over.append(True)
        cuda.event_synchronize(event)
        cuda.event_destroy(event)
        cuda.stream_destroy(first)
        cuda.stream_destroy(second)


def test_timed_events_take_the_time(fake_cuda: FakeCuda):
    with cuda.on(0):
        stream, first, second = cuda.stream_create(), cuda.event_create(is_timed=True), cuda.event_create(is_timed=True)
        cuda.event_record(first, stream)
        cuda.event_record(second, stream)
        assert cuda.event_elapsed_ms(first, second) >= 0
        untimed = cuda.event_create()
        cuda.event_record(untimed, stream)
        with pytest.raises(ConfigError, match="cuEventElapsedTime"):
            cuda.event_elapsed_ms(first, untimed)
        for event in (first, second, untimed):
            cuda.event_destroy(event)
        cuda.stream_destroy(stream)


def test_a_stream_that_has_failed_says_why(fake_cuda: FakeCuda):
    with cuda.on(0):
        stream = cuda.stream_create()
        fake_cuda.fail("cuStreamQuery", 700)
        with pytest.raises(BackendUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            cuda.stream_query(stream)
        cuda.stream_destroy(stream)


def test_a_stream_tells_whether_it_is_captured_and_what_is_captured_can_run_again(fake_cuda: FakeCuda):
    arena = cuda.arena(8, 0)
    with cuda.on(0):
        stream = cuda.stream_create()
        fake_cuda.work.begin_capture(stream)
        assert cuda.stream_is_capturing(stream)
        cuda.memset_async(arena.address, 5, 8, stream)
        with pytest.raises(ConfigError, match="captured in a CUDA graph"):
            cuda.stream_query(stream)
        graph = fake_cuda.work.end_capture(stream)
        assert not cuda.stream_is_capturing(stream)
        assert not fake_cuda.view(arena.address, 8).any()
        for _ in range(2):
            fake_cuda.view(arena.address, 8)[:] = 0
            graph.launch()
            assert (fake_cuda.view(arena.address, 8) == 5).all()
        cuda.stream_destroy(stream)


def test_what_we_do_breaks_no_graph_that_somebody_captures(fake_cuda: FakeCuda):
    event = cuda.record(0, 0)
    fake_cuda.work.begin_capture(fake_cuda.work.stream(cuda.primary(0)))
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        cuda.pin(address_of(mapping), mmap.PAGESIZE).close()
    cuda.arena(100, 1).close()
    assert event.query()
    with cuda.on(0):
        stream = cuda.stream_create()
        assert cuda.stream_query(stream)
        with cuda.relaxed(), cuda.on(1):
            cuda.host_free(cuda.host_alloc(1))
        cuda.stream_synchronize(stream)
        cuda.stream_destroy(stream)
    assert set(fake_cuda.work._modes.values()) == {0}, "every thread is left as it was"


class Blocks(Structure):
    """An argument by value."""

    _fields_ = (("address", c_uint64), ("count", c_uint32))


def test_a_kernel_gets_its_arguments_as_they_are_when_it_is_launched(fake_cuda: FakeCuda):
    seen: list[tuple[object, ...]] = []

    @fake_cuda.kernel("note", c_uint64, c_uint32, Blocks)
    def note(_gpu, grid, *values):
        seen.append((grid, values[0], values[1], values[2].count))

    with cuda.on(1):
        stream, module = cuda.stream_create(), cuda.module_load(b"code")
        arguments, function = [c_uint64(1 << 40), c_uint32(7), Blocks(1, 3)], cuda.module_function(module, "note")
        with fake_cuda.held():
            for number in range(2):
                arguments[1].value = number
                cuda.launch(function, (4, 2, 1), (256, 1, 1), arguments, stream)
        cuda.module_unload(module)
        cuda.stream_destroy(stream)
    assert seen == [((4, 2, 1), 1 << 40, 0, 3), ((4, 2, 1), 1 << 40, 1, 3)]


def test_a_kernel_that_is_not_in_the_code_is_refused_by_name(fake_cuda: FakeCuda):
    with cuda.on(0):
        module = cuda.module_load(b"code")
        with pytest.raises(BackendUnavailable, match=r"'nobody'.*CUDA_ERROR_NOT_FOUND"):
            cuda.module_function(module, "nobody")
        cuda.module_unload(module)


def test_a_launch_that_fails_raises(fake_cuda: FakeCuda):
    fake_cuda.kernel("nothing")(lambda _gpu, _grid: None)
    with cuda.on(0):
        stream, module = cuda.stream_create(), cuda.module_load(b"code")
        function = cuda.module_function(module, "nothing")
        fake_cuda.fail("cuLaunchKernel", 719)
        with pytest.raises(BackendUnavailable, match="restart this process"):
            cuda.launch(function, (1, 1, 1), (32, 1, 1), [], stream)
        cuda.module_unload(module)
        cuda.stream_destroy(stream)


def test_a_kernel_may_spin_until_somebody_writes_what_it_waits_for(fake_cuda: FakeCuda):
    @fake_cuda.kernel("spin", c_uint64, c_uint64)
    def spin(gpu, _grid, flag, answer):
        while not gpu.view(flag, 1)[0]:
            yield
        gpu.view(answer, 1)[0] = 2

    arena = cuda.arena(2, 0)
    with cuda.on(0), mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        pin, stream, module = cuda.pin(address_of(mapping), mmap.PAGESIZE), cuda.stream_create(), cuda.module_load(b"")
        function = cuda.module_function(module, "spin")
        arguments = [c_uint64(pin.device_address), c_uint64(arena.address)]
        cuda.launch(function, (1, 1, 1), (32, 1, 1), arguments, stream)
        assert not cuda.stream_query(stream)
        mapping[0] = 1
        cuda.stream_synchronize(stream)
        assert fake_cuda.view(arena.address, 1)[0] == 2
        cuda.module_unload(module)
        cuda.stream_destroy(stream)
        pin.close()

"""The fake driver is strict: whatever must not be done with CUDA is found when it is done, and fails the test."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from ctypes import c_uint64

import cuda_fake
import pytest
from cuda_fake import FakeCuda, Mode
from cuda_far import FarCuda

from raynixl import cuda
from raynixl.cuda import Origin
from raynixl.errors import RaynixlError
from raynixl.memory import address_of

pytestmark = pytest.mark.pure

PAGE = mmap.PAGESIZE


@contextlib.contextmanager
def caught(text: str, mode: Mode = Mode.AT_ONCE, **settings: int) -> Iterator[FakeCuda]:
    """What is done meanwhile is a misuse that the end of the test finds."""
    fake = cuda_fake.install(mode=mode, **settings)
    try:
        with contextlib.suppress(RaynixlError), cuda.on(0):
            yield fake
    finally:
        with pytest.raises(AssertionError, match=text):
            fake.finish()
    assert not cuda.has_driver() or cuda.devices() != ()


def test_the_call_that_is_wrong_fails_and_says_what_was_wrong():
    with caught("used after it was freed") as fake:
        address = cuda.alloc(100)
        cuda.free(address)
        with pytest.raises(RaynixlError, match=r"cuMemFree_v2.*used after it was freed"):
            cuda.free(address)
        assert len(fake.misuses) == 1


def test_memory_that_is_never_freed():
    with caught("100 bytes at .* was never freed"):
        cuda.alloc(100)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (cuda.stream_create, "stream .* was never destroyed"),
        (cuda.event_create, "event .* was never destroyed"),
        (lambda: cuda.module_load(b"code"), "module .* was never unloaded"),
        (lambda: cuda.host_alloc(100), "stay pinned"),
    ],
)
def test_other_things_that_are_never_given_back(make, text: str):
    with caught(text):
        make()


def test_host_memory_that_stays_pinned():
    with mmap.mmap(-1, PAGE) as mapping, caught("stay pinned"):
        cuda.host_register(address_of(mapping), PAGE)


def test_a_context_that_stays_pushed():
    with caught("left contexts"):
        cuda.on(1).__enter__()
        cuda.on(0).__enter__()


def test_a_copy_from_memory_that_was_freed():
    with caught("used after it was freed"):
        stream, first, second = cuda.stream_create(), cuda.alloc(100), cuda.alloc(200)
        cuda.free(first)
        cuda.memcpy_async(second, first, 100, stream)


def test_a_kernel_that_works_with_memory_that_was_freed():
    with caught("kernel reads: .*used after it was freed", Mode.HELD) as fake:
        table, used = cuda.alloc(8), cuda.alloc(100)
        fake.view(table, 8).view("u8")[0] = used

        @fake.kernel("reads", c_uint64)
        def reads(gpu, _grid, at):
            gpu.view(int(gpu.view(at, 8).view("u8")[0]), 100)

        module = cuda.module_load(b"code")
        cuda.launch(
            cuda.module_function(module, "reads"), (1, 1, 1), (32, 1, 1), [c_uint64(table)], cuda.stream_create()
        )
        cuda.free(used)


def test_memory_that_is_freed_while_a_copy_needs_it():
    with caught("freed while a copy of 100 bytes is in flight", Mode.HELD):
        stream, first, second = cuda.stream_create(), cuda.alloc(100), cuda.alloc(200)
        cuda.memcpy_async(second, first, 100, stream)
        cuda.free(first)


def test_memory_that_is_freed_while_a_kernel_has_its_address():
    with caught("freed while kernel nothing is in flight", Mode.HELD) as fake:
        fake.kernel("nothing", c_uint64)(lambda _gpu, _grid, _at: None)
        address, stream, module = cuda.alloc(100), cuda.stream_create(), cuda.module_load(b"code")
        function = cuda.module_function(module, "nothing")
        cuda.launch(function, (1, 1, 1), (32, 1, 1), [c_uint64(address + 10)], stream)
        cuda.free(address)


def test_pinned_memory_that_is_let_go_while_a_copy_needs_it():
    with mmap.mmap(-1, PAGE) as mapping, caught("let go while a copy", Mode.HELD):
        pin, target = cuda.pin(address_of(mapping), PAGE), cuda.alloc(PAGE)
        cuda.memcpy_h2d_async(target, pin.address, PAGE, cuda.stream_create())
        pin.close()


def test_pinned_memory_that_is_unmapped_before_it_is_unpinned():
    mapping = mmap.mmap(-1, PAGE)
    with caught("unmapped before it was unpinned"):
        pin = cuda.pin(address_of(mapping), PAGE)
        mapping.close()
        pin.close()


def test_a_copy_of_host_memory_that_is_not_pinned():
    with mmap.mmap(-1, PAGE) as mapping, caught("is not pinned"):
        cuda.memcpy_h2d_async(cuda.alloc(PAGE), address_of(mapping), PAGE, cuda.stream_create())


def test_a_kernel_that_has_the_hosts_address_of_pinned_memory():
    with caught("uses the host's address") as fake:
        fake.kernel("reads", c_uint64)(lambda gpu, _grid, at: gpu.view(at, 8))
        function = cuda.module_function(cuda.module_load(b"code"), "reads")
        cuda.launch(function, (1, 1, 1), (32, 1, 1), [c_uint64(cuda.host_alloc(8))], cuda.stream_create())


def test_an_event_that_is_waited_for_and_was_never_recorded():
    with caught("never recorded"):
        cuda.stream_wait_event(cuda.stream_create(), cuda.event_create())
    with caught("never recorded"):
        cuda.event_query(cuda.event_create())
    with caught("never recorded"):
        cuda.event_synchronize(cuda.event_create())


def test_an_event_or_stream_that_was_destroyed():
    with caught("event .* was destroyed"):
        event = cuda.event_create()
        cuda.event_destroy(event)
        cuda.event_query(event)
    with caught("stream .* was destroyed"):
        stream = cuda.stream_create()
        cuda.stream_destroy(stream)
        cuda.stream_query(stream)


def test_work_in_another_context_than_its_stream():
    with caught("is used in"):
        stream, address = cuda.stream_create(), cuda.alloc(100)
        with cuda.on(1):
            cuda.memset_async(address, 0, 100, stream)


def test_an_event_recorded_on_a_stream_of_another_context():
    with caught("stream of another context"):
        event = cuda.event_create()
        with cuda.on(1):
            cuda.event_record(event, cuda.stream_create())


def test_a_kernel_in_another_context_than_it_was_loaded_in():
    with caught("another context than it was loaded in") as fake:
        fake.kernel("nothing")(lambda _gpu, _grid: None)
        function = cuda.module_function(cuda.module_load(b"code"), "nothing")
        with cuda.on(1):
            cuda.launch(function, (1, 1, 1), (32, 1, 1), [], cuda.stream_create())


def test_a_thread_without_a_context():
    with caught("no context is current") as fake:
        thread = threading.Thread(target=_try_to_allocate)
        thread.start()
        thread.join(10)
        assert fake.misuses


def _try_to_allocate() -> None:
    with contextlib.suppress(RaynixlError):
        cuda.alloc(1)


def test_memory_of_a_gpu_that_the_context_does_not_reach():
    with caught("does not reach"):
        with cuda.on(1):
            theirs = cuda.alloc(100)
        cuda.memset_async(theirs, 0, 100, cuda.stream_create())


@pytest.mark.parametrize("origin", [Origin.VIRTUAL, Origin.POOL])
def test_memory_that_peer_access_does_not_extend_to(origin: Origin):
    with caught("does not reach") as fake:
        theirs, plain, stream = (
            fake.make(4096, device=1, origin=origin),
            fake.make(4096, device=1),
            cuda.stream_create(),
        )
        cuda.enable_peer(0, 1)
        cuda.memset_async(plain, 0, 100, stream)
        assert not fake.misuses
        cuda.memset_async(theirs, 0, 100, stream)


def test_memory_of_a_hidden_gpu_in_another_context_than_it_was_opened_in():
    with FarCuda(visible=(5,)) as far:
        far.ask("arena", name="a", nbytes=4096)
        key = far.ask("key", name="a")
        with caught("does not reach"):
            address = cuda.ipc_open(bytes.fromhex(key["handle"]))
            cuda.enable_peer(1, 0)
            with cuda.on(1):
                cuda.memset_async(address, 0, 100, cuda.stream_create())


def test_work_on_the_default_stream():
    with caught("default stream"):
        cuda.memset_async(cuda.alloc(100), 0, 100, 0)


def test_waiting_for_the_whole_device():
    with caught("whole device") as fake:
        assert fake.cuCtxSynchronize() != 0


@pytest.mark.parametrize("breaks", [lambda: cuda.alloc(1), lambda: cuda.event_query(1), lambda: cuda.host_alloc(1)])
def test_what_breaks_a_capture_of_another_thread(breaks):
    with caught("breaks the CUDA graph") as fake:
        fake.work.begin_capture(fake.work.stream(cuda.primary(0)))
        mode = ctypes.c_int(0)
        assert fake.cuThreadExchangeStreamCaptureMode(ctypes.addressof(mode)) == 0
        try:
            breaks()
        finally:
            assert fake.cuThreadExchangeStreamCaptureMode(ctypes.addressof(mode)) == 0


def test_bytes_beyond_an_allocation():
    with caught("go beyond memory of 100 bytes"):
        cuda.memset_async(cuda.alloc(100), 0, 101, cuda.stream_create())


def test_a_handle_that_is_opened_in_the_process_that_made_it():
    with caught("in the process that made it"):
        cuda.ipc_open(cuda.ipc_export(cuda.alloc(100)))


def test_work_that_never_ends():
    with caught("work never ends: kernel spins") as fake:
        stream, module = cuda.stream_create(), cuda.module_load(b"code")

        @fake.kernel("spins")
        def spins(_gpu, _grid):
            while True:
                yield

        fake.work.patience = 0.1
        cuda.launch(cuda.module_function(module, "spins"), (1, 1, 1), (1, 1, 1), [], stream)
        with pytest.raises(RaynixlError, match="does not end"):
            cuda.stream_synchronize(stream)


def test_addresses_of_a_gpu_mean_nothing_to_the_host():
    fake = cuda_fake.install()
    address, state = fake.make(4096), ctypes.create_string_buffer(1)
    page = ctypes.c_void_p(address)
    assert ctypes.CDLL(None).mincore(page, ctypes.c_size_t(1), state) != 0, "nothing is mapped there"
    fake.finish()


def test_what_is_right_is_no_misuse():
    fake = cuda_fake.install(mode=Mode.DELAYED)
    with cuda.on(0):
        first, second, stream = cuda.alloc(100), cuda.alloc(100), cuda.stream_create()
        cuda.memset_async(first, 7, 100, stream)
        cuda.memcpy_d2d_async(second, first, 100, stream)
        cuda.stream_synchronize(stream)
        assert bytes(fake.view(second, 100)) == b"\7" * 100
        cuda.free(first)
        cuda.free(second)
        cuda.stream_destroy(stream)
    fake.finish()

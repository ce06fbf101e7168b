"""CUDA IPC between two processes, each with a fake driver: memory, events, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cuda_fake
import pytest
from cuda_fake import FakeCuda
from cuda_far import FarCuda

from raynixl import cuda
from raynixl.errors import BackendUnavailable, RaynixlError

pytestmark = pytest.mark.pure

NBYTES = 5000


@pytest.fixture
def far() -> Iterator[FarCuda]:
    """Another process with GPUs, and an arena `a` there."""
    with FarCuda() as other:
        other.ask("arena", name="a", nbytes=NBYTES)
        yield other


def handle_of(far: FarCuda, name: str = "a") -> bytes:
    return bytes.fromhex(far.ask("key", name=name)["handle"])


def test_both_processes_see_the_same_bytes_at_addresses_of_their_own(fake_cuda: FakeCuda, far: FarCuda):
    far.ask("fill", name="a", offset=100, text="theirs")
    with cuda.on(0):
        address = cuda.ipc_open(handle_of(far))
        assert bytes(fake_cuda.view(address + 100, 6)) == b"theirs"
        fake_cuda.view(address + 200, 4)[:] = list(b"ours")
        assert far.ask("read", name="a", offset=200, nbytes=4) == "ours"
        cuda.ipc_close(address)


def test_memory_of_a_process_that_was_killed_can_be_used_and_closed_but_not_opened(
    fake_cuda: FakeCuda, far: FarCuda, nothing_left
):
    far.ask("fill", name="a", offset=0, text="last words")
    handle = handle_of(far)
    with cuda.on(0):
        address = cuda.ipc_open(handle)
        far.kill()
        assert bytes(fake_cuda.view(address, 10)) == b"last words"
        cuda.ipc_close(address)
        with pytest.raises(BackendUnavailable, match="its owner has ended or freed it"):
            cuda.ipc_open(handle)


def test_memory_that_was_freed_is_not_opened(fake_cuda: FakeCuda, far: FarCuda):
    handle = handle_of(far)
    far.ask("free", name="a")
    far.ask("arena", name="b", nbytes=NBYTES)
    with cuda.on(0), pytest.raises(BackendUnavailable, match=r"CUDA_ERROR_INVALID_VALUE \(1\)"):
        cuda.ipc_open(handle)


def test_a_handle_that_is_opened_twice_is_a_misuse(far: FarCuda):
    fake, handle = cuda_fake.install(), handle_of(far)
    with cuda.on(0):
        cuda.ipc_open(handle)
        with pytest.raises(RaynixlError, match="opened twice"):
            cuda.ipc_open(handle)
    with pytest.raises(AssertionError, match=r"opened twice for one GPU(.|\n)*memory of a peer of .* was never closed"):
        fake.finish()


def test_memory_of_a_peer_that_is_used_after_it_was_closed_is_a_misuse(far: FarCuda):
    fake = cuda_fake.install()
    with cuda.on(0):
        address = cuda.ipc_open(handle_of(far))
        cuda.ipc_close(address)
        for misuse in (lambda: cuda.ipc_close(address), lambda: cuda.ipc_export(address)):
            with pytest.raises(RaynixlError, match="used after it was closed"):
                misuse()
    with pytest.raises(AssertionError, match="used after it was closed"):
        fake.finish()


def test_memory_of_a_peer_is_closed_in_the_context_it_was_opened_in_and_not_freed(far: FarCuda):
    fake = cuda_fake.install()
    with cuda.on(0):
        address = cuda.ipc_open(handle_of(far))
        with cuda.on(1), contextlib.suppress(RaynixlError):
            cuda.ipc_close(address)
        with contextlib.suppress(RaynixlError):
            cuda.free(address)
        cuda.ipc_close(address)
    with pytest.raises(AssertionError, match=r"another context(.|\n)*not freed by cuMemFree"):
        fake.finish()


def test_a_stream_here_waits_for_an_event_there(fake_cuda: FakeCuda, far: FarCuda):
    with cuda.on(0):
        arena, stream = cuda.arena(10, 0), cuda.stream_create()
        event = cuda.ipc_open_event(bytes.fromhex(far.ask("event", name="e")))
        cuda.stream_wait_event(stream, event)
        cuda.memset_async(arena.address, 6, 10, stream)
        assert not cuda.event_query(event)
        assert not cuda.stream_query(stream)
        far.ask("release", name="e")
        cuda.stream_synchronize(stream)
        assert (fake_cuda.view(arena.address, 10) == 6).all()
        cuda.event_destroy(event)
        cuda.stream_destroy(stream)


def test_an_event_that_is_not_shared_is_not_exported_and_no_event_is_opened_from_memory():
    fake = cuda_fake.install()
    with cuda.on(0):
        event = cuda.event_create()
        with pytest.raises(RaynixlError, match="not made for other processes"):
            cuda.ipc_export_event(event)
        with pytest.raises(BackendUnavailable, match="cuIpcOpenEventHandle"):
            cuda.ipc_open_event(bytes(64))
    with pytest.raises(AssertionError, match="not made for other processes"):
        fake.finish()

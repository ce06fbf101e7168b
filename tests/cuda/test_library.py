"""Errors of CUDA: each is typed, names what CUDA calls it, and says what to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading

import cuda_fake
import pytest
from cuda_fake import FakeCuda

from raynixl import cuda
from raynixl.cuda.library import current_driver
from raynixl.errors import BackendUnavailable, ConfigError, RangeError, RaynixlError

pytestmark = pytest.mark.pure

GIB = 1 << 30


def test_memory_that_a_gpu_does_not_have_is_a_range_error(fake_cuda: FakeCuda):
    with pytest.raises(
        RangeError, match=rf"cuMemAlloc_v2 of {64 * GIB} bytes.*CUDA_ERROR_OUT_OF_MEMORY \(2\).*free memory"
    ):
        cuda.arena(64 * GIB, 0)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (1, ConfigError, r"CUDA_ERROR_INVALID_VALUE \(1\)"),
        (3, BackendUnavailable, "does not live through a fork"),
        (46, BackendUnavailable, "for itself alone"),
        (201, ConfigError, "destroyed or reset"),
        (700, BackendUnavailable, "restart this process"),
        (802, BackendUnavailable, "nvidia-fabricmanager"),
        (803, BackendUnavailable, "different versions"),
        (900, ConfigError, "captured in a CUDA graph"),
        (12345, BackendUnavailable, "CUDA error 12345"),
    ],
)
def test_an_error_of_cuda_says_what_to_do(fake_cuda: FakeCuda, code: int, kind: type[RaynixlError], says: str):
    fake_cuda.fail("cuMemAlloc_v2", code)
    with cuda.on(0), pytest.raises(kind, match=says) as caught:
        cuda.alloc(1)
    assert "cuMemAlloc" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_driver_that_is_too_old_for_something_says_so(fake_cuda: FakeCuda):
    del fake_cuda.cuMemGetInfo_v2
    with pytest.raises(BackendUnavailable, match="no cuMemGetInfo_v2; update the driver"):
        cuda.memory_info()


def test_without_a_driver_every_call_says_so(request: pytest.FixtureRequest):
    request.addfinalizer(cuda.replace_driver(None))
    with pytest.raises(BackendUnavailable, match=r"libcuda\.so\.1"):
        cuda.memory_info()


def test_cuda_does_not_live_through_a_fork(fake_cuda: FakeCuda):
    arena = cuda.arena(100, 0)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            cuda.alloc(1)
        except BackendUnavailable as exc:
            os.write(writing, str(exc).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert "spawn" in said.read()
    os.waitpid(pid, 0)
    arena.close()


def test_a_child_does_not_wait_for_what_another_thread_of_its_parent_was_doing(fake_cuda: FakeCuda):
    cuda.primary(0)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with current_driver().lock, current_driver().making:
            taken.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        with contextlib.suppress(BackendUnavailable):
            cuda.kept("mover", lambda: cuda.primary(0))
            os._exit(1)
        os._exit(0)
    done.set()
    thread.join(10)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_a_process_keeps_is_made_once_and_not_met_by_another_driver(fake_cuda: FakeCuda):
    closed: list[str] = []

    class Kept:
        def close(self) -> None:
            closed.append("closed")

    first = cuda.kept("mover", Kept)
    assert cuda.kept("mover", Kept) is first
    other = cuda_fake.install()
    assert cuda.kept("mover", Kept) is not first
    other.finish()
    assert closed == ["closed"]
    assert cuda.kept("mover", Kept) is first

"""GPUs and contexts: which there are, which one a thread works in, and what that costs."""

from __future__ import annotations

import threading

import cuda_fake
import pytest
from cuda_fake import PRIMARY, FakeCuda

from raynixl import cuda
from raynixl.errors import BackendUnavailable, ConfigError

pytestmark = pytest.mark.pure


def test_gpus_are_known_by_what_they_are_whatever_their_numbers_here():
    both = cuda_fake.install(gpus=2)
    uuids = [one.uuid for one in cuda.devices()]
    both.finish()
    one = cuda_fake.install(visible=(1,))
    assert [(seen.index, seen.uuid) for seen in cuda.devices()] == [(0, uuids[1])]
    one.finish()


def test_gpus_are_found_on_the_bus(fake_cuda: FakeCuda):
    assert (cuda.bus_id(1), cuda.bus_id(7)) == ("0000:02:00.0", "")


def test_a_driver_without_gpus_sees_none_and_says_so_when_one_is_wanted():
    fake = cuda_fake.install(visible=())
    assert cuda.devices() == ()
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        cuda.primary(0)
    fake.finish()


def test_a_gpu_that_is_not_there_is_refused_by_name(fake_cuda: FakeCuda):
    with pytest.raises(ConfigError, match=r"GPU 7.*CUDA_ERROR_INVALID_DEVICE"):
        cuda.primary(7)


def test_a_context_is_current_meanwhile_and_no_longer(fake_cuda: FakeCuda):
    with cuda.on(1):
        assert fake_cuda.devices.stack == [PRIMARY + 1]
        with cuda.on(0), cuda.on(1):
            assert fake_cuda.devices.stack == [PRIMARY + 1, PRIMARY, PRIMARY + 1]
        assert fake_cuda.devices.stack == [PRIMARY + 1]
    assert fake_cuda.devices.stack == []
    with pytest.raises(ZeroDivisionError), cuda.on(1):
        _ = 1 // 0
    assert fake_cuda.devices.stack == []


def test_the_context_that_is_current_already_is_not_pushed_again(fake_cuda: FakeCuda):
    with cuda.on(1), cuda.on(1), cuda.on(1):
        assert fake_cuda.devices.stack == [PRIMARY + 1]
    assert fake_cuda.calls["cuCtxPushCurrent_v2"] == 1


def test_a_primary_context_is_retained_once_by_many_threads(fake_cuda: FakeCuda):
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(5)
        cuda.primary(0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    assert fake_cuda.devices.retained == [0]


def test_a_context_that_was_destroyed_is_an_error_that_says_so(fake_cuda: FakeCuda):
    fake_cuda.devices.is_broken = True
    with (
        pytest.raises(ConfigError, match=r"CUDA_ERROR_INVALID_CONTEXT \(201\).*destroyed or reset"),
        cuda.current(0xC0),
    ):
        pass
    assert fake_cuda.devices.stack == []


def test_gpus_reach_each_other_once_that_was_asked_for(fake_cuda: FakeCuda):
    for _ in range(3):
        cuda.enable_peer(0, 1)
        cuda.enable_peer(0, 0)
    assert fake_cuda.devices.peers == {(PRIMARY, PRIMARY + 1)}
    assert fake_cuda.calls["cuCtxEnablePeerAccess"] == 1


def test_somebody_else_may_have_asked_for_peer_access_before(fake_cuda: FakeCuda):
    fake_cuda.devices.peers.add((PRIMARY, PRIMARY + 1))
    cuda.enable_peer(0, 1)


def test_gpus_without_a_way_to_each_other_are_named():
    fake = cuda_fake.install(has_peer_access=False)
    with pytest.raises(BackendUnavailable, match=r"GPU 0 does not reach the memory of GPU 1.*nvidia-smi topo"):
        cuda.enable_peer(0, 1)
    fake.finish()


def test_attributes_of_a_gpu_are_read(fake_cuda: FakeCuda):
    assert cuda.device_attribute(1, 16) == 132
    assert cuda.device_of_context(cuda.primary(1)) == 1
    assert cuda.device_of_context(fake_cuda.devices.make_context(1)) == 1


def test_a_thread_works_with_the_gpu_of_its_context_or_with_one_that_is_in_use(fake_cuda: FakeCuda):
    assert cuda.device_here() == 0
    assert fake_cuda.devices.retained == [], "asking makes no context"
    with cuda.on(1):
        assert cuda.device_here() == 1
    assert cuda.device_here() == 1
    with cuda.on(0):
        assert cuda.device_here() == 0


def test_a_kernel_that_has_failed_is_told_by_what_is_asked_and_not_by_the_asking(fake_cuda: FakeCuda):
    fake_cuda.fail("cuThreadExchangeStreamCaptureMode", 700)
    fake_cuda.fail("cuMemGetInfo_v2", 700)
    with cuda.on(0), pytest.raises(BackendUnavailable, match=r"cuMemGetInfo.*ILLEGAL_ADDRESS"):
        cuda.memory_info()
    assert fake_cuda.devices.stack == []
    assert set(fake_cuda.work._modes.values()) <= {0}

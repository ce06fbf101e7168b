"""Importing memory of other processes' GPUs: opened once, counted, closed with the last user, never confused."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cuda_fake import PRIMARY, FakeCuda
from cuda_fake_memory import Block
from cuda_far import FarCuda
from cuda_fixtures import fake_driver

from raynixl import cuda
from raynixl.backends.nvlink_import import ImportCache, read_key
from raynixl.cuda import FABRIC
from raynixl.errors import BackendUnavailable, ConfigError, IntegrityError, RegionStale
from raynixl.memory import address_of

MIB = 1 << 20
CYCLES = 10_000


@pytest.fixture
def far() -> Iterator[FarCuda]:
    """Another process with GPUs, and an arena `a` there."""
    with FarCuda() as other:
        other.ask("arena", name="a", nbytes=MIB)
        yield other


def test_regions_of_one_allocation_share_what_is_opened_once(fake_cuda: FakeCuda, far: FarCuda):
    cache = ImportCache()
    keys = [far.ask("key", name="a", offset=offset) for offset in (0, 4096, 4096)]
    opened = [cache.open(key, 100, 0) for key in keys]
    assert fake_cuda.calls["cuIpcOpenMemHandle_v2"] == 1
    assert [one.address - opened[0].address for one in opened] == [0, 4096, 4096]
    far.ask("fill", name="a", offset=4096, text="part")
    for one in opened[:2]:
        one.close()
        one.close()
    assert bytes(fake_cuda.view(opened[2].address, 4)) == b"part"
    opened[2].close()
    assert (len(cache), fake_cuda.leaks()) == (0, [])
    assert "closed" in repr(opened[2])


def test_ten_thousand_openings_leave_nothing_on_either_side(fake_cuda: FakeCuda, far: FarCuda, nothing_left):
    cache, key = ImportCache(), far.ask("key", name="a")
    with cuda.on(0):
        before = cuda.memory_info()
        for number in range(CYCLES):
            one = cache.open(key, MIB, 0)
            if number % 3 == 0:
                cache.open(key, MIB, 0).close()
            one.close()
        assert cuda.memory_info() == before
    assert fake_cuda.calls["cuIpcOpenMemHandle_v2"] == fake_cuda.calls["cuIpcCloseMemHandle"] == CYCLES
    assert (len(cache), fake_cuda.leaks()) == (0, [])


def test_threads_that_open_and_close_at_once_do_not_open_twice(fake_cuda: FakeCuda, far: FarCuda):
    cache, key, start, wrong = ImportCache(), far.ask("key", name="a"), threading.Barrier(6), []

    def work() -> None:
        start.wait(10)
        for _ in range(200):
            one = cache.open(key, MIB, 0)
            wrong.extend([one] if fake_cuda.memory.find(one.address) is None else [])
            one.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert not any(one.is_alive() for one in threads)
    assert (wrong, len(cache), fake_cuda.leaks()) == ([], 0, [])


def test_a_context_that_cannot_be_entered_any_more_ends_no_letting_go(fake_cuda: FakeCuda, far: FarCuda, caplog):
    cache = ImportCache()
    one = cache.open(far.ask("key", name="a"), MIB, 0)
    fake_cuda.fail("cuCtxPushCurrent_v2", 700)
    one.close()
    assert len(cache) == 0
    assert "memory of a GPU is not given back" in caplog.text
    with cuda.on(0):
        cuda.ipc_close(one.address)


def test_a_forked_child_closes_nothing_of_its_parents(fake_cuda: FakeCuda, far: FarCuda):
    one = ImportCache().open(far.ask("key", name="a"), MIB, 0)
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        pin = cuda.pin(address_of(mapping), mmap.PAGESIZE)
        before, pid = fake_cuda.calls.total(), os.fork()
        if pid == 0:
            one.close()
            pin.close()
            os._exit(int(fake_cuda.calls.total() > before))
        assert os.waitpid(pid, 0)[1] == 0
        assert cuda.pinned_address(address_of(mapping), mmap.PAGESIZE) == pin.device_address
        pin.close()
    assert not fake_cuda.view(one.address, MIB).any()
    one.close()


def test_memory_that_a_peer_freed_and_made_anew_is_not_taken_for_what_it_was():
    with fake_driver() as fake, FarCuda(repeats_handles=True) as far:
        cache = ImportCache()
        far.ask("arena", name="a", nbytes=MIB)
        before = far.ask("key", name="a")
        held = cache.open(before, MIB, 0)
        far.ask("free", name="a")
        far.ask("arena", name="b", nbytes=MIB)
        far.ask("fill", name="b", offset=0, text="new")
        after = far.ask("key", name="b")
        assert after["handle"] == before["handle"], "what the driver cannot tell apart"
        with pytest.raises(RegionStale, match="must deregister memory before freeing it"):
            cache.open(after, MIB, 0)
        held.close()
        again = cache.open(after, MIB, 0)
        assert bytes(fake.view(again.address, 3)) == b"new"
        again.close()


def test_a_handle_that_another_process_has_had_is_refused_while_that_is_open(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    held = cache.open(key, MIB, 0)
    with pytest.raises(RegionStale):
        cache.open({**key, "process": "that lives now"}, MIB, 0)
    held.close()
    cache.open(key, MIB, 0).close()


def test_a_restarted_peer_is_another_owner(fake_cuda: FakeCuda, far: FarCuda):
    cache, before = ImportCache(), far.ask("key", name="a")
    first = cache.open(before, MIB, 0)
    far.kill()
    with FarCuda() as restarted:
        restarted.ask("arena", name="a", nbytes=MIB)
        restarted.ask("fill", name="a", offset=0, text="new")
        key = restarted.ask("key", name="a")
        assert key["process"] != before["process"]
        second = cache.open(key, MIB, 0)
        assert bytes(fake_cuda.view(second.address, 3)) == b"new"
        assert not fake_cuda.view(first.address, MIB).any(), "the dead one's memory is still there"
        first.close()
        second.close()


def test_memory_of_a_dead_peer_is_closed_without_harm_and_not_opened(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    held = cache.open(key, MIB, 0)
    far.kill()
    held.close()
    with pytest.raises(BackendUnavailable, match="its owner has ended"):
        cache.open(key, MIB, 0)
    assert (len(cache), fake_cuda.leaks()) == (0, [])


def test_memory_is_opened_in_the_context_of_its_own_gpu_whatever_its_number_here():
    with FarCuda() as far, fake_driver(visible=(1, 0)) as fake:
        far.ask("arena", name="a", nbytes=MIB, device=1)
        one = ImportCache().open(far.ask("key", name="a"), MIB, 1)
        assert one.device == 0, "the far side's second GPU is the first here"
        assert fake.devices.retained == [0]
        one.close()


def test_memory_of_a_gpu_that_is_hidden_here_is_opened_in_the_home_context():
    with FarCuda(visible=(1,)) as far, fake_driver(visible=(0,)) as fake:
        far.ask("arena", name="a", nbytes=MIB)
        far.ask("fill", name="a", offset=0, text="far")
        one = ImportCache().open(far.ask("key", name="a"), MIB, 0)
        assert one.device == 0
        assert bytes(fake.memory.view(one.address, 3, PRIMARY)) == b"far"
        one.close()


def test_memory_of_a_hidden_gpu_is_opened_once_for_each_gpu_that_works_with_it():
    with FarCuda(visible=(5,)) as far, fake_driver() as fake:
        far.ask("arena", name="a", nbytes=MIB)
        cache, key = ImportCache(), far.ask("key", name="a")
        opened = [cache.open(key, MIB, home) for home in (0, 1, 1)]
        assert [one.device for one in opened] == [0, 1, 1]
        assert [fake.memory.at(one.address).context for one in opened] == [PRIMARY, PRIMARY + 1, PRIMARY + 1]
        for one in opened:
            one.close()
        assert (len(cache), fake.leaks()) == (0, [])


def test_chunks_on_a_fabric_are_mapped_side_by_side(fake_cuda: FakeCuda, nothing_left):
    with FarCuda() as far:
        sizes = (2 * MIB, 4 * MIB, 2 * MIB)
        address = far.ask("make", nbytes=0, origin="VIRTUAL", chunks=sizes, handle_types=FABRIC)
        far.ask("fill_at", address=address + 6 * MIB, text="over there")
        cache = ImportCache()
        key = far.ask("key_at", address=address + 6 * MIB - 5, nbytes=MIB)
        one, two = cache.open(key, MIB, 0), cache.open(key, MIB, 0)
        assert fake_cuda.calls["cuMemAddressReserve"] == 1
        assert bytes(fake_cuda.memory.view(one.address, 15, PRIMARY))[5:] == b"over there"
        one.close()
        two.close()
        assert (len(cache), fake_cuda.leaks()) == (0, [])
        assert fake_cuda.calls["cuMemAddressFree"] == 1


@pytest.mark.parametrize("step", ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"])
def test_chunks_that_cannot_be_mapped_leave_nothing(fake_cuda: FakeCuda, step: str):
    with FarCuda() as far:
        address = far.ask("make", nbytes=0, origin="VIRTUAL", chunks=(2 * MIB, 2 * MIB), handle_types=FABRIC)
        key, cache = far.ask("key_at", address=address, nbytes=4 * MIB), ImportCache()
        fake_cuda.fail(step, 801)
        with pytest.raises(BackendUnavailable, match=step):
            cache.open(key, MIB, 0)
        assert (len(cache), fake_cuda.leaks()) == (0, [])
        cache.open(key, MIB, 0).close()


def test_memory_that_its_owner_cannot_export_is_refused_with_the_setting(fake_cuda: FakeCuda):
    with FarCuda() as far:
        address = far.ask("make", nbytes=2 * MIB, origin="VIRTUAL")
        with pytest.raises(BackendUnavailable, match="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"):
            ImportCache().open(far.ask("key_at", address=address, nbytes=MIB), MIB, 0)


def test_an_opening_that_fails_is_tried_anew(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    fake_cuda.fail("cuIpcOpenMemHandle_v2", 2)
    with pytest.raises(BackendUnavailable, match="cuIpcOpenMemHandle"):
        cache.open(key, MIB, 0)
    cache.open(key, MIB, 0).close()
    with pytest.raises(ConfigError, match="GPU 9"):
        cache.open({**key, "uuid": "0" * 32}, MIB, 9)
    assert len(cache) == 0


def test_memory_that_is_smaller_than_its_key_says_is_refused_and_closed(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    with pytest.raises(IntegrityError, match="smaller than its key says"):
        cache.open({**key, "size": 64 * MIB}, 32 * MIB, 0)
    assert (len(cache), fake_cuda.leaks()) == (0, [])


def test_a_lie_about_memory_that_is_open_already_is_found_and_closes_nothing(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    honest = cache.open(key, MIB, 0)
    for lie in ({"size": 64 * MIB, "offset": 32 * MIB}, {"size": 2 * MIB + 1, "offset": 2 * MIB}):
        with pytest.raises(IntegrityError, match="smaller than its key says"):
            cache.open({**key, **lie}, 1, 0)
    assert not fake_cuda.view(honest.address, MIB).any()
    honest.close()
    assert (len(cache), fake_cuda.leaks()) == (0, [])


def test_a_lie_does_not_reach_what_lies_behind_a_peers_memory(fake_cuda: FakeCuda, far: FarCuda):
    cache, key = ImportCache(), far.ask("key", name="a")
    honest = cache.open(key, MIB, 0)
    behind = Block(0, PRIMARY, 2 * MIB, address=honest.address + 2 * MIB, is_users=True)
    fake_cuda.memory.add(behind)
    with pytest.raises(IntegrityError, match="smaller than its key says"):
        cache.open({**key, "size": 4 * MIB}, 3 * MIB, 0)
    fake_cuda.drop(behind.address)
    honest.close()


def test_chunks_that_another_key_has_mapped_are_no_longer_for_a_lie(fake_cuda: FakeCuda):
    with FarCuda() as far:
        address = far.ask("make", nbytes=0, origin="VIRTUAL", chunks=(2 * MIB,), handle_types=FABRIC)
        key, cache = far.ask("key_at", address=address, nbytes=MIB), ImportCache()
        honest = cache.open(key, MIB, 0)
        with pytest.raises(IntegrityError, match="smaller than its key says"):
            cache.open({**key, "chunks": str(8 * MIB), "size": 8 * MIB}, 3 * MIB, 0)
        honest.close()


GOOD: dict[str, Any] = {"uuid": "f0", "process": "p", "handle": "00" * 64, "offset": 0, "size": MIB, "buffer": 1}
CHUNKED: dict[str, Any] = {
    "uuid": "f0",
    "process": "p",
    "fabric": "00" * 128,
    "chunks": "2,3",
    "offset": 0,
    "size": 5,
    "buffer": 1,
}


def test_keys_are_read():
    assert read_key(GOOD, MIB).handles == (bytes(64),)
    assert read_key(CHUNKED, 5).sizes == (2, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {**GOOD, "uuid": 5}, {**GOOD, "process": 5}, {**GOOD, "handle": "00" * 63}, {**GOOD, "handle": "zz" * 64},
        {**GOOD, "handle": "00" * 128}, {**GOOD, "handle": 7}, {**GOOD, "offset": -1}, {**GOOD, "offset": 1},
        {**GOOD, "offset": 1 << 70}, {**GOOD, "offset": True}, {**GOOD, "size": "1"}, {**GOOD, "size": 1 << 60},
        {**GOOD, "size": MIB - 1}, {**GOOD, "buffer": None}, {**CHUNKED, "chunks": "2"}, {**CHUNKED, "chunks": "2,3,4"},
        {**CHUNKED, "chunks": "2,x"}, {**CHUNKED, "chunks": "0,5"}, {**CHUNKED, "chunks": "2,-3"},
        {**CHUNKED, "chunks": ["2", "3"]}, {**CHUNKED, "fabric": "00" * 64 * 17}, {**CHUNKED, "fabric": ""},
        {**CHUNKED, "chunks": "2,\u0663"}, {**CHUNKED, "size": 6},
    ],
)  # fmt: skip
def test_keys_that_are_none_are_refused(wrong: dict[str, Any]):
    with pytest.raises(IntegrityError, match="malformed"):
        read_key(wrong, 5 if "fabric" in wrong else MIB)

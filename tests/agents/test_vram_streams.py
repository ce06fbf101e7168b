"""Order between transfers and streams of CUDA, on a made-up driver that delays and reorders what it may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent
from agent_tools import KIB, PATIENCE, error_of, eventually, introduce, random_bytes
from cuda_fake import Mode
from vram_process import far_vram
from vram_tools import content, gpu_agent, made_up_gpus, make_region

from raynixl import Agent, ConfigError, Region, TransferCancelled, TransferTimeout, cuda
from raynixl.agents.prepared import Prepared
from raynixl.agents.transfer import settle_seconds
from raynixl.backends.nvlink import NvlinkBackend

N = 64 * KIB


class Stream:
    """A stream of the user's own, on GPU 0, as torch shows one; and what is put on it."""

    def __init__(self) -> None:
        with cuda.on(0):
            self.cuda_stream = cuda.stream_create()

    def copy(self, source: Region, target: Region) -> None:
        """Copy a region into another, in the stream's order."""
        with cuda.on(0):
            cuda.memcpy_async(target.memory.address, source.memory.address, source.nbytes, self.cuda_stream)

    def synchronize(self) -> None:
        """Wait for all of it."""
        with cuda.on(0):
            cuda.stream_synchronize(self.cuda_stream)

    def close(self) -> None:
        """Give it back."""
        with cuda.on(0):
            cuda.stream_destroy(self.cuda_stream)


@pytest.fixture
def gpus() -> Iterator[Any]:
    """A made-up driver that runs work later, and streams in an unkind order."""
    with made_up_gpus(mode=Mode.DELAYED) as fake:
        yield fake


@pytest.fixture
def near(gpus: Any) -> Iterator[Agent]:
    """The agent of this process."""
    with gpu_agent("near") as agent:
        yield agent


@pytest.fixture(scope="module")
def process() -> Iterator[FarAgent]:
    """The process of the far agent, which outlives our made-up drivers."""
    with far_vram("far") as started:
        yield started


@pytest.fixture
def far(near: Agent, process: FarAgent) -> Iterator[FarAgent]:
    """The agent of another process."""
    near.peer(process.record)
    process.ask("region", name="theirs", nbytes=N, memory="vram", seed=2)
    yield process
    process.ask("drop")


@pytest.fixture
def new_stream(gpus: Any) -> Iterator[Callable[[], Stream]]:
    """Make streams that are given back with the test."""
    made: list[Stream] = []

    def make() -> Stream:
        made.append(Stream())
        return made[-1]

    yield make
    for stream in made:
        stream.synchronize()
        stream.close()


def seen(far: FarAgent) -> np.ndarray:
    """The bytes of the far region."""
    return np.frombuffer(bytes.fromhex(far.ask("content", name="theirs")), np.uint8)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_a_write_follows_what_is_on_its_stream(
    near: Agent, far: FarAgent, new_stream: Callable[[], Stream], is_first: bool
) -> None:
    fresh, mine, stream = make_region(near, "vram", N, seed=5), make_region(near, "vram", N, seed=6), new_stream()
    plan = near.prepare("write", mine, near.peer("far")["theirs"])
    if not is_first:
        plan.post().wait(PATIENCE)
    for _ in range(5):
        stream.copy(mine, fresh)
        stream.copy(fresh, mine)
    other = make_region(near, "vram", N, seed=7)
    stream.copy(other, mine)
    plan.post(stream=stream).wait(PATIENCE)
    assert np.array_equal(seen(far), random_bytes(N, 7))


def test_a_post_with_a_stream_does_not_wait_for_it(
    gpus: Any, near: Agent, far: FarAgent, new_stream: Callable[[], Stream]
) -> None:
    mine, other, stream = make_region(near, "vram", N, seed=5), make_region(near, "vram", N, seed=6), new_stream()
    plan = near.prepare("write", mine, near.peer("far")["theirs"])
    plan.post().wait(PATIENCE)
    with gpus.held():
        stream.copy(other, mine)
        transfer = plan.post(stream=stream)
        assert not transfer.done
    transfer.wait(PATIENCE)
    assert np.array_equal(seen(far), random_bytes(N, 6))


def test_a_stream_that_waits_for_a_read_sees_its_bytes_and_the_host_waits_for_neither(
    gpus: Any, near: Agent, far: FarAgent, new_stream: Callable[[], Stream]
) -> None:
    mine, copy, stream = make_region(near, "vram", N), make_region(near, "vram", N), new_stream()
    plan = near.prepare("read", near.peer("far")["theirs"], mine)
    plan.post().wait(PATIENCE)
    far.ask("fill", name="theirs", value=4)
    with gpus.held():
        transfer = plan.post(stream=stream)
        transfer.wait(stream=stream)
        assert not transfer.done
        stream.copy(mine, copy)
    stream.synchronize()
    assert (content(copy) == 4).all()
    transfer.wait(PATIENCE)


def test_transfers_and_kernels_take_turns_on_one_stream(
    near: Agent, far: FarAgent, new_stream: Callable[[], Stream]
) -> None:
    stream, remote = new_stream(), near.peer("far")["theirs"]
    cells = [make_region(near, "vram", N, seed=seed) for seed in range(1, 4)]
    mine = make_region(near, "vram", N)
    write = near.prepare("write", mine, remote)
    back = make_region(near, "vram", N)
    read = near.prepare("read", remote, back)
    write.post().wait(PATIENCE)
    results = [make_region(near, "vram", N) for _ in cells]
    for cell, result in zip(cells, results, strict=True):
        stream.copy(cell, mine)
        write.post(stream=stream).wait(stream=stream)
        read.post(stream=stream).wait(stream=stream)
        stream.copy(back, result)
    stream.synchronize()
    for seed, result in enumerate(results, start=1):
        assert np.array_equal(content(result), random_bytes(N, seed))


@pytest.mark.parametrize("sort", ["arena", "user"])
def test_host_memory_follows_streams_too(
    near: Agent, far: FarAgent, new_stream: Callable[[], Stream], sort: str
) -> None:
    stream, mine, on_gpu = new_stream(), make_region(near, sort, N), make_region(near, "vram", N, seed=9)
    remote = near.peer("far")["theirs"]
    near.read(remote, mine).wait(PATIENCE)
    near.write(on_gpu, remote, stream=stream).wait(stream=stream)
    near.read(remote, mine, stream=stream).wait(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(N, 9))


def test_where_the_host_takes_part_a_wait_with_a_stream_waits_here(
    gpus: Any, near: Agent, far: FarAgent, new_stream: Callable[[], Stream]
) -> None:
    mine, stream = make_region(near, "user", N), new_stream()
    plan = near.prepare("read", near.peer("far")["theirs"], mine)
    plan.post().wait(PATIENCE)
    with gpus.held():
        transfer = plan.post()
        waiting = threading.Thread(target=transfer.wait, kwargs={"stream": stream})
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive(), "the stream cannot wait for the host"
    waiting.join(PATIENCE)
    assert transfer.done
    assert np.array_equal(content(mine), random_bytes(N, 2))


def test_what_needs_no_gpu_follows_a_stream_by_a_thread(gpus: Any, new_stream: Callable[[], Stream]) -> None:
    with gpu_agent("alice", backends=("shm",)) as alice, gpu_agent("bob", backends=("shm",)) as bob:
        introduce(alice, bob)
        mine, theirs = make_region(alice, "arena", N, seed=1), make_region(bob, "arena", N, name="theirs")
        stream, plan = new_stream(), alice.prepare("write", mine, alice.peer("bob")["theirs"])
        for is_bound in (False, True):
            theirs.array()[:] = 0
            with cuda.on(0):
                pin = cuda.pin(mine.memory.address, N)
            with gpus.held():
                with cuda.on(0):
                    host = cuda.host_alloc(N)
                    cuda.host_bytes(host, N)[:] = bytes([5 + is_bound]) * N
                    cuda.memcpy_async(pin.device_address, host, N, stream.cuda_stream)
                transfer = plan.post(stream=stream)
                assert not transfer.done
                threading.Event().wait(0.02)
                assert not theirs.array().any()
            transfer.wait(PATIENCE)
            assert (theirs.array() == 5 + is_bound).all()
            stream.synchronize()
            with cuda.on(0):
                cuda.host_free(host)
            pin.close()


def test_a_stream_that_stays_busy_ends_the_transfer_at_its_deadline_and_the_memory_is_held(
    gpus: Any, near: Agent, far: FarAgent, new_stream: Callable[[], Stream]
) -> None:
    mine, other, stream = make_region(near, "vram", N, seed=5), make_region(near, "vram", N, seed=6), new_stream()
    plan = near.prepare("write", mine, near.peer("far")["theirs"])
    plan.post().wait(PATIENCE)
    with gpus.held():
        stream.copy(other, mine)
        transfer = plan.post(stream=stream, timeout=0.1)
        eventually(lambda: transfer.done, "the deadline ends it")
        assert isinstance(transfer.error, TransferTimeout)
        assert mine.gate.inflight == 1
        assert all(settle_seconds(job) < 0.1 for job in transfer.jobs)  # and who waits hears of it without the GPU
        assert isinstance(error_of(transfer), TransferTimeout)
    eventually(lambda: mine.gate.inflight == 0, "the gate is left when the GPU is through")


def test_a_transfer_that_ends_while_it_is_being_started_does_not_overtake_its_stream(
    gpus: Any, near: Agent, far: FarAgent, new_stream: Callable[[], Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other, stream = make_region(near, "vram", N, seed=5), make_region(near, "vram", N, seed=6), new_stream()
    near.write(other, near.peer("far")["theirs"]).wait(PATIENCE)
    run_all, begun = Prepared._run_all, threading.Event()

    def late(plan: Prepared, route: Any, transfer: Any) -> None:
        threading.Thread(target=transfer.cancel).start()
        eventually(lambda: transfer.done, "it is cancelled")
        run_all(plan, route, transfer)
        begun.set()

    monkeypatch.setattr(Prepared, "_run_all", late)
    monkeypatch.setattr(NvlinkBackend, "is_ready", lambda *_: False)  # so that another thread starts it
    with gpus.held():
        stream.copy(other, mine)
        transfer = near.prepare("write", mine, near.peer("far")["theirs"]).post(stream=stream)
        assert begun.wait(PATIENCE)
        assert isinstance(transfer.error, TransferCancelled)
        while gpus.step():
            continue
    eventually(lambda: mine.gate.inflight == 0, "the GPU is through")
    assert np.array_equal(seen(far), random_bytes(N, 6)), "it moved what was there before"


@pytest.mark.parametrize("wrong", ["stream", 1.5, -1, object(), True])
def test_what_is_no_stream_is_refused(near: Agent, far: FarAgent, wrong: Any) -> None:
    mine, remote = make_region(near, "vram", N), near.peer("far")["theirs"]
    with pytest.raises(ConfigError):
        near.write(mine, remote, stream=wrong)
    with pytest.raises(ConfigError):
        near.prepare("write", mine, remote).post(stream=wrong)
    transfer = near.write(mine, remote)
    with pytest.raises(ConfigError):
        transfer.wait(stream=wrong)
    transfer.wait(PATIENCE)


@pytest.mark.parametrize("device", [0, 1])
def test_the_default_stream_is_followed_by_its_number(gpus: Any, near: Agent, far: FarAgent, device: int) -> None:
    mine = make_region(near, "vram", N, seed=5, device=device)

    def overwrite() -> None:
        gpus.view(mine.memory.address, N)[:] = random_bytes(N, 6)

    plan = near.prepare("write", mine, near.peer("far")["theirs"])
    plan.post().wait(PATIENCE)
    with gpus.held():
        with cuda.on(device):
            gpus.work.put(0, overwrite)
        transfer = plan.post(stream=0)
        while gpus.step():  # the latest first, where nothing is waited for
            continue
    transfer.wait(PATIENCE)
    assert np.array_equal(seen(far), random_bytes(N, 6))


def test_an_arena_is_pinned_and_a_gpu_made_ready_by_no_thread_that_posts(gpus: Any, near: Agent, far: FarAgent) -> None:
    remote, threads = near.peer("far")["theirs"], []
    for name in ("cuMemHostRegister_v2", "cuModuleLoadData"):
        gpus.watch(name, lambda *_arguments: threads.append(threading.current_thread().name))
    near.write(make_region(near, "vram", N), remote).wait(PATIENCE)
    near.write(make_region(near, "arena", N), remote).wait(PATIENCE)
    near.read(remote, make_region(near, "vram", N, device=1)).wait(PATIENCE)
    assert len(threads) >= 3
    assert set(threads) == {"raynixl-connect"}

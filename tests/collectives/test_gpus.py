"""Groups whose buffers are on GPUs: every operation and mixture of memories, and the order of streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from agent_tools import random_bytes
from cuda_fake import Mode
from cuda_fixtures import fake_driver
from vram_tools import Piece, content, make_region

from raynixl import AgentConfig, BackendUnavailable, ConfigError, TransferTimeout
from raynixl.agents import past
from tests.collectives.members import Members, in_threads
from tests.collectives.operations import all_operations_on_gpus, broadcast_on_gpus

N = 1 << 16
CONFIG = AgentConfig(backends=("shm", "nvlink"), copy_threads=2)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A made-up driver that runs work later, and streams in an unkind order; each thread has a stream of its own."""
    with fake_driver(mode=Mode.DELAYED, delay=0.005) as fake:
        fake.local = threading.local()
        monkeypatch.setattr(past, "current_streams", lambda _gpu: [stream_of(fake)])
        yield fake


def stream_of(fake: Any) -> int:
    """This thread's current stream of GPU 0."""
    if not hasattr(fake.local, "stream"):
        fake.local.stream = fake.work.stream(fake.devices.retain(0))
    return int(fake.local.stream)


def put_later(fake: Any, region: Any, value: int, stream: int | None = None) -> None:
    """Have this thread's stream fill a region with a value, a while later than other streams would do anything."""
    address, nbytes, due = region.memory.address, region.nbytes, time.monotonic() + 0.15

    def fill() -> Iterator[None]:
        while time.monotonic() < due:
            yield
        fake.view(address, nbytes)[:] = value

    fake.work.put(stream_of(fake) if stream is None else stream, fill)


@pytest.mark.parametrize("sorts", [("vram",), ("vram", "arena"), ("arena", "vram", "user"), ("user", "vram")])
@pytest.mark.parametrize("world", [1, 3])
def test_every_operation_moves_the_right_bytes_between_threads(fake_cuda: Any, world: int, sorts: Any) -> None:
    ranks = in_threads(world, lambda group: all_operations_on_gpus([group], sorts), config=CONFIG)
    assert ranks == list(range(world))


@pytest.mark.parametrize("algorithm", ["direct", "chain"])
@pytest.mark.parametrize("sorts", [("vram",), ("vram", "arena", "vram", "user")])
def test_broadcast_between_threads(fake_cuda: Any, algorithm: str, sorts: Any) -> None:
    work = lambda group: broadcast_on_gpus([group], 1, algorithm, 20_000_003, sorts)  # noqa: E731
    assert all(in_threads(4, work, config=CONFIG))


def test_between_processes() -> None:
    with Members(3, backends=("shm", "nvlink"), copy_threads=2) as members:
        for sorts, algorithm in ((("vram",), "chain"), (("vram", "arena"), "direct")):
            heard = members.run(broadcast_on_gpus, 1, algorithm, 9_000_001, sorts)
            assert heard == [(True, "", "")] * 3
            assert members.run(all_operations_on_gpus, sorts) == [(rank, "", "") for rank in range(3)]


def test_buffers_on_two_gpus_of_one_member(fake_cuda: Any) -> None:
    def work(group: Any) -> bool:
        source = make_region(group.agent, "vram", N, seed=group.rank + 1, device=0)
        out = make_region(group.agent, "vram", 2 * N, device=1)
        group.allgather(source, out)
        return bool((content(out) == np.concatenate([random_bytes(N, 1), random_bytes(N, 2)])).all())

    assert in_threads(2, work, config=CONFIG) == [True, True]


def test_a_members_own_part_may_lie_in_place(fake_cuda: Any) -> None:
    def work(group: Any) -> bool:
        out = make_region(group.agent, "vram", 2 * N, seed=7)
        mine = Piece(out, group.rank * N, N)
        own = content(out)[group.rank * N : (group.rank + 1) * N]
        group.allgather(mine, out)
        return bool((content(out)[group.rank * N : (group.rank + 1) * N] == own).all())

    assert in_threads(2, work, config=CONFIG) == [True, True]


def test_a_member_that_works_with_one_gpu_makes_no_context_on_another(fake_cuda: Any) -> None:
    address = fake_cuda.make(N, device=1)
    face = {"version": 3, "typestr": "|u1", "shape": (N,), "data": (address, False), "stream": None}

    def work(group: Any) -> None:
        source, out = (
            make_region(group.agent, "arena", N, seed=3),
            group.agent.register(SimpleNamespace(__cuda_array_interface__=face)),
        )
        group.allgather(source, out)

    in_threads(1, work, config=CONFIG)
    assert np.array_equal(fake_cuda.view(address, N), random_bytes(N, 3))
    assert set(fake_cuda.devices.retained) == {1}
    fake_cuda.drop(address)


@pytest.mark.parametrize("algorithm", ["direct", "chain"])
def test_what_threads_have_put_on_their_streams_comes_first(gpus: Any, algorithm: str) -> None:
    def work(group: Any) -> list[int]:
        region = make_region(group.agent, "vram", N)
        group.barrier()
        put_later(gpus, region, 10 + group.rank)  # the root's kernel, and those that still use receivers' buffers
        group.broadcast(region, 1, algorithm=algorithm)
        return sorted(set(content(region).tolist()))

    assert in_threads(3, work, config=CONFIG) == [[11]] * 3


def test_both_buffers_of_an_operation_follow_their_streams(gpus: Any) -> None:
    def work(group: Any) -> list[int]:
        source, out = (make_region(group.agent, "vram", size) for size in (N, 2 * N))
        group.barrier()
        put_later(gpus, source, 5 + group.rank)
        put_later(gpus, out, 99)
        group.allgather(source, out)
        found = sorted(set(content(out).tolist()))
        mine = make_region(group.agent, "vram", N)
        put_later(gpus, out, 7)
        put_later(gpus, mine, 99)
        group.scatter(out, mine, 0)
        found += sorted(set(content(mine).tolist()))
        put_later(gpus, mine, 8)
        put_later(gpus, out, 99)
        group.gather(mine, out, 1)
        return found + (sorted(set(content(out).tolist())) if group.rank == 1 else [])

    assert in_threads(2, work, config=CONFIG) == [[5, 6, 7], [5, 6, 7, 8]]


def test_a_stream_can_be_named(gpus: Any) -> None:
    def work(group: Any) -> list[int]:
        region = make_region(group.agent, "vram", N)
        stream = gpus.work.stream(gpus.devices.retain(0))
        group.barrier()
        put_later(gpus, region, 10 + group.rank, stream)
        group.broadcast(region, 0, stream=stream)
        return sorted(set(content(region).tolist()))

    assert in_threads(2, work, config=CONFIG) == [[10]] * 2


def test_from_event_loops_the_streams_of_the_loop_count(gpus: Any) -> None:
    def work(group: Any) -> list[int]:
        async def main() -> list[int]:
            region, out = (make_region(group.agent, "vram", size) for size in (N, 2 * N))
            await group.barrier_async()
            put_later(gpus, region, 10 + group.rank)
            await group.broadcast_async(region, 1)
            found = sorted(set(content(region).tolist()))
            put_later(gpus, region, 20 + group.rank)
            await group.allgather_async(region, out)
            return found + sorted(set(content(out).tolist()))

        return asyncio.run(main())

    assert in_threads(2, work, config=CONFIG) == [[11, 20, 21]] * 2


def test_a_stream_that_does_not_end_is_told_of_in_time(gpus: Any) -> None:
    def work(group: Any) -> bool:
        region = make_region(group.agent, "vram", N)
        with gpus.held():
            put_later(gpus, region, 3)
            with pytest.raises(TransferTimeout, match="GPU 0") as caught:
                group.broadcast(region, timeout=0.2)
        return "nvidia-smi" in caught.value.hint

    assert in_threads(1, work, config=CONFIG) == [True]


@pytest.mark.parametrize("stream", ["stream", -1, True])
def test_what_is_no_stream_is_refused(fake_cuda: Any, stream: Any) -> None:
    def work(group: Any) -> None:
        region = make_region(group.agent, "vram", N)
        with pytest.raises(ConfigError, match="no stream"):
            group.broadcast(region, stream=stream)

    in_threads(1, work, config=CONFIG)


def test_host_buffers_ask_no_gpu_for_anything(fake_cuda: Any) -> None:
    def work(group: Any) -> None:
        group.broadcast(np.zeros(N, np.uint8))
        group.allgather(np.zeros(3, np.uint8), np.zeros(6, np.uint8))

    in_threads(2, work, config=AgentConfig(backends=("shm",)))
    assert not fake_cuda.calls


def test_without_a_backend_that_copies_on_gpus_it_is_said_which_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from silent_tools import OnGpu, SilentBackend

    from raynixl.backends.table import offered

    def work(group: Any) -> None:
        with pytest.raises(BackendUnavailable, match="nvlink"):
            group.allgather(OnGpu(N), OnGpu(N))

    monkeypatch.setattr(past, "current_streams", lambda _gpu: [])
    with offered("silent", SilentBackend):
        in_threads(1, work, config=AgentConfig(backends=("shm", "silent")))

"""Order between transfers over nvlink and work on streams, without the host waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_far import PATIENCE, digest, fill, registered, some_bytes
from gpu_tools import Far, Fars, has_cuda_torch

from raynixl import Agent, ConfigError, TransferTimeout

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

MIB = 1 << 20
BACKENDS = ("nvlink", "shm")
SPIN = r"""
extern "C" __global__ void spin(long long ns) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while ((long long)(now - began) < ns);
}
"""


@pytest.fixture
def near(make_near: Callable[..., Agent]) -> Agent:
    """The agent of this process."""
    return make_near(backends=BACKENDS)


@pytest.fixture
def far(fars: Fars) -> Far:
    """The far process."""
    return fars(backends=list(BACKENDS))


def spin(stream: Any, seconds: float) -> None:
    """Keep a stream busy for a while."""
    import cupy

    cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(seconds * 1e9),), stream=stream)


def new_stream() -> Any:
    """A stream that waits for nobody."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def test_a_write_follows_what_is_on_the_stream(near: Agent, far: Far, fars: Fars) -> None:
    name, stream = fars.name(), new_stream()
    far.ask("make", name=name, kind="vram", nbytes=8 * MIB)
    mine = registered(near, "vram", 8 * MIB, 1)
    plan = near.prepare("write", mine, near.peer(far.record)[name])
    plan.post().wait(PATIENCE)
    spin(stream, 0.0)
    with stream:
        mine.cupy()[:] = 6  # compiled at first use
    stream.synchronize()
    began = time.monotonic()
    spin(stream, 0.2)
    with stream:
        mine.cupy()[:] = 7
    transfer = plan.post(stream=stream)
    assert time.monotonic() - began < 0.15, "the host waited for the stream"
    assert not transfer.done
    transfer.wait(PATIENCE)
    assert far.ask("digest", name=name) == digest(np.full(8 * MIB, 7, np.uint8))
    far.ask("drop", name=name)


def test_the_first_write_to_a_peer_follows_the_stream_as_well(near: Agent, far: Far, fars: Fars) -> None:
    name, stream = fars.name(), new_stream()
    far.ask("make", name=name, kind="vram", nbytes=MIB)
    mine = registered(near, "vram", MIB, 1)
    remote = near.peer(far.record)[name]
    spin(stream, 0.5)
    with stream:
        mine.cupy()[:] = 9
    near.write(mine, remote, stream=stream).wait(PATIENCE)
    assert far.ask("digest", name=name) == digest(np.full(MIB, 9, np.uint8))
    far.ask("drop", name=name)


def test_a_stream_that_waits_for_a_read_sees_its_bytes(near: Agent, far: Far, fars: Fars) -> None:
    import cupy

    name, ahead, behind = fars.name(), new_stream(), new_stream()
    far.ask("make", name=name, kind="vram", nbytes=16 * MIB, seed=3)
    mine = registered(near, "vram", 16 * MIB, 0)
    plan = near.prepare("read", near.peer(far.record)[name], mine)
    plan.post().wait(PATIENCE)
    mine.cupy()[:] = 0
    seen = cupy.empty(16 * MIB, cupy.uint8)
    seen[:] = mine.cupy()  # compiled at first use
    cupy.cuda.Stream.null.synchronize()
    began = time.monotonic()
    spin(ahead, 0.2)
    transfer = plan.post(stream=ahead)
    transfer.wait(stream=behind)
    with behind:
        seen[:] = mine.cupy()
    assert time.monotonic() - began < 0.15, "the host waited"
    behind.synchronize()
    assert np.array_equal(seen.get(), some_bytes(16 * MIB, 3))
    transfer.wait(PATIENCE)
    far.ask("drop", name=name)


@pytest.mark.parametrize("kind", ["arena", "host"])
def test_host_memory_follows_streams_too(near: Agent, far: Far, fars: Fars, kind: str) -> None:
    name, stream = fars.name(), new_stream()
    far.ask("make", name=name, kind="vram", nbytes=MIB, seed=1)
    mine, staging = registered(near, kind, MIB, 0), registered(near, "vram", MIB, 4)
    remote = near.peer(far.record)[name]
    spin(stream, 0.2)
    near.write(staging, remote, stream=stream).wait(stream=stream)
    near.read(remote, mine, stream=stream).wait(PATIENCE)
    assert np.array_equal(mine.array(), some_bytes(MIB, 4))
    far.ask("drop", name=name)


def test_streams_of_torch_are_followed(near: Agent, far: Far, fars: Fars) -> None:
    if not has_cuda_torch():
        pytest.skip("needs torch with CUDA")
    import torch

    name, stream = fars.name(), torch.cuda.Stream()
    far.ask("make", name=name, kind="vram", nbytes=MIB)
    tensor = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.current_stream().synchronize()
    mine = near.register(tensor)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tensor.fill_(5)
        near.write(mine, near.peer(far.record)[name], stream=stream).wait(stream=stream)
        tensor.fill_(6)
    stream.synchronize()
    assert far.ask("digest", name=name) == digest(np.full(MIB, 5, np.uint8))
    far.ask("drop", name=name)


def test_a_deadline_that_passes_while_the_stream_is_busy_is_an_error_and_the_gpu_goes_on(
    near: Agent, far: Far, fars: Fars
) -> None:
    name, stream = fars.name(), new_stream()
    far.ask("make", name=name, kind="vram", nbytes=MIB)
    mine = registered(near, "vram", MIB, 1)
    plan = near.prepare("write", mine, near.peer(far.record)[name])
    plan.post().wait(PATIENCE)
    spin(stream, 0.3)
    transfer = plan.post(stream=stream, timeout=0.05)
    with pytest.raises(TransferTimeout):
        transfer.wait(PATIENCE)
    near.deregister(mine)
    far.ask("drop", name=name)


@pytest.mark.parametrize("is_list", [False, True], ids=["one block", "a list"])
def test_a_graph_moves_the_present_bytes_at_each_replay(near: Agent, far: Far, fars: Fars, is_list: bool) -> None:
    name, stream, block = fars.name(), new_stream(), 4096
    far.ask("make", name=name, kind="vram", nbytes=MIB)
    mine, remote = registered(near, "vram", MIB, 1), near.peer(far.record)[name]
    order = np.random.default_rng(5).permutation(MIB // block)
    target = remote.pages(order, block) if is_list else remote
    plan = near.prepare("write", mine, target)
    plan.post().wait(PATIENCE)
    stream.begin_capture()
    captured = plan.capture(stream)
    graph = stream.end_capture()
    with captured:
        for turn in (2, 3):
            fill(mine, turn)
            graph.launch(stream)
            stream.synchronize()
            assert captured.runs == turn - 1
            wanted = some_bytes(MIB, turn).reshape(-1, block)
            if is_list:
                wanted[order] = wanted.copy()
            assert far.ask("digest", name=name) == digest(wanted.reshape(-1))
    far.ask("drop", name=name)


def test_what_is_no_stream_is_refused(near: Agent, far: Far, fars: Fars) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="vram", nbytes=MIB)
    mine, remote = registered(near, "vram", MIB, 1), near.peer(far.record)[name]
    for wrong in ("stream", -1, 1.5, object()):
        with pytest.raises(ConfigError):
            near.write(mine, remote, stream=wrong)
    transfer = near.write(mine, remote)
    with pytest.raises(ConfigError):
        transfer.wait(stream="stream")
    transfer.wait(PATIENCE)
    far.ask("drop", name=name)

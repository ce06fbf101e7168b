"""Transfers inside CUDA graphs, on a made-up driver: they run at each replay, and hold their memory until closed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent
from agent_tools import KIB, PATIENCE, eventually, introduce, random_bytes
from vram_process import far_vram
from vram_tools import content, gpu_agent, make_region

from raynixl import Agent, ConfigError, RegionStale, cuda
from raynixl.agents.captured import _OPEN
from raynixl.testing.contents import put

N = 64 * KIB


@pytest.fixture
def near(gpus: Any) -> Iterator[Agent]:
    """The agent of this process."""
    with gpu_agent("near", deregister_timeout=1.0) as agent:
        yield agent


@pytest.fixture(scope="module")
def process() -> Iterator[FarAgent]:
    """The process of the far agent."""
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
def capture(gpus: Any) -> Callable[[Callable[[int], Any]], tuple[Any, Any]]:
    """Capture what a function puts on a stream; return the graph and what the function returned."""
    stream = gpus.work.stream(cuda.primary(0))

    def run(put_on: Callable[[int], Any]) -> tuple[Any, Any]:
        gpus.work.begin_capture(stream)
        try:
            made = put_on(stream)
        finally:
            graph = gpus.work.end_capture(stream)
        return graph, made

    return run


def test_each_replay_moves_the_present_bytes(near: Agent, far: FarAgent, capture: Any) -> None:
    mine = make_region(near, "vram", N, seed=1)
    plan = near.prepare("write", mine, near.peer("far")["theirs"])
    plan.post().wait(PATIENCE)
    graph, captured = capture(plan.capture)
    with captured:
        for turn in range(1, 4):
            put(mine.memory, random_bytes(N, 10 + turn))
            graph.launch()
            eventually(lambda turn=turn: captured.runs == turn, "the replay has come to its end")
            seen = np.frombuffer(bytes.fromhex(far.ask("content", name="theirs")), np.uint8)
            assert np.array_equal(seen, random_bytes(N, 10 + turn))
        assert "3 runs" in repr(captured)
    assert "closed" in repr(captured)


def test_a_list_of_blocks_is_captured_as_well(near: Agent, far: FarAgent, capture: Any) -> None:
    mine, remote = make_region(near, "vram", N), near.peer("far")["theirs"]
    order = np.random.default_rng(3).permutation(N // 512)
    plan = near.prepare("read", remote.pages(order, 512), mine)
    plan.post().wait(PATIENCE)
    put(mine.memory, np.zeros(N, np.uint8))
    graph, captured = capture(plan.capture)
    with captured:
        graph.launch()
        eventually(lambda: captured.runs == 1, "the replay has come to its end")
    assert np.array_equal(content(mine), random_bytes(N, 2).reshape(-1, 512)[order].ravel())


def test_memory_in_a_graph_is_let_go_of_when_that_is_closed(near: Agent, far: FarAgent, capture: Any) -> None:
    mine = make_region(near, "vram", N)
    plan = near.prepare("read", near.peer("far")["theirs"], mine)
    plan.post().wait(PATIENCE)
    _, captured = capture(plan.capture)
    withdrawing = threading.Thread(target=near.deregister, args=(mine,))
    withdrawing.start()
    eventually(lambda: not mine.is_registered, "it is being withdrawn")
    assert mine.gate.inflight == 1
    captured.close()
    captured.close()
    withdrawing.join(PATIENCE)
    assert not withdrawing.is_alive()
    assert mine.gate.inflight == 0
    with pytest.raises(RegionStale):
        capture(plan.capture)


def test_what_was_not_posted_or_needs_the_host_is_not_captured(near: Agent, far: FarAgent, capture: Any) -> None:
    remote = near.peer("far")["theirs"]
    fresh = near.prepare("read", remote, make_region(near, "vram", N))
    with pytest.raises(ConfigError, match="no path yet"):
        capture(fresh.capture)
    staged = near.prepare("read", remote, make_region(near, "user", N))
    staged.post().wait(PATIENCE)
    with pytest.raises(ConfigError, match="host takes part"):
        capture(staged.capture)
    with pytest.raises(ConfigError):
        staged.capture("stream")


def test_host_memory_alone_is_not_captured(gpus: Any) -> None:
    with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
        introduce(alice, bob)
        make_region(bob, "arena", N, name="theirs")
        plan = alice.prepare("read", alice.peer("bob")["theirs"], make_region(alice, "arena", N))
        plan.post().wait(PATIENCE)
        with pytest.raises(ConfigError, match="host takes part"):
            plan.capture(0)


def test_a_stream_that_is_being_captured_orders_no_transfer(near: Agent, far: FarAgent, capture: Any) -> None:
    plan = near.prepare("read", near.peer("far")["theirs"], make_region(near, "vram", N))
    for use in (lambda s: plan.post(stream=s), lambda s: plan.post().wait(stream=s)):
        with pytest.raises(ConfigError, match="being captured"):
            capture(use)
    plan.post().wait(PATIENCE)


def test_the_default_stream_of_a_thread_can_be_captured_too(gpus: Any, near: Agent, far: FarAgent) -> None:
    plan = near.prepare("read", near.peer("far")["theirs"], make_region(near, "vram", N))
    plan.post().wait(PATIENCE)
    with cuda.on(0):
        gpus.work.begin_capture(2)
        for use in (lambda: plan.post(stream=2), lambda: plan.post().wait(stream=2)):
            with pytest.raises(ConfigError, match="being captured"):
                use()
        gpus.work.end_capture(2)
    plan.post(stream=2).wait(PATIENCE)


def test_a_graph_whose_handle_is_dropped_still_moves_its_own_blocks(near: Agent, far: FarAgent, capture: Any) -> None:
    remote, mine, other = near.peer("far")["theirs"], make_region(near, "vram", N), make_region(near, "vram", N)
    order = np.random.default_rng(3).permutation(N // 512)
    plan = near.prepare("read", remote.pages(order, 512), mine)
    plan.post().wait(PATIENCE)
    put(mine.memory, np.zeros(N, np.uint8))
    graph = capture(plan.capture)[0]
    del plan
    gc.collect()
    near.prepare("read", remote.pages(np.roll(order, 1), 512), other).post().wait(PATIENCE)
    graph.launch()
    eventually(lambda: content(mine).any(), "the replay moves bytes")
    assert np.array_equal(content(mine), random_bytes(N, 2).reshape(-1, 512)[order].ravel())
    (captured,) = _OPEN
    captured.close()

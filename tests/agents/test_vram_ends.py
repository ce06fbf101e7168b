"""Ends of GPU memory and of those who use it, on a made-up driver: nothing hangs, is freed early or left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent
from agent_tools import KIB, MIB, PATIENCE, error_of, eventually, random_bytes
from vram_process import far_vram
from vram_tools import content, gpu_agent, make_region

from raynixl import Agent, PeerLost, PeerUnknown, RegionStale, Transfer, TransferCancelled, TransferTimeout

N = 64 * KIB


@pytest.fixture
def near(gpus: Any) -> Iterator[Agent]:
    """The agent of this process."""
    with gpu_agent("near", deregister_timeout=1.0) as agent:
        yield agent


@pytest.fixture
def far(near: Agent) -> Iterator[FarAgent]:
    """The agent of another process."""
    with far_vram("far", deregister_timeout=1.0) as process:
        near.peer(process.record)
        process.ask("region", name="theirs", nbytes=N, memory="vram", seed=2)
        yield process


def bound(near: Agent, op: str = "read") -> tuple[Any, Any]:
    """A region of ours, and an operation between it and the far one that has been posted before."""
    mine, remote = make_region(near, "vram", N, seed=1), near.peer("far")["theirs"]
    plan = near.prepare(op, *((remote, mine) if op == "read" else (mine, remote)))
    plan.post().wait(PATIENCE)
    return mine, plan


def handles(gpus: Any) -> int:
    """How many handles of others are open here."""
    return int(gpus.calls["cuIpcOpenMemHandle_v2"] - gpus.calls["cuIpcCloseMemHandle"])


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_withdrawn_region_is_stale_its_handle_closed_and_its_successor_found(
    gpus: Any, near: Agent, far: FarAgent, op: str
) -> None:
    mine, plan = bound(near, op)
    assert handles(gpus) == 1
    far.ask("deregister", name="theirs")
    assert handles(gpus) == 0
    assert isinstance(error_of(plan.post()), RegionStale)
    far.ask("region", name="theirs", nbytes=N, memory="vram", seed=5)
    near.read(near.peer("far")["theirs"], mine).wait(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(N, 5))


def test_an_arena_that_is_withdrawn_is_pinned_no_more(gpus: Any, near: Agent, far: FarAgent) -> None:
    mine = make_region(near, "arena", 3 * N)
    near.read(near.peer("far")["theirs"], mine.span(0, N)).wait(PATIENCE)
    assert 3 * N in [one.nbytes for one in gpus.host.ranges]
    near.deregister(mine)
    assert 3 * N not in [one.nbytes for one in gpus.host.ranges]


def test_an_arena_that_was_withdrawn_before_its_first_transfer_is_not_pinned(
    gpus: Any, near: Agent, far: FarAgent
) -> None:
    mine = make_region(near, "arena", 3 * N)
    plan = near.prepare("read", near.peer("far")["theirs"], mine.span(0, N))
    near.deregister(mine)
    with pytest.raises(RegionStale):
        plan.post().wait(PATIENCE)
    assert 3 * N not in [one.nbytes for one in gpus.host.ranges], "nobody would unpin it"


def test_deregister_waits_for_a_transfer_that_a_gpu_carries_out(gpus: Any, near: Agent, far: FarAgent) -> None:
    mine, plan = bound(near)
    with gpus.held():
        transfer = plan.post()
        thread = threading.Thread(target=near.deregister, args=(mine,))
        thread.start()
        eventually(lambda: not mine.is_registered, "it is being withdrawn")
        assert mine.gate.inflight == 1
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert ended(transfer) in ("", "RegionStale")


def test_an_exporter_withdraws_while_our_gpu_reads_and_it_lets_go_at_its_deadline(
    gpus: Any, near: Agent, far: FarAgent
) -> None:
    _, plan = bound(near)
    with gpus.held():
        transfer = plan.post()
        assert far.ask("deregister", name="theirs") < PATIENCE / 2
        eventually(lambda: transfer.done, "the transfer has ended for whoever waits")
        assert isinstance(transfer.error, RegionStale | PeerLost)
        assert handles(gpus) == 1, "the handle was closed under a GPU that reads"
    eventually(lambda: handles(gpus) == 0, "the handle is closed when the GPU is through")


@pytest.mark.parametrize("memory", ["vram", "arena"])
def test_a_killed_exporter_is_a_lost_peer_and_what_was_mapped_is_let_go_of(
    gpus: Any, near: Agent, far: FarAgent, memory: str
) -> None:
    far.ask("region", name="more", nbytes=N, memory=memory)
    mine = make_region(near, "vram", N)
    plan = near.prepare("read", near.peer("far")["more"], mine)
    plan.post().wait(PATIENCE)
    with gpus.held():
        transfers = [plan.post() for _ in range(3)]
        far.kill()
        eventually(lambda: all(transfer.done for transfer in transfers), "they have ended for whoever waits")
        assert all(isinstance(transfer.error, PeerLost) for transfer in transfers)
    assert isinstance(error_of(plan.post()), PeerLost | PeerUnknown)
    eventually(lambda: handles(gpus) == 0, "handles are closed")
    eventually(lambda: N not in [one.nbytes for one in gpus.host.ranges], "the arena is pinned no more")
    again = make_region(near, "vram", N, seed=4)
    assert np.array_equal(content(again), random_bytes(N, 4))


def test_a_killed_importer_leaves_the_exporter_free_to_withdraw(near: Agent, far: FarAgent) -> None:
    mine = make_region(near, "vram", N, seed=3, name="mine")
    far.ask("copy", op="read", mine="theirs", record=near.record().decode(), theirs="mine")
    far.ask("start", op="read", mine="theirs", record=near.record().decode(), theirs="mine", count=20)
    far.kill()
    near.deregister(mine)
    del mine
    near.deregister(make_region(near, "vram", N, name="mine"))


def test_memory_that_a_frozen_importer_may_use_is_kept_until_it_has_ended(
    gpus: Any, near: Agent, far: FarAgent
) -> None:
    mine = make_region(near, "vram", 4 * MIB, seed=3, name="mine")
    address = mine.memory.address
    far.ask("region", name="into", nbytes=4 * MIB, memory="vram")
    far.ask("copy", op="read", mine="into", record=near.record().decode(), theirs="mine")
    far.stop()
    began = time.monotonic()
    near.deregister(mine)
    assert time.monotonic() - began < PATIENCE
    del mine
    assert np.array_equal(gpus.view(address, 4 * MIB), random_bytes(4 * MIB, 3)), "it was freed"
    far.kill()


def test_a_frozen_exporters_memory_is_still_read(near: Agent, far: FarAgent) -> None:
    mine, plan = bound(near)
    far.stop()
    try:
        plan.post().wait(PATIENCE)
    finally:
        far.resume()
    assert np.array_equal(content(mine), random_bytes(N, 2))


def test_a_busy_exporters_memory_is_still_read(near: Agent, far: FarAgent) -> None:
    mine, plan = bound(near)
    asking = threading.Thread(target=far.ask, args=("busy",), kwargs={"seconds": 0.5})
    asking.start()
    plan.post().wait(PATIENCE)
    asking.join(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(N, 2))


@pytest.mark.parametrize("sort", ["vram", "arena", "user"])
def test_a_deadline_ends_the_transfer_and_the_memory_stays_until_the_gpu_is_through(
    gpus: Any, near: Agent, far: FarAgent, sort: str
) -> None:
    mine = make_region(near, sort, N)
    plan = near.prepare("read", near.peer("far")["theirs"], mine)
    plan.post().wait(PATIENCE)
    with gpus.held():
        transfer = plan.post(timeout=0.05)
        eventually(lambda: transfer.done, "the deadline ends it")
        assert isinstance(transfer.error, TransferTimeout)
        assert mine.gate.inflight == 1
    eventually(lambda: mine.gate.inflight == 0, "the GPU is through")
    plan.post().wait(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(N, 2))


@pytest.mark.parametrize("sort", ["vram", "user"])
def test_a_cancelled_transfer_says_so(gpus: Any, near: Agent, far: FarAgent, sort: str) -> None:
    mine = make_region(near, sort, N)
    plan = near.prepare("read", near.peer("far")["theirs"], mine)
    plan.post().wait(PATIENCE)
    with gpus.held():
        transfer = plan.post()
        canceller = threading.Thread(target=transfer.cancel)
        canceller.start()
        eventually(lambda: transfer.done, "it is cancelled")
    canceller.join(PATIENCE)
    assert isinstance(transfer.error, TransferCancelled)


def test_close_waits_for_what_a_gpu_carries_out(gpus: Any, far: FarAgent) -> None:
    with gpu_agent("closing", deregister_timeout=5.0) as agent:
        agent.peer(far.record)
        mine = make_region(agent, "arena", N)
        plan = agent.prepare("read", agent.peer("far")["theirs"], mine)
        plan.post().wait(PATIENCE)
        del mine
        with gpus.held():
            transfer = plan.post()
            closing = threading.Thread(target=agent.close)
            closing.start()
            eventually(lambda: transfer.done, "the transfer has ended for whoever waits")
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_a_gpu_that_hangs_costs_its_memory_and_nothing_else(gpus: Any, far: FarAgent) -> None:
    with gpu_agent("near-2", deregister_timeout=0.3, transfer_timeout=0.5) as agent:
        agent.peer(far.record)
        mine = make_region(agent, "vram", N, seed=7)
        address = mine.memory.address
        plan = agent.prepare("write", mine, agent.peer("far")["theirs"])
        plan.post().wait(PATIENCE)
        with gpus.held():
            transfer = plan.post()
            began = time.monotonic()
            agent.deregister(mine)
            assert time.monotonic() - began < PATIENCE / 2
            del mine, plan
            eventually(lambda: transfer.done, "it has ended for whoever waits")
            assert np.array_equal(gpus.view(address, N), random_bytes(N, 7)), "it was freed under the GPU"


def ended(transfer: Transfer) -> str:
    """How a transfer ended: the class of its error, or ''."""
    eventually(lambda: transfer.done, "it ends")
    return "" if transfer.error is None else type(transfer.error).__name__


def test_memory_is_kept_while_the_gpu_of_an_importer_that_has_closed_goes_on(gpus: Any, far: FarAgent) -> None:
    with gpu_agent("owner", deregister_timeout=1.0) as owner:
        mine = make_region(owner, "vram", N, seed=7, name="mine")
        address = mine.memory.address
        far.ask("region", name="into", nbytes=N, memory="vram")
        far.ask("copy", op="read", mine="into", record=owner.record().decode(), theirs="mine")
        far.ask("hold")
        far.ask("start", op="read", mine="into", record=owner.record().decode(), theirs="mine")
        far.ask("leave")
        eventually(lambda: owner.lost("far") is not None, "it has hung up")
        frees = gpus.calls["cuMemFree_v2"]
        owner.deregister(mine)
        del mine
        assert np.array_equal(gpus.view(address, N), random_bytes(N, 7)), "it was freed under a GPU"
    far.kill()
    eventually(lambda: gpus.calls["cuMemFree_v2"] == frees + 1, "it is freed once the importer has ended")


def test_memory_is_freed_at_once_when_an_importer_has_closed_with_nothing_under_way(gpus: Any, far: FarAgent) -> None:
    with gpu_agent("owner", deregister_timeout=1.0) as owner:
        mine = make_region(owner, "vram", N, seed=7, name="mine")
        far.ask("copy", op="read", mine="theirs", record=owner.record().decode(), theirs="mine")
        far.ask("leave")
        eventually(lambda: owner.lost("far") is not None, "it has hung up")
        frees = gpus.calls["cuMemFree_v2"]
        owner.deregister(mine)
        del mine
        eventually(lambda: gpus.calls["cuMemFree_v2"] == frees + 1, "it is freed while the importer lives on")

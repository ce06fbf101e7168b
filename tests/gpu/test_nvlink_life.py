"""Ends of memory, peers and transfers over nvlink: withdrawn, killed, frozen, timed out; nothing hangs or is left."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable

import numpy as np
import pytest
from agent_tools import error_of, eventually
from gpu_far import PATIENCE, digest, filled, registered, some_bytes
from gpu_tools import Far, Fars, repeat_without_growth

from raynixl import Agent, PeerLost, PeerUnknown, RegionStale

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

KIB, MIB = 1 << 10, 1 << 20
BACKENDS = ("nvlink", "shm")


@pytest.fixture
def near(make_near: Callable[..., Agent]) -> Agent:
    """The agent of this process."""
    return make_near(backends=BACKENDS)


@pytest.fixture
def far(fars: Fars) -> Far:
    """The far process."""
    return fars(backends=list(BACKENDS))


def check_unharmed(near: Agent) -> None:
    """The GPU and its context work: a copy inside this process."""
    assert np.array_equal(filled("gpu", MIB, 9).get(), some_bytes(MIB, 9))
    assert not near.is_closed


@pytest.mark.parametrize("kind", ["vram", "gpu", "arena"])
def test_a_withdrawn_region_is_stale_and_its_successor_is_read(near: Agent, far: Far, fars: Fars, kind: str) -> None:
    name, peer = fars.name(), near.peer(far.record)
    far.ask("make", name=name, kind=kind, nbytes=MIB, seed=1)
    mine, remote = registered(near, "vram", MIB, 0), peer[name]
    plan = near.prepare("read", remote, mine)
    plan.post().wait(PATIENCE)
    far.ask("drop", name=name)
    assert isinstance(error_of(plan.post()), RegionStale)
    there = far.ask("make", name=name, kind=kind, nbytes=MIB, seed=2)
    near.read(peer[name], mine).wait(PATIENCE)
    assert digest(mine) == there
    far.ask("drop", name=name)


def test_deregister_while_transfers_are_in_flight_ends_them_and_frees_the_memory(
    near: Agent, far: Far, fars: Fars
) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="vram", nbytes=256 * MIB, seed=1)
    mine = registered(near, "vram", 256 * MIB, 0)
    plan = near.prepare("read", near.peer(far.record)[name], mine)
    plan.post().wait(PATIENCE)
    transfers = [plan.post() for _ in range(200)]
    far.ask("drop", name=name)
    for transfer in transfers:
        try:
            transfer.wait(PATIENCE)
        except RegionStale:
            continue
    check_unharmed(near)


def test_our_own_region_is_let_go_of_while_its_transfers_are_in_flight(near: Agent, far: Far, fars: Fars) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="vram", nbytes=64 * MIB, seed=1)
    mine = registered(near, "vram", 64 * MIB, 0)
    plan = near.prepare("read", near.peer(far.record)[name], mine)
    transfers = [plan.post() for _ in range(50)]
    near.deregister(mine)
    for transfer in transfers:
        try:
            transfer.wait(PATIENCE)
        except RegionStale:
            continue
    far.ask("drop", name=name)
    check_unharmed(near)


@pytest.mark.parametrize("kind", ["vram", "arena"])
def test_a_killed_exporter_ends_transfers_and_harms_nobody(
    near: Agent, make_far: Callable[..., Far], kind: str
) -> None:
    far = make_far(backends=list(BACKENDS))
    far.ask("make", name="memory", kind=kind, nbytes=64 * MIB, seed=1)
    mine = registered(near, "vram", 64 * MIB, 0)
    remote = near.peer(far.record)["memory"]
    plan = near.prepare("read", remote, mine)
    plan.post().wait(PATIENCE)
    transfers = [plan.post() for _ in range(100)]
    far.kill()
    for transfer in transfers:
        try:
            transfer.wait(PATIENCE)
        except PeerLost:
            continue
    eventually(lambda: near.lost(far.name) is not None, "the loss is noticed")
    assert isinstance(error_of(plan.post()), PeerLost | PeerUnknown)
    check_unharmed(near)
    near.deregister(mine)


def test_a_killed_importer_leaves_the_exporter_whole(near: Agent, make_far: Callable[..., Far]) -> None:
    far = make_far(backends=list(BACKENDS))
    mine = registered(near, "vram", 64 * MIB, 1, name="mine")
    far.ask("meet", record=base64.b64encode(near.record()).decode())
    far.ask("make", name="into", kind="vram", nbytes=64 * MIB)
    far.ask("read", peer=near.name, ours="into", theirs="mine")
    assert far.ask("digest", name="into") == digest(mine)
    far.tell("read", peer=near.name, ours="into", theirs="mine")
    far.kill()
    near.deregister(mine)
    again = registered(near, "vram", 64 * MIB, 2)
    assert digest(again) == digest(some_bytes(64 * MIB, 2))
    check_unharmed(near)


def test_a_frozen_peers_memory_is_still_read_and_written(near: Agent, make_far: Callable[..., Far]) -> None:
    far = make_far(backends=list(BACKENDS))
    there = far.ask("make", name="memory", kind="vram", nbytes=MIB, seed=1)
    mine = registered(near, "vram", MIB, 0)
    plan = near.prepare("read", near.peer(far.record)["memory"], mine)
    plan.post().wait(PATIENCE)
    far.stop()
    try:
        plan.post().wait(PATIENCE)
        assert digest(mine) == there
    finally:
        far.go_on()


def test_a_notification_comes_after_the_bytes(near: Agent, far: Far, fars: Fars) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="vram", nbytes=8 * MIB)
    mine = registered(near, "vram", 8 * MIB, 3)
    far.tell("nvlink_far:digest_at_notification", name=name)
    near.write(mine, near.peer(far.record)[name], notify=b"landed").wait(PATIENCE)
    assert far.hear() == ["landed", digest(mine)]
    far.ask("drop", name=name)


def test_regions_that_come_and_go_leave_nothing(near: Agent, far: Far, fars: Fars) -> None:
    """A thousand openings; RAYNIXL_GPU_CYCLES=400 makes it ten thousand."""
    peer, names = near.peer(far.record), [fars.name() for _ in range(25)]

    def cycle(number: int) -> None:
        far.ask("nvlink_far:make_bare", names=names, nbytes=2 * MIB)
        mine = near.empty(2 * MIB, kind="vram")
        for name in names:
            near.read(peer[name], mine).wait(PATIENCE)
        near.deregister(mine)
        far.ask("nvlink_far:drop_all", names=names)

    repeat_without_growth(cycle, int(os.environ.get("RAYNIXL_GPU_CYCLES", "40")), [far], warm=4)

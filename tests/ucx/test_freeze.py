"""A process that is stopped, over each lane: deadlines hold, others are undisturbed, memory in reuse is not written."""

from __future__ import annotations

import time

import numpy as np
import pytest
from agent_tools import MIB, PATIENCE, eventually
from lane_tools import CMA, TCP, LaneWorld
from liveness_tools import N, ends_with, pattern

from raynixl import PeerLost, TransferTimeout

LONG = 8 * MIB
"""More than the kernel's buffers of a connection hold."""


def check_used_again(world: LaneWorld, name: str, seed: int) -> None:
    """After SIGCONT the victim is used by name, whatever has become of the connection."""
    world.resume()
    mine = world.mine(LONG)
    world.near.read(world.near.peer("victim")[name], mine, timeout=PATIENCE).wait(PATIENCE)
    assert np.array_equal(mine.array(), pattern(LONG, seed))
    world.near.deregister(mine)


@pytest.mark.parametrize("tls", [TCP])
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_transfer_with_a_stopped_target_ends_at_its_deadline(world: LaneWorld, op: str) -> None:
    """Software emulation needs the target. The lane is reset, so that nothing late can touch our memory."""
    world.meet_bystander()
    theirs, mine = world.theirs("user", nbytes=LONG), world.mine(LONG)
    other = world.theirs("user", name="other", nbytes=LONG)
    plan = world.near.prepare(op, *((theirs, mine) if op == "read" else (mine, theirs)))
    plan.post(timeout=PATIENCE).wait(PATIENCE)
    world.bystander.ask("make", "b", N, "user", 3)
    bystanders = world.near.peer("bystander")["b"]
    world.stop()
    began = time.monotonic()
    transfer = plan.post(timeout=0.3)
    near = world.mine()
    while not transfer.done:
        world.near.read(bystanders, near).wait(PATIENCE)
        assert np.array_equal(near.array(), pattern(N, 3))
    ends_with(lambda: transfer, TransferTimeout)
    assert 0.29 < time.monotonic() - began < PATIENCE / 2
    mine.array()[:] = 77  # ours again
    world.check_bystander()
    world.resume()
    check_used_again(world, other.name, 1)
    assert (mine.array() == 77).all(), "the late answers of a stopped peer were written"
    if op == "read":
        plan.post(timeout=PATIENCE).wait(PATIENCE)
        assert np.array_equal(mine.array(), pattern(LONG, 1))


@pytest.mark.parametrize("tls", [CMA])
def test_over_cma_transfers_with_a_stopped_target_go_on(world: LaneWorld) -> None:
    """The kernel copies; of the target nothing is needed, until the heartbeat gives it up."""
    theirs, mine = world.theirs("user", nbytes=LONG), world.mine(LONG)
    plan = world.near.prepare("read", theirs, mine)
    plan.post(timeout=PATIENCE).wait(PATIENCE)
    world.stop()
    mine.array()[:] = 0
    plan.post().wait(PATIENCE)
    assert np.array_equal(mine.array(), pattern(LONG, 1))
    eventually(lambda: world.near.lost("victim"), "the loss of the frozen peer")
    assert "frozen" in str(world.near.lost("victim"))
    ends_with(plan.post, TransferTimeout)
    check_used_again(world, theirs.name, 1)


def test_a_stopped_target_is_given_up_and_then_used_again(world: LaneWorld) -> None:
    theirs, mine = world.theirs("user", nbytes=LONG), world.mine()
    world.near.notify("victim", b"connected")
    world.stop()
    ends_with(lambda: world.near.read(theirs[:N], mine), TransferTimeout, PeerLost)
    eventually(lambda: world.near.lost("victim"), "the loss of the frozen peer")
    check_used_again(world, theirs.name, 1)


def test_memory_of_a_stopped_writer_is_kept_until_it_has_ended(world: LaneWorld) -> None:
    """It goes on where it was stopped, when it wakes: where memory was reused by then, nothing may be written."""
    region = world.near.register(np.zeros(LONG, np.uint8), name="ours")
    address = region.memory.address
    world.victim.ask("make", "v", LONG, "user", 1)
    world.victim.ask("flood", "write", "v", "near", "ours", 64)
    world.stop()
    began = time.monotonic()
    world.near.deregister(region)
    took = time.monotonic() - began
    assert took < world.near.config.deregister_timeout + PATIENCE / 4
    assert isinstance(world.near.lost("victim"), PeerLost)
    del region
    others = [np.full(LONG, 99, np.uint8) for _ in range(8)]
    assert address not in [other.ctypes.data for other in others], "memory was freed under a stopped writer"
    world.resume()
    ends = world.victim.ask("flood_ends")
    assert ends[-1] in ("PeerLost", "RegionStale")
    time.sleep(0.2)
    assert all((other == 99).all() for other in others)
    world.meet_bystander()
    world.bystander.ask("make", "b", LONG, "user", 2)
    again = world.mine(LONG, name="ours")
    world.bystander.ask("copy", "write", "b", "near", "ours")
    assert np.array_equal(again.array(), pattern(LONG, 2))

"""A process that is killed, over each lane: a typed error at once, the survivors undisturbed, found again by name."""

from __future__ import annotations

import time

import numpy as np
import pytest
from agent_tools import MIB, PATIENCE, error_of, eventually
from lane_tools import LaneWorld, end_of, noticed_in
from liveness_tools import N, ends_with, pattern

from raynixl import PeerLost, PeerRestarted, RemoteRegion


def kill(world: LaneWorld) -> float:
    """Kill the victim; return when."""
    process = world.victim._process
    assert process is not None
    began = time.monotonic()
    process.kill()
    return began


def check_lives_again(world: LaneWorld, seed: int) -> None:
    """The victim starts again under its name, and is used without anybody having to say so."""
    world.victim.vanish()
    world.open(world.victim, "victim")
    world.victim.ask("make", "again", N, "user", seed)
    world.check_reads("again", seed)


def test_a_target_killed_before_its_first_transfer(world: LaneWorld) -> None:
    theirs, mine = world.theirs("user"), world.mine()
    began = kill(world)
    ends_with(lambda: world.near.read(theirs, mine), PeerLost)
    noticed_in(time.monotonic() - began, world.tls, "a target killed before a transfer")
    check_lives_again(world, 10)
    ends_with(lambda: world.near.read(theirs, mine), PeerRestarted)


def test_a_target_killed_while_it_is_asked_for_its_key(world: LaneWorld) -> None:
    theirs, mine = world.theirs("user"), world.mine()
    world.near.notify("victim", b"connected")
    world.stop()
    transfer = world.near.read(theirs, mine, timeout=PATIENCE)
    time.sleep(0.05)  # it is asked by now; sooner is well, too
    began = kill(world)
    assert isinstance(error_of(transfer), PeerLost)
    noticed_in(time.monotonic() - began, world.tls, "a target killed during wire-up")
    world.is_stopped = False


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_target_killed_during_transfers_of_gigabytes(world: LaneWorld, op: str) -> None:
    theirs, mine = world.theirs("user", nbytes=64 * MIB), world.mine(64 * MIB)
    transfers = world.gigabytes(op, mine, theirs)
    last = world.until_it_fails(op, mine, theirs)
    began = kill(world)
    ends = [*map(end_of, transfers), type(last.result(PATIENCE))]
    noticed_in(time.monotonic() - began, world.tls, f"a target killed during a {op}")
    assert ends[-1] is PeerLost
    assert set(ends) <= {PeerLost, None}
    eventually(lambda: isinstance(world.near.lost("victim"), PeerLost), "the loss of the peer")
    mine.array()[:] = 7
    time.sleep(0.05)
    assert (mine.array() == 7).all(), "memory was written after its transfer had ended"
    world.near.deregister(mine)


def test_a_target_killed_after_a_transfer(world: LaneWorld) -> None:
    theirs, mine = world.theirs("user"), world.mine()
    read = world.near.prepare("read", theirs, mine)
    read.post().wait(PATIENCE)
    began = kill(world)
    eventually(lambda: world.near.lost("victim") is not None, "the loss of the peer")
    noticed_in(time.monotonic() - began, world.tls, "a target killed after a transfer")
    ends_with(read.post, PeerLost)
    assert np.array_equal(mine.array(), pattern(N, 1))
    check_lives_again(world, 13)
    ends_with(read.post, PeerRestarted)


def test_a_post_to_a_target_that_died_a_moment_ago(world: LaneWorld) -> None:
    """Before anybody has noticed: the operation itself meets the dead process."""
    theirs, mine = world.theirs("user"), world.mine()
    plans = [world.near.prepare("read", theirs, mine), world.near.prepare("write", mine, theirs)]
    for plan in plans:
        plan.post().wait(PATIENCE)
    began = kill(world)
    for plan in plans:
        while True:
            transfer = plan.post()
            if not transfer.done or transfer.error is not None:
                break
        ends_with(lambda: transfer, PeerLost)  # noqa: B023 - called at once
    noticed_in(time.monotonic() - began, world.tls, "a post to a target that died")


def test_an_initiator_killed_during_writes_leaves_the_target_unharmed(world: LaneWorld) -> None:
    mine = world.mine(64 * MIB, name="ours")
    world.victim.ask("make", "v", 64 * MIB, "user", 1)
    world.victim.ask("copy", "write", "v", "near", "ours")
    world.victim.ask("flood", "write", "v", "near", "ours", (2 << 30) // mine.nbytes)
    kill(world)
    began = time.monotonic()
    world.near.deregister(mine)
    assert time.monotonic() - began < world.near.config.deregister_timeout + PATIENCE / 4
    array = mine.array()
    eventually(lambda: world.near.lost("victim") is not None, "the loss of the peer")
    time.sleep(0.1)  # what was on its way when it died
    array[:] = 0
    time.sleep(0.1)
    assert not array.any()
    world.meet_bystander()
    world.bystander.ask("make", "b", N, "user", 4)
    ours = world.mine(name="next")
    world.bystander.ask("copy", "write", "b", "near", "next")
    assert np.array_equal(ours.array(), pattern(N, 4))


def test_the_death_of_one_peer_disturbs_no_transfer_with_another(world: LaneWorld) -> None:
    nbytes = 32 * MIB
    world.meet_bystander()
    theirs, mine = world.theirs("user", nbytes=nbytes), world.mine(nbytes)
    world.bystander.ask("make", "b", nbytes, "user", 5)
    others = RemoteRegion.from_bytes(world.bystander.ask("describe", "b"))
    targets = [world.mine(nbytes) for _ in range(4)]
    plans = [world.near.prepare("read", others, target) for target in targets]
    plans[0].post(timeout=PATIENCE).wait(PATIENCE)
    doomed = world.until_it_fails("write", mine, theirs)
    honest = [plan.post(timeout=PATIENCE) for plan in plans for _ in range(4)]
    kill(world)
    assert isinstance(doomed.result(PATIENCE), PeerLost)
    for transfer in honest:
        transfer.wait(PATIENCE)
    assert all(np.array_equal(target.array(), pattern(nbytes, 5)) for target in targets)
    world.check_bystander()


def test_initiators_killed_during_reads_leave_the_target_unharmed(world: LaneWorld) -> None:
    world.bystander.open("bystander")
    world.bystander.ask("make", "b", 64 * MIB, "user", 5)
    for _ in range(3):
        world.victim.ask("meet", world.bystander.ask("record"))
        world.victim.ask("make", "v", 64 * MIB, "user", 1)
        world.victim.ask("copy", "read", "v", "bystander", "b")
        world.victim.ask("flood", "read", "v", "bystander", "b", 32)
        world.victim.vanish()
        world.open(world.victim, "victim")
        assert world.bystander.ask("content", "b") == pattern(64 * MIB, 5).tobytes()

"""A peer that is killed, exits or closes: everything with it ends typed and at once; it is found again by name."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import weakref

import numpy as np
import pytest
import warm
from agent_tools import PATIENCE, eventually
from liveness_tools import QUICK, N, World, ends_with, mapped_arenas, pattern

from raynixl import PeerLost, PeerRestarted, RaynixlError, Region, RemoteRegion
from raynixl.agents.reply import Reply
from raynixl.backends.shm import ShmBackend
from raynixl.testing.places import FarProcess

MIB = 1 << 20


def post_until_refused(world: World, theirs: RemoteRegion, mine: Region, errors: list[RaynixlError]) -> None:
    """Write again and again; note the first error."""
    write = world.near.prepare("write", mine, theirs)
    while not errors:
        try:
            write.post().wait(PATIENCE)
        except RaynixlError as exc:
            errors.append(exc)


@pytest.mark.parametrize("memory", ["arena", "user"])
def test_kill_9_ends_transfers_in_flight_and_unmaps(world: World, memory: str) -> None:
    before = mapped_arenas()
    theirs, mine = world.theirs(memory, nbytes=24 * MIB), world.mine(24 * MIB)
    world.near.write(mine, theirs).wait(PATIENCE)
    assert mapped_arenas() == before + (memory == "arena")
    errors: list[RaynixlError] = []
    poster = threading.Thread(target=post_until_refused, args=(world, theirs, mine, errors))
    poster.start()
    world.victim.vanish()
    poster.join(PATIENCE)
    assert isinstance(errors[0], PeerLost), repr(errors[0])
    eventually(lambda: mapped_arenas() == before, "the memory of the dead to be unmapped")
    assert isinstance(world.near.lost("victim"), PeerLost)
    world.check_bystander()


def test_kill_9_ends_requests_and_is_heard_by_every_survivor(world: World) -> None:
    world.victim.ask("make", "v", 4096, "arena", 1)
    world.bystander.ask("make", "b", 4096, "user", 2)
    world.bystander.ask("copy", "read", "b", "victim", "v")
    request = world.near.ask("victim", "silence", timeout=PATIENCE)
    world.victim.vanish()
    assert "died" in str(ends_with(lambda: request, PeerLost))
    eventually(lambda: hears_of_the_loss(world), "the bystander to hear of it")
    with pytest.raises(PeerLost):
        world.near.notify("victim", b"hello?")
    world.check_bystander()


class Mark:
    """Something that lives in the frame of who waits."""


def mark_of_waiting(request: Reply) -> weakref.ref[Mark]:
    """Wait for what a dead peer will not answer; return what a frame of ours held meanwhile."""
    mark = Mark()
    with contextlib.suppress(PeerLost):
        request.wait()
    return weakref.ref(mark)


def test_the_error_that_is_remembered_of_the_dead_holds_on_to_nobody_who_waited(world: World) -> None:
    requests = [world.near.ask("victim", "silence", timeout=PATIENCE) for _ in range(3)]
    world.victim.vanish()
    marks = [mark_of_waiting(request) for request in requests]
    requests.clear()
    gc.collect()
    assert [mark() for mark in marks] == [None] * 3
    assert isinstance(world.near.lost("victim"), PeerLost)


def hears_of_the_loss(world: World) -> bool:
    """The bystander's reads of the victim fail; until it has heard of the death its mapping still serves them."""
    try:
        world.bystander.ask("copy", "read", "b", "victim", "v")
    except PeerLost:
        return True
    return False


def test_a_clean_close_says_so(world: World) -> None:
    theirs, mine = world.theirs(), world.mine()
    read = world.near.prepare("read", theirs, mine)
    read.post().wait(PATIENCE)
    request = world.near.ask("victim", "silence", timeout=PATIENCE)
    world.victim.close_agent()
    assert "closed" in str(ends_with(lambda: request, PeerLost))
    ends_with(read.post, PeerLost)
    world.check_bystander()


def test_an_exit_without_close_is_a_loss(world: World) -> None:
    theirs, mine = world.theirs(), world.mine()
    read = world.near.prepare("read", theirs, mine)
    read.post().wait(PATIENCE)
    with pytest.raises(RaynixlError):
        world.victim.ask("exit")
    eventually(lambda: world.near.lost("victim"), "the loss")
    ends_with(read.post, PeerLost)
    world.victim.vanish()
    world.check_bystander()


@pytest.mark.parametrize("memory", ["arena", "user"])
def test_a_peer_restarted_under_its_name_is_used_again(world: World, memory: str) -> None:
    theirs, mine = world.theirs(memory), world.mine()
    read = world.near.prepare("read", theirs, mine)
    for life in range(3):
        world.victim.vanish()
        world.open(world.victim, "victim")
        world.victim.ask("make", "again", 8192, memory, 10 + life)
        world.check_reads("again", 10 + life)
        ends_with(read.post, PeerRestarted)
        ends_with(lambda: world.near.read(theirs, mine), PeerRestarted)
    world.bystander.ask("make", "b", 8192, memory, 2)
    world.bystander.ask("copy", "read", "b", "victim", "again")
    assert np.array_equal(np.frombuffer(world.bystander.ask("content", "b"), np.uint8), pattern(8192, 12))


def test_a_restarted_peer_that_greets_first_replaces_its_earlier_life(world: World) -> None:
    theirs, mine = world.theirs(), world.mine(name="ours")
    world.near.read(theirs, mine).wait(PATIENCE)
    world.victim.vanish()
    world.open(world.victim, "victim")
    world.victim.ask("make", "new", mine.nbytes, "user", 5)
    world.victim.ask("copy", "write", "new", "near", "ours")
    assert np.array_equal(mine.array(), pattern(mine.nbytes, 5))
    ends_with(lambda: world.near.read(theirs, mine), PeerRestarted)


def test_a_process_that_wakes_when_it_was_replaced_does_not_come_back(world: World) -> None:
    former = world.victim
    world.near.read(world.theirs(), world.mine()).wait(PATIENCE)
    world.stop()
    eventually(lambda: world.near.lost("victim"), "its silence is noticed")
    world.victim = FarProcess(ShmBackend, QUICK, is_busy=False, launch=warm.popen)
    try:
        world.open(world.victim, "victim")
        world.victim.ask("make", "new", N, "user", 5)
        world.check_reads("new", 5)
        os.kill(former.pid, signal.SIGCONT)
        world.is_stopped = False
        world.near.serve("echo", lambda _peer, payload: payload, threaded=False)
        for _ in range(3):
            with pytest.raises(PeerLost):
                former.ask("ask", "near", b"I am back")
            assert world.near.ask("victim", "echo", b"it is me").wait() == b"it is me"
        assert world.near.lost("victim") is None
        world.check_reads("new", 5)
    finally:
        former.close()


def test_a_peer_killed_while_deregistering_holds_nobody_up(world: World) -> None:
    mine = world.mine(name="ours")
    world.victim.ask("make", "v", mine.nbytes, "user", 1)
    world.victim.ask("copy", "read", "v", "near", "ours")
    world.stop()
    threading.Timer(0.2, world.victim.vanish).start()
    world.near.deregister(mine)
    world.is_stopped = False
    eventually(lambda: world.victim._process is None, "the victim to be gone")
    world.check_bystander()

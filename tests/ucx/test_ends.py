"""Transfers that are cut short, and agents that close: typed ends, settled memory, and the next transfer is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from agent_tools import MIB, PATIENCE, error_of, eventually, random_bytes
from lane_tools import LaneWorld, config_for, end_of

from raynixl import Agent, AgentClosed, PeerLost, RaynixlError, Transfer, TransferCancelled, TransferTimeout
from raynixl.agents.prepared import Prepared

LARGE = 64 * MIB


def check_settled(memory: np.ndarray) -> None:
    """Nobody writes there any more."""
    memory[:] = 55
    time.sleep(0.03)
    assert (memory == 55).all(), "memory was written after its transfer had ended"


def cancelled(plan: Prepared) -> Transfer:
    """A transfer that was cancelled, if that came in time."""
    transfer = plan.post(timeout=PATIENCE)
    transfer.cancel()
    return transfer


def end_early(post: Callable[[], Transfer]) -> type[RaynixlError] | None:
    """Post until one does not get through: a thread that loses its core comes too late to stop a transfer."""
    deadline = time.monotonic() + PATIENCE
    while (end := end_of(post())) is None and time.monotonic() < deadline:
        pass
    return end


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_large_transfer_is_cancelled_or_late_and_the_next_is_right(world: LaneWorld, op: str) -> None:
    theirs, mine = world.theirs("user", nbytes=LARGE), world.mine(LARGE)
    plan = world.near.prepare(op, *((theirs, mine) if op == "read" else (mine, theirs)))
    read = world.near.prepare("read", theirs, mine)
    read.post(timeout=PATIENCE).wait()
    for number in range(3):
        assert end_early(lambda: cancelled(plan)) is TransferCancelled
        check_settled(mine.array())
        assert end_early(lambda: plan.post(timeout=0.001)) is TransferTimeout
        check_settled(mine.array())
        mine.array()[:] = sent = random_bytes(LARGE, seed=number)
        world.near.write(mine, theirs, timeout=PATIENCE).wait(PATIENCE)
        mine.array()[:] = 0
        read.post(timeout=PATIENCE).wait()
        assert np.array_equal(mine.array(), sent)


@pytest.mark.parametrize("op", ["read", "write"])
def test_an_agent_that_closes_ends_what_is_in_flight_both_ways(world: LaneWorld, op: str) -> None:
    """UCX crashes who closes an endpoint while the peer writes, if one worker serves both directions, and who has many
    answers to reads to send when the reader goes.
    """
    mine, ours = np.zeros(LARGE, np.uint8), world.mine(LARGE, name="ours")
    world.victim.ask("make", "w", LARGE, "user", 2)
    world.victim.ask("copy", op, "w", "near", "ours")
    theirs = world.theirs("user", nbytes=LARGE)
    world.victim.ask("flood", op, "w", "near", "ours", 32)
    transfers = world.gigabytes(op, world.near.register(mine), theirs)
    began = time.monotonic()
    world.near.close()
    assert time.monotonic() - began < PATIENCE
    assert {end_of(transfer) for transfer in transfers} <= {None, PeerLost, AgentClosed}
    assert all(transfer.done for transfer in transfers)
    check_settled(mine)
    check_settled(ours.array())
    assert set(world.victim.ask("flood_ends")) <= {"", "PeerLost"}


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_target_that_closes_ends_what_its_peers_have_in_flight(world: LaneWorld, op: str) -> None:
    theirs, mine = world.theirs("user", nbytes=LARGE), world.mine(LARGE)
    transfers = world.gigabytes(op, mine, theirs)
    world.victim.ask("close")
    assert {end_of(transfer) for transfer in transfers} <= {None, PeerLost}
    assert isinstance(error_of(world.near.read(theirs, mine)), PeerLost)
    check_settled(mine.array())


@pytest.fixture
def pair(tls: str, _leaves_nothing: None) -> Iterator[tuple[Agent, Agent]]:
    """Two agents of this process that know each other."""
    with Agent("alice", config=config_for(tls)) as alice, Agent("bob", config=config_for(tls)) as bob:
        alice.peer(bob.record())
        bob.peer(alice.record())
        yield alice, bob


def test_agents_of_one_process_move_bytes_both_ways(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(random_bytes(9 * MIB, seed=1)), bob.empty(9 * MIB, name="bobs")
    alice.write(mine, alice.peer("bob")["bobs"], notify=b"written").wait(PATIENCE)
    assert bob.wait_notification(PATIENCE).payload == b"written"
    assert np.array_equal(bobs.array(), mine.array())
    alices = alice.empty(9 * MIB, name="alices")
    bob.write(bobs, bob.peer("alice")["alices"]).wait(PATIENCE)
    assert np.array_equal(alices.array(), bobs.array())


@pytest.mark.parametrize("wait", [0.0, 0.05])
@pytest.mark.parametrize("is_target", [False, True], ids=["initiator", "target"])
def test_an_agent_is_closed_while_ucx_starts(
    pair: tuple[Agent, Agent], wait: float, is_target: bool, nothing_left: Callable[[], list[str]]
) -> None:
    alice, bob = pair
    mine, _ = alice.register(bytearray(4096)), bob.register(bytearray(4096), name="bobs")
    theirs = alice.peer("bob")["bobs"]
    transfer = alice.read(theirs, mine)
    time.sleep(wait)
    (bob if is_target else alice).close()
    assert end_of(transfer) in (None, PeerLost, AgentClosed)
    alice.close()
    bob.close()
    eventually(lambda: not [one for one in nothing_left() if "thread" in one], "their threads to end")


def test_threads_of_one_agent_start_ucx_once(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.register(random_bytes(4096, seed=3), name="bobs")
    theirs = alice.peer("bob")["bobs"]
    regions = [alice.register(np.zeros(4096, np.uint8)) for _ in range(8)]
    threads = [threading.Thread(target=lambda one=one: alice.read(theirs, one).wait(PATIENCE)) for one in regions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert all(np.array_equal(region.array(), random_bytes(4096, seed=3)) for region in regions)

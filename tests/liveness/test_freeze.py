"""A peer that is stopped, in each phase: deadlines hold, others are undisturbed, and after SIGCONT it is used again."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from agent_tools import PATIENCE, eventually
from liveness_tools import N, World, ends_with, pattern

from raynixl import PeerLost, RegionStale, TransferTimeout
from raynixl.authentication import Identity, prove
from raynixl.record import AgentRecord


def test_before_it_was_connected(world: World) -> None:
    theirs, mine = world.theirs(), world.mine()
    world.stop()
    ends_with(lambda: world.near.read(theirs, mine), TransferTimeout)
    with pytest.raises(TransferTimeout):
        world.near.notify("victim", b"hello?", timeout=0.3)
    world.check_bystander()
    world.resume()
    world.check_reads("theirs", 1)


@contextlib.contextmanager
def mute_server(world: World, answers: int) -> Iterator[str]:
    """A process frozen within the greeting: its socket takes the connection, and then `answers` packets come."""
    incarnation = "ab" * 16
    record = AgentRecord.from_bytes(world.near.record())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as stack:
        listener.bind(f"\0raynixl/{incarnation}")
        listener.listen(8)
        listener.settimeout(PATIENCE)
        world.near.peer(record.model_copy(update={"name": "mute", "incarnation": incarnation}).to_bytes())

        def greet() -> None:
            sock = stack.enter_context(listener.accept()[0])
            if answers:
                hello = json.loads(sock.recv(4096))
                server = Identity.fresh("mute", incarnation)
                client = Identity(hello["name"], hello["incarnation"], hello["nonce"])
                words = {"name": "mute", "incarnation": incarnation, "nonce": server.nonce, "probe": 0,
                         "proof": prove(b"", "server", client, server)}  # fmt: skip
                sock.send(json.dumps(words).encode())

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            yield "mute"
        finally:
            thread.join(PATIENCE)


@pytest.mark.parametrize("answers", [0, 1])
def test_during_the_greeting(world: World, answers: int) -> None:
    with mute_server(world, answers) as name, pytest.raises(TransferTimeout, match="did not answer the greeting"):
        world.near.notify(name, b"hello?", timeout=0.3)
    world.check_bystander()


def test_while_a_bind_is_pending(world: World) -> None:
    theirs, mine = world.theirs(), world.mine()
    world.near.notify("victim", b"connected")
    world.stop()
    ends_with(lambda: world.near.read(theirs, mine), TransferTimeout, PeerLost)
    world.check_bystander()
    world.resume()
    world.check_reads("theirs", 1)
    world.near.read(theirs, mine).wait(PATIENCE)  # it is the same incarnation: the old descriptor is good


@pytest.mark.parametrize("memory", ["arena", "user"])
def test_transfers_need_nothing_of_a_stopped_peer(world: World, memory: str) -> None:
    """Until the heartbeat gives it up, what is bound goes on; afterwards it is connected again by itself."""
    theirs, mine = world.theirs(memory), world.mine()
    read = world.near.prepare("read", theirs, mine)
    read.post().wait(PATIENCE)
    mine.array()[:] = 0
    world.stop()
    read.post().wait(PATIENCE)
    assert np.array_equal(mine.array(), pattern(N, 1))
    eventually(lambda: world.near.lost("victim"), "the loss of the frozen peer")
    assert "frozen" in str(world.near.lost("victim"))
    ends_with(read.post, TransferTimeout)
    world.check_bystander()
    world.resume()
    mine.array()[:] = 0
    read.post(timeout=PATIENCE).wait(PATIENCE)
    assert np.array_equal(mine.array(), pattern(N, 1))


def test_while_a_request_is_pending(world: World) -> None:
    world.near.notify("victim", b"connected")
    request = world.near.ask("victim", "silence", timeout=PATIENCE)
    world.stop()
    short = world.near.ask("victim", "echo", b"?", timeout=0.2)
    ends_with(lambda: short, TransferTimeout)
    assert "frozen" in str(ends_with(lambda: request, PeerLost))
    world.check_bystander()
    world.resume()
    assert world.near.ask("victim", "echo", b"back", timeout=PATIENCE).wait() == b"back"


def test_while_we_deregister_a_region_that_it_has_bound(world: World) -> None:
    mine = world.mine(name="ours")
    world.victim.ask("make", "v", N, "user", 1)
    world.victim.ask("copy", "read", "v", "near", "ours")
    world.stop()
    world.near.deregister(mine)
    error = world.near.lost("victim")
    assert isinstance(error, PeerLost)
    world.check_bystander()
    world.resume()
    again = world.mine(name="ours")
    again.array()[:] = pattern(N, 77)
    eventually(lambda: copies(world, 77), "the victim to use us again by name")


def copies(world: World, seed: int) -> bool:
    """The victim reads what our region holds now; it may first have to hear that its connection was cut."""
    with contextlib.suppress(PeerLost, RegionStale):
        world.victim.ask("copy", "read", "v", "near", "ours")
    return bool(np.array_equal(np.frombuffer(world.victim.ask("content", "v"), np.uint8), pattern(N, seed)))


def test_closing_does_not_wait_for_a_stopped_peer(world: World) -> None:
    mine = world.mine(name="ours")
    world.victim.ask("make", "v", N, "arena", 1)
    world.victim.ask("copy", "write", "v", "near", "ours")
    world.near.read(world.near.peer("victim")["v"], mine).wait(PATIENCE)
    world.stop()
    world.near.close()
    world.near.close()

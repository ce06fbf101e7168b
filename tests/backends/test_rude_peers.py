"""Peers that know the secret and misbehave: malformed packets, floods, and not reading, are borne and counted."""

from __future__ import annotations

import array
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from agent_tools import PATIENCE, eventually, introduce, make_agent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger import Stranger

from raynixl import Agent, PeerLost
from raynixl.authentication import Identity
from raynixl.backends.socket_link import _FIRST, _LAST, _PACKET
from raynixl.messages import Message, MessageKind

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def agent(nothing_left: Callable[[], list[str]]) -> Iterator[Agent]:
    """An agent that accepts messages of up to 64 kB, closed at the end."""
    with make_agent("patient", backends=("shm",), max_message_nbytes=1 << 16) as agent:
        yield agent


@pytest.fixture
def rude(agent: Agent) -> Iterator[Stranger]:
    """A peer that has been let in."""
    with Stranger(agent, name="rude") as stranger:
        stranger.enter()
        eventually(lambda: agent.connector.current("rude"), "the link")
        yield stranger


def packet(flags: int, number: int, length: int, body: bytes) -> bytes:
    """One packet of a link."""
    return _PACKET.pack(flags, number, length) + body


def note(payload: bytes) -> bytes:
    """A whole notification in one packet."""
    message = Message(MessageKind.NOTIFY, 0, "", payload).to_bytes()
    return packet(_FIRST | _LAST, 0, len(message), message)


def check_serves(agent: Agent, rude: Stranger) -> None:
    """Both this peer and another are still heard."""
    rude.sock.send(note(b"well behaved"))
    while agent.wait_notification(PATIENCE).payload != b"well behaved":
        continue
    with make_agent("other", backends=("shm",)) as other:
        introduce(agent, other)
        other.notify("patient", b"me too")
        assert agent.wait_notification(PATIENCE).payload == b"me too"


def fill_backlog(agent: Agent) -> int:
    """Send until the agent refuses to hold back more; return how many messages it took."""
    for number in range(10_000):
        try:
            agent.notify("rude", b"%05d" % number + bytes(50_000))
        except PeerLost:
            return number
    raise AssertionError("the backlog has no bound")


@pytest.mark.parametrize(
    "packets",
    [
        [b"\x00"],
        [packet(0, 5, 10, b"x" * 10)],
        [packet(_LAST, 5, 10, b"x" * 10)],
        [packet(_FIRST, 5, 1 << 17, b"x")],
        [packet(_FIRST, 5, (1 << 32) - 1, b"x")],
        [packet(_FIRST, 5, 4, b"x" * 10)],
        [packet(_FIRST, 5, 10, b"x"), packet(_LAST, 5, 10, b"x")],
        [packet(_FIRST | _LAST, 5, 10, b"x")],
        [packet(_FIRST | _LAST, 0, 3, b"abc")],
        [packet(_FIRST, 5, 100, b"x"), packet(_FIRST, 5, 100, b"x")],
        [packet(_FIRST, number, 100, b"x") for number in range(70)],
        [b"\xff" * 61_000],
    ],
    ids=lambda packets: f"{len(packets)}-{packets[0][:13].hex()}",
)
def test_malformed_packets_are_dropped_and_counted(agent: Agent, rude: Stranger, packets: list[bytes]) -> None:
    for one in packets:
        rude.sock.send(one)
    eventually(lambda: agent.statistics().dropped, "the count")
    check_serves(agent, rude)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flags=st.integers(0, 255),
    number=st.integers(0, 3),
    length=st.integers(0, 1 << 18),
    body=st.binary(max_size=300),
    kind=st.integers(0, 255),
)
def test_random_packets_and_messages_are_borne(
    agent: Agent, rude: Stranger, flags: int, number: int, length: int, body: bytes, kind: int
) -> None:
    rude.sock.setblocking(True)
    rude.sock.send(packet(flags, number, length, body))
    message = bytes([1, kind]) + body
    rude.sock.send(packet(_FIRST | _LAST, 0, len(message), message))
    if kind != MessageKind.BYE:
        rude.sock.send(note(b"still here"))
        while agent.wait_notification(PATIENCE).payload != b"still here":
            continue


def test_descriptors_of_malformed_messages_are_closed(
    agent: Agent, rude: Stranger, nothing_left: Callable[[], list[str]]
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer] * 2))]
    for one in (
        packet(_FIRST, 9, 100, b"x"), packet(_FIRST, 9, 100, b"x"), packet(_LAST, 9, 100, b"x"), packet(0, 9, 4, b""),
        packet(_FIRST, 7, 1 << 20, b"x"), b"x", note(b"with descriptors"),
    ):  # fmt: skip
        rude.sock.sendmsg([one], rights)
    rude.sock.send(packet(_LAST, 9, 100, b"too short"))
    os.close(writer)
    assert agent.wait_notification(PATIENCE).payload == b"with descriptors"
    check_serves(agent, rude)
    assert os.read(reader, 1) == b""  # the end: nobody holds the other side open
    os.close(reader)


def test_a_flood_of_messages_keeps_no_other_peer_out(agent: Agent, rude: Stranger) -> None:
    with make_agent("other", backends=("shm",)) as other:
        introduce(agent, other)
        agent.serve("echo", lambda _peer, payload: payload, threaded=False)
        packets = [packet(_FIRST | _LAST, 0, 3, b"bad"), note(b"flood")]
        rude.sock.setblocking(False)
        for turn in range(20):
            for number in range(500):
                try:
                    rude.sock.send(packets[number % 2])
                except BlockingIOError:
                    break
            assert other.ask("patient", "echo", b"%d" % turn).wait() == b"%d" % turn
    assert agent.statistics().dropped["message"] > 0


def test_a_peer_that_does_not_read_holds_a_bounded_backlog(agent: Agent, rude: Stranger) -> None:
    link = agent.connector.current("rude").link
    fill_backlog(agent)
    assert link._backlog_nbytes <= 2 * agent.config.max_message_nbytes
    check_serves(agent, rude)


def test_what_was_held_back_arrives_whole_and_in_order_once_the_peer_reads(agent: Agent, rude: Stranger) -> None:
    sent = fill_backlog(agent)
    rude.sock.settimeout(PATIENCE)
    for number in range(sent):
        message = Message.from_bytes(rude.sock.recv(1 << 17)[_PACKET.size :])
        assert message.payload[:5] == b"%05d" % number
    eventually(agent.connector.current("rude").link.flushed, "the backlog to be empty")
    agent.notify("rude", b"after")
    assert Message.from_bytes(rude.sock.recv(1 << 17)[_PACKET.size :]).payload == b"after"


def test_a_peer_that_comes_back_before_its_last_words_were_heard_stays(agent: Agent, rude: Stranger) -> None:
    """Its earlier link ends after the new one began: that must not take the new one along."""
    earlier = agent.connector.current("rude")
    is_busy, goes_on = threading.Event(), threading.Event()
    agent.reactor.call_soon(lambda: (is_busy.set(), goes_on.wait(PATIENCE)))
    assert is_busy.wait(PATIENCE)
    for number in range(50):
        rude.sock.send(note(b"%d" % number))
    rude.sock.close()
    with Stranger(agent) as again:
        again.me = Identity.fresh("rude", rude.me.incarnation)
        again.say(again.hello())
        goes_on.set()
        again.say({"proof": again.proof(again.hear(), b""), "probe": 0})
        assert again.hear() == {"refusal": "", "kind": ""}
        assert [agent.wait_notification(PATIENCE).payload for _ in range(50)] == [b"%d" % n for n in range(50)]
        eventually(lambda: agent.connector.current("rude") is not earlier, "the new link")
        agent.notify("rude", b"welcome back")
        assert again.sock.recv(4096).endswith(b"welcome back")
        agent.reactor.run_until(lambda: False, time.monotonic() + 0.05)
        assert agent.lost("rude") is None

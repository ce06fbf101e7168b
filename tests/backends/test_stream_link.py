"""A TCP link keeps messages whole and in order, bears rude peers, and hears of every way in which a peer can go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from agent_tools import MIB, PATIENCE, eventually, random_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_tools import End, TcpStranger, busy_reactor, frame

from raynixl import IntegrityError, PeerLost
from raynixl.backends.link import BaseLink
from raynixl.backends.stream_link import Frames
from raynixl.host import process_state

pytestmark = [pytest.mark.pure, pytest.mark.usefixtures("nothing_left")]
LIMIT = 1 << 16


@pytest.fixture
def ends(nothing_left: Callable[[], list[str]]) -> Iterator[tuple[End, End]]:
    """Two ends that accept messages of up to 64 kB."""
    with End("alice", max_message_nbytes=LIMIT) as alice, End("bob", max_message_nbytes=LIMIT) as bob:
        yield alice, bob


@pytest.fixture
def rude(ends: tuple[End, End]) -> Iterator[TcpStranger]:
    """A peer of bob's that has been let in."""
    _, bob = ends
    with TcpStranger(bob, name="rude") as stranger:
        stranger.enter()
        eventually(lambda: bob.opened, "the link")
        yield stranger


FRAMES = st.lists(st.tuples(st.sampled_from([0, 1]), st.binary(max_size=60)), max_size=8)


@settings(deadline=None)
@given(frames=FRAMES, cuts=st.lists(st.integers(0, 600), max_size=20))
def test_any_split_of_the_stream_gives_the_same_frames(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream = memoryview(b"".join(frame(body, channel) for channel, body in frames))
    cutter, found, at = Frames(LIMIT), [], 0
    for cut in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        found += cutter.feed(stream[at:cut])
        at = cut
    assert found == frames
    assert cutter.missing == 5


@pytest.mark.parametrize("split", range(1, 6))
@pytest.mark.parametrize("header", [frame(b"", 2), frame(b"", 255), (LIMIT + 1).to_bytes(4, "little") + b"\0"])
def test_a_header_that_no_peer_sends_is_refused_after_what_came_before(header: bytes, split: int) -> None:
    cutter = Frames(LIMIT)
    stream = memoryview(frame(b"good") + header)
    found = list(cutter.feed(stream[: len(stream) - split]))
    with pytest.raises(IntegrityError):
        found += list(cutter.feed(stream[len(stream) - split :]))
    assert found == [(0, b"good")]


def test_what_a_long_frame_lacks_is_known() -> None:
    cutter = Frames(LIMIT)
    assert list(cutter.feed(memoryview(frame(bytes(1000))[:100]))) == []
    assert cutter.missing == 905


def test_messages_of_all_sizes_arrive_whole_and_in_order_on_both_channels(ends: tuple[End, End]) -> None:
    alice, bob = ends
    mine, theirs = alice.meet(bob)
    order: list[tuple[str, bytes]] = []
    alice.on_message = lambda _link, message: order.append(("message", message))
    alice.on_control = lambda _link, body: order.append(("control", body))
    sent = [random_bytes(nbytes, nbytes).tobytes() for nbytes in (0, 1, 4, 5, 16_379, 16_384, 65_535, LIMIT, 0, 3)]
    for message in sent:
        theirs.send(message)
        theirs.send_control(message[::-1])
    alice.wait(lambda: len(order) == 2 * len(sent), "all of them")
    assert order == [said for one in sent for said in (("message", one), ("control", one[::-1]))]
    mine.send(b"and back")
    bob.wait(lambda: bob.heard == [b"and back"], "the answer")


def test_a_message_of_many_megabytes_arrives_whole(nothing_left: None) -> None:
    message = random_bytes(60 * MIB).tobytes()
    with End("alice") as alice, End("bob") as bob:
        mine, _ = alice.meet(bob)
        mine.send(message)
        mine.send(b"next")
        eventually(lambda: len(bob.heard) == 2, "both")
        assert bob.heard == [message, b"next"]
        alice.wait(mine.flushed, "the backlog to be empty")


def test_what_is_sent_right_after_the_greeting_is_not_lost(ends: tuple[End, End]) -> None:
    alice, bob = ends
    bob.on_message = lambda link, message: link.send(b"to " + message)
    for number in range(20):
        alice.connect(bob.record, [bob.endpoint]).send(b"%d" % number)
    eventually(lambda: len(alice.heard) == 20, "all answers")
    with TcpStranger(bob) as stranger:
        answer = {"proof": stranger.proof(stranger.challenge(), b""), "probe": 0}
        with busy_reactor(bob):  # the first frames arrive with the last greeting
            stranger.say(answer)
            stranger.sock.sendall(frame(b"early", 1) + frame(b"bird"))
        eventually(lambda: bob.controls == [b"early"], "the early frame")
        assert stranger.hear() == {"refusal": "", "kind": ""}
        assert stranger.sock.recv(100) == frame(b"to bird")


def test_many_threads_send_over_one_link_and_each_keeps_its_order(ends: tuple[End, End]) -> None:
    alice, bob = ends
    mine, _ = alice.meet(bob)

    def send(name: bytes) -> None:
        for number in range(300):
            mine.send(b"%s %d " % (name, number) + bytes(number))

    threads = [threading.Thread(target=send, args=(name,)) for name in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    eventually(lambda: len(bob.heard) == 900, "all messages")
    for name in (b"a", b"b", b"c"):
        own = [message for message in bob.heard if message.startswith(name)]
        assert own == [b"%s %d " % (name, number) + bytes(number) for number in range(300)]


def fill(link: BaseLink) -> int:
    """Send until the link refuses to hold back more; return how many messages it took."""
    for number in range(10_000):
        try:
            link.send(b"%05d" % number + bytes(50_000))
        except PeerLost:
            assert link.lost is None  # it is the message that is refused
            return number
    raise AssertionError("the backlog has no bound")


def test_a_peer_that_does_not_read_holds_a_bounded_backlog(ends: tuple[End, End], rude: TcpStranger) -> None:
    _, bob = ends
    link = bob.opened[0]
    sent = fill(link)
    assert not link.flushed()
    assert link._backlog_nbytes <= 2 * LIMIT
    rude.sock.sendall(frame(b"I write all the same"))
    bob.wait(lambda: bob.heard == [b"I write all the same"], "the message")
    taken = b""
    while len(taken) < sent * 50_010:  # now it reads: all is whole and in order
        taken += rude.sock.recv(1 << 20)
    assert taken == b"".join(frame(b"%05d" % number + bytes(50_000)) for number in range(sent))
    bob.wait(link.flushed, "the backlog to be empty")
    assert bob.flushes > 0
    link.send(b"after")
    assert rude.sock.recv(100) == frame(b"after")


def test_a_peer_that_does_not_read_for_long_is_not_taken_for_a_dead_host(nothing_left: None) -> None:
    with (
        End("bob", heartbeat_timeout=0.3, heartbeat_interval=0.05, max_message_nbytes=LIMIT) as bob,
        TcpStranger(bob) as stranger,
    ):
        stranger.enter()
        eventually(lambda: bob.opened, "the link")
        fill(bob.opened[0])
        assert not bob.reactor.run_until(lambda: bool(bob.lost), time.monotonic() + 1.0)
        assert bob.opened[0].lost is None


GARBAGE = st.binary(min_size=6, max_size=300).filter(lambda data: int.from_bytes(data[:4], "little") > LIMIT + 64)


@pytest.mark.parametrize(
    "said", [frame(b"", 2), frame(b"x" * 10, 9), b"\xff" * 5, (LIMIT + 65).to_bytes(4, "little") + b"\0"]
)
def test_a_malformed_frame_ends_the_link_and_is_counted(ends: tuple[End, End], rude: TcpStranger, said: bytes) -> None:
    alice, bob = ends
    rude.sock.sendall(frame(b"good") + said + frame(b"never heard"))
    bob.wait(lambda: bob.lost, "the end")
    assert isinstance(bob.lost[0], PeerLost)
    assert bob.dropped == {"frame": 1}
    assert bob.heard == [b"good"]
    with pytest.raises(PeerLost, match="sent what no agent sends"):
        bob.opened[0].send(b"x")
    alice.meet(bob)[0].send(b"others are heard")
    bob.wait(lambda: b"others are heard" in bob.heard, "the message")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=GARBAGE)
def test_garbage_after_the_greeting_ends_the_link_and_is_counted(ends: tuple[End, End], garbage: bytes) -> None:
    _, bob = ends
    before, lost = bob.dropped["frame"], len(bob.lost)
    with TcpStranger(bob) as stranger:
        stranger.enter()
        stranger.sock.sendall(garbage)
        eventually(lambda: len(bob.lost) > lost, "the end")
    assert bob.dropped["frame"] == before + 1


def test_a_control_message_that_the_backend_does_not_understand_ends_the_link(ends: tuple[End, End]) -> None:
    alice, bob = ends
    mine, _ = alice.meet(bob)

    def refuse(_link: object, body: bytes) -> None:
        raise IntegrityError(f"{body!r} means nothing")

    bob.on_control = refuse
    mine.send_control(b"x")
    bob.wait(lambda: bob.lost, "the end")
    alice.wait(lambda: alice.lost, "the end at the other side")
    assert bob.dropped == {"frame": 1}


def test_a_handler_that_closes_the_link_hears_no_more(ends: tuple[End, End], rude: TcpStranger) -> None:
    _, bob = ends

    def take(link: BaseLink, message: bytes) -> None:
        bob.heard.append(message)
        link.close()

    bob.on_message = take
    rude.sock.sendall(frame(b"one") + frame(b"two"))
    bob.wait(lambda: bob.lost, "the end")
    assert bob.heard == [b"one"]


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_peer_that_vanishes_is_lost_after_its_last_words(
    ends: tuple[End, End], rude: TcpStranger, is_reset: bool
) -> None:
    _, bob = ends
    rude.sock.sendall(frame(b"last words"))
    eventually(lambda: bob.heard, "the last words")
    if is_reset:
        rude.reset()
    else:
        rude.sock.close()
    bob.wait(lambda: bob.lost, "the end")
    assert bob.heard == [b"last words"]
    assert "reset by peer" in str(bob.lost[0]) if is_reset else "closed the connection" in str(bob.lost[0])
    with pytest.raises(PeerLost):
        bob.opened[0].send(b"x")


def is_refused(link: BaseLink) -> bool:
    """Whether a message is refused."""
    try:
        link.send(b"x")
    except PeerLost:
        return True
    return False


def test_what_a_gone_peer_said_is_heard_before_it_is_lost(ends: tuple[End, End], rude: TcpStranger) -> None:
    """Here it is the sender who notices first, with words of the peer still unread."""
    _, bob = ends
    with busy_reactor(bob):
        rude.sock.sendall(b"".join(frame(b"%d" % number) for number in range(5000)))
        rude.reset()
        eventually(lambda: is_refused(bob.opened[0]), "the sender to notice")
    bob.wait(lambda: bob.lost, "the end")
    assert bob.heard == [b"%d" % number for number in range(5000)]


def test_a_bye_is_told_from_a_loss(ends: tuple[End, End]) -> None:
    alice, bob = ends
    mine, theirs = alice.meet(bob)
    bob.on_message = lambda link, _message: link.say_bye()  # type: ignore[attr-defined]
    mine.send(b"bye")
    mine.close()
    bob.wait(lambda: bob.lost, "the end")
    assert "closed its agent" in str(bob.lost[0])
    assert theirs.lost is bob.lost[0]
    alice.wait(lambda: alice.lost == [mine.lost], "the end at this side")


def test_a_peer_that_comes_back_before_its_last_words_were_heard_keeps_its_new_link(
    ends: tuple[End, End], rude: TcpStranger
) -> None:
    _, bob = ends
    with TcpStranger(bob) as again:
        again.me = type(again.me).fresh("rude", rude.me.incarnation)
        challenge = again.challenge()
        with busy_reactor(bob):
            rude.sock.sendall(frame(b"last words"))
            rude.sock.close()
            again.say({"proof": again.proof(challenge, b""), "probe": 0})
        eventually(lambda: len(bob.opened) == 2, "the new link")
        assert bob.history == ["opened", "lost", "opened"]
        assert bob.heard == [b"last words"]
        assert bob.opened[1].lost is None


def test_a_peer_is_frozen_if_its_process_is_stopped_or_the_backends_probe_says_so(ends: tuple[End, End]) -> None:
    alice, bob = ends
    mine, _ = alice.meet(bob)
    assert not mine.is_frozen()  # on another host, and nobody probes it
    mine.probe = lambda: True
    assert mine.is_frozen()
    with subprocess.Popen(["sleep", "60"]) as child:
        mine.watch_process(child.pid)
        assert not mine.is_frozen()
        child.send_signal(signal.SIGSTOP)
        eventually(lambda: process_state(child.pid) == "T", "the process to stop")
        assert mine.is_frozen()
        child.kill()
        alice.wait(lambda: alice.lost, "the death to be heard")
        child.wait(PATIENCE)
    assert f"(pid {child.pid})" in str(alice.lost[0])
    mine.watch_process(child.pid)  # too late, and no harm


FORKER = """
import os, sys, time
from link_tools import End
from raynixl.record import AgentRecord
with End("forker") as end:
    record, host, port = AgentRecord.from_bytes(bytes.fromhex(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    end.connect(record, [(host, port)])
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        time.sleep(60)
    print(child, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_peer_is_lost_when_it_dies_also_if_a_child_that_it_forked_lives_on(ends: tuple[End, End]) -> None:
    _, bob = ends
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    command = [sys.executable, "-c", FORKER, bob.record.to_bytes().hex(), *map(str, bob.endpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            bob.wait(lambda: bob.lost, "the death to be heard")
            assert process_state(child) in ("S", "R")
        finally:
            os.kill(child, signal.SIGKILL)


def test_closing_is_heard_once_and_leaves_nothing(ends: tuple[End, End], nothing_left: Callable[[], list[str]]) -> None:
    alice, bob = ends
    held = len(nothing_left())
    for _ in range(20):
        mine, theirs = alice.meet(bob)
        mine.close()
        mine.close()
        bob.wait(lambda link=theirs: link.lost, "the end")
    eventually(lambda: len(alice.lost) == len(bob.lost) == 20, "each end")
    eventually(lambda: len(nothing_left()) <= held, "the descriptors to be closed")


def test_small_messages_wait_for_nothing(ends: tuple[End, End]) -> None:
    alice, bob = ends
    for link in alice.meet(bob):
        assert link._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert link._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

"""Greetings on a stream arrive whole however it is cut, nothing more is read, and the owner of an end is known."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from agent_tools import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from link_tools import framed

from raynixl import IntegrityError
from raynixl.backends.wire import MAX_GREETING_NBYTES, PacketWire, StreamWire, peer_pid

pytestmark = [pytest.mark.pure, pytest.mark.usefixtures("nothing_left")]
ANOTHER_USER = """
import encodings.idna, os, socket, sys  # all that the new user may not be allowed to read
os.setresuid(65534, 65534, 65534)
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
    print(sock.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[socket.socket]:
    """A listening socket."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as made:
        made.settimeout(PATIENCE)
        yield made


def received(wire: StreamWire, sender: socket.socket, pieces: list[bytes]) -> list[bytes]:
    """What a wire makes of pieces that come one after the other."""
    found = []
    for piece in pieces:
        sender.sendall(piece)
        left = len(piece)
        while left:
            before = left
            found += [greeting for greeting in [wire.receive()] if greeting is not None]
            left = len(wire.sock.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)) if has_more(wire.sock) else 0
            assert left < before, "nothing was read"
    return found


def has_more(sock: socket.socket) -> bool:
    """Whether something is there to be read."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


@settings(deadline=None)
@given(
    greetings=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 1300), max_size=12),
)
def test_greetings_arrive_whole_however_the_stream_is_cut(greetings: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(framed(greeting) for greeting in greetings)
    edges = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(stream)), len(stream)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
        assert received(StreamWire(ours), theirs, pieces) == greetings


def test_nothing_beyond_the_greeting_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = StreamWire(ours)
        StreamWire(theirs).send(b"the verdict")
        theirs.sendall(b"the first frame")
        assert wire.receive() is None
        assert wire.receive() == b"the verdict"
        assert ours.recv(100) == b"the first frame"


@pytest.mark.parametrize("nbytes", [0, MAX_GREETING_NBYTES + 1, (1 << 32) - 1])
def test_a_length_that_no_greeting_has_is_refused(nbytes: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(nbytes.to_bytes(4, "little"))
        with pytest.raises(IntegrityError, match=f"{nbytes} bytes"):
            StreamWire(ours).receive()


@pytest.mark.parametrize("said", [b"", b"\x05", framed(b"12345")[:-1]])
def test_an_end_within_a_greeting_is_an_error(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        wire = StreamWire(ours)
        theirs.sendall(said)
        theirs.close()
        with pytest.raises(ConnectionResetError):
            _ = [wire.receive() for _ in range(3)]


def test_packets_are_greetings() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            PacketWire(theirs).send(b"one")
            PacketWire(theirs).send(b"two")
            assert [PacketWire(ours).receive(), PacketWire(ours).receive()] == [b"one", b"two"]
            assert PacketWire(ours).is_own_user()
            assert peer_pid(ours) == os.getpid()
        with pytest.raises(ConnectionResetError):
            PacketWire(ours).receive()


def test_both_ends_of_a_connection_within_a_user_are_known_as_his(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()[:2]) as theirs, listener.accept()[0] as ours:
        assert StreamWire(ours).is_own_user()
        assert StreamWire(theirs).is_own_user()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_connection_is_known_as_his(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    command = [sys.executable, "-ISc", ANOTHER_USER, host, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        sock, peer = listener.accept()
        with sock:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == peer[1]
            assert not StreamWire(sock).is_own_user()


def test_who_has_left_is_nobodys(listener: socket.socket) -> None:
    theirs = socket.create_connection(listener.getsockname()[:2])
    with listener.accept()[0] as ours:
        theirs.close()
        assert not StreamWire(ours).is_own_user()


def test_a_connection_that_is_not_over_loopback_is_nobodys() -> None:
    class FromAfar(socket.socket):
        def getpeername(self) -> tuple[str, int]:
            return ("203.0.113.9", 5)

    with socket.socket() as near, FromAfar() as far:
        assert not StreamWire(near).is_own_user()  # not connected at all
        assert not StreamWire(far).is_own_user()

"""Sockets of this process found in /proc: looked at and touched without harm to whoever owns them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from agent_tools import PATIENCE, introduce, random_bytes
from lane_tools import TCP, config_for

from raynixl import Agent
from raynixl.backends.ucx_sockets import OwnSocket, own_sockets

N = 4096

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def default_timeout() -> Iterator[float]:
    """A default timeout of Python's sockets, as some programs set it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(1.0)
    yield 1.0
    socket.setdefaulttimeout(before)


def found(sock: socket.socket) -> OwnSocket | None:
    """What is found of a socket."""
    return next((one for one in own_sockets() if one.fd == sock.fileno()), None)


@pytest.mark.usefixtures("default_timeout")
def test_to_look_leaves_blocking_sockets_blocking() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        socket.create_connection(door.getsockname()) as near,
        door.accept()[0] as far,
    ):
        one, other = socket.socketpair()
        with one, other:
            everyone = (door, near, far, one, other)
            for sock in everyone:
                os.set_blocking(sock.fileno(), True)
            seen = found(door)
            assert seen is not None
            assert seen.is_open
            assert (found(near), found(far), found(one)).count(None) == 1
            assert all(os.get_blocking(sock.fileno()) for sock in everyone)


def test_sockets_of_datagrams_are_not_taken_for_tcp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target, socket.socket(type=socket.SOCK_DGRAM) as sock:
        target.bind(("127.0.0.1", 0))
        sock.connect(target.getsockname())
        assert found(sock) is None


def test_to_send_everybody_away_waits_for_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname(), 5) as near:
        door.setblocking(False)
        seen = found(door)
        assert seen is not None
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60.0)
        try:
            began = time.monotonic()
            seen.send_away()
            assert time.monotonic() - began < PATIENCE
        finally:
            socket.setdefaulttimeout(before)
        assert near.recv(1) == b""


@pytest.mark.usefixtures("default_timeout")
def test_a_first_transfer_neither_waits_for_the_default_timeout_nor_changes_a_socket_of_the_program() -> None:
    one, other = socket.socketpair()
    with one, other, Agent("alice", config=config_for(TCP)) as alice, Agent("bob", config=config_for(TCP)) as bob:
        os.set_blocking(one.fileno(), True)
        introduce(alice, bob)
        bob.register(random_bytes(N), name="bobs")
        mine = alice.register(np.zeros(N, np.uint8))
        alice.read(alice.peer("bob")["bobs"], mine, timeout=PATIENCE).wait(PATIENCE)
        assert np.array_equal(mine.array(), random_bytes(N))
        assert os.get_blocking(one.fileno())

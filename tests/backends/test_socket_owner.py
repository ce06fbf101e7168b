"""The kernel tells which user owns the other end of a connection of this host, by either of two ways."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from raynixl.backends import socket_owner
from raynixl.backends.socket_owner import End, owner

Ask = Callable[[int, End, End], int | None]
WAYS = [socket_owner._ask, socket_owner._read, owner]


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((request.param, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as near, listener.accept()[0] as far:
            yield near, far


def ends(sock: socket.socket) -> tuple[End, End]:
    return sock.getpeername()[:2], sock.getsockname()[:2]


@pytest.mark.parametrize("ask", WAYS)
def test_the_other_end_is_this_users(ask: Ask, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    assert ask(far.family, *ends(far)) == os.geteuid()
    assert ask(near.family, *ends(near)) == os.geteuid()


@pytest.mark.parametrize("ask", WAYS)
def test_nobody_owns_a_connection_that_is_not_there(ask: Ask, pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    theirs, ours = ends(far)
    assert ask(far.family, (theirs[0], 1), ours) is None
    near.close()
    assert ask(far.family, theirs, ours) is None  # it is no longer established

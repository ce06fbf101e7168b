"""Listening on several addresses with one port, and connecting to whichever address of a peer answers first."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from agent_tools import PATIENCE, eventually
from link_tools import LOOPBACK, SECRET, End, TcpStranger

from raynixl import BackendUnavailable, ConfigError, PeerLost, TransferTimeout
from raynixl.backends import listener as listener_module
from raynixl.backends.listener import Listener, dial

pytestmark = [pytest.mark.pure, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def end(nothing_left: Callable[[], list[str]]) -> Iterator[End]:
    """An end with a secret."""
    with End("guarded", secret=SECRET) as made:
        yield made


@pytest.fixture
def listening() -> Iterator[Callable[..., Listener]]:
    """Make listeners that admit nobody."""
    with End("owner") as owner, contextlib.ExitStack() as stack:

        def make(hosts: Sequence[str], port: int = 0) -> Listener:
            made = Listener(owner.local, hosts=hosts, port=port, admit=lambda newcomer: newcomer.sock.close())
            stack.callback(made.close)
            return made

        yield make


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """An address that takes no more connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        target = server.getsockname()
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(target)
        yield target


def refusing() -> tuple[str, int]:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()


def within(seconds: float) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def test_all_addresses_share_one_port_and_each_is_reached(end: End) -> None:
    assert [host for host, _ in end.listener.endpoints] == list(LOOPBACK)
    assert len({port for _, port in end.listener.endpoints}) == 1
    with End("friend", secret=SECRET) as friend:
        for number, endpoint in enumerate(end.listener.endpoints):
            friend.connect(end.record, [endpoint]).send(b"%d" % number)
        eventually(lambda: sorted(end.heard) == [b"0", b"1"], "both messages")


def test_a_chosen_port_is_used_and_a_taken_one_is_named(listening: Callable[..., Listener]) -> None:
    first = listening(LOOPBACK)
    port = first.endpoints[0][1]
    with pytest.raises(ConfigError, match=f"port {port} cannot be had.*in use") as caught:
        listening(LOOPBACK, port)
    assert "listen_port" in caught.value.hint
    first.close()
    assert listening(LOOPBACK, port).endpoints == [(host, port) for host in LOOPBACK]


def test_a_chosen_port_can_be_used_again_at_once(end: End) -> None:
    with End("friend", secret=SECRET) as friend:
        friend.meet(end)
        port = end.endpoint[1]
        end.close()
        Listener(friend.local, hosts=LOOPBACK, port=port, admit=lambda _: None).close()


def test_ports_differ_where_no_port_is_free_on_all(
    listening: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    listen_on = listener_module._listen_on

    def taken(host: str, port: int) -> socket.socket:
        if port:
            raise OSError(98, "Address already in use")
        return listen_on(host, port)

    monkeypatch.setattr(listener_module, "_listen_on", taken)
    made = listening(LOOPBACK)
    assert len({port for _, port in made.endpoints}) == 2
    for endpoint in made.endpoints:
        dial([endpoint], peer="owner", deadline=within(PATIENCE)).close()


def test_an_address_that_is_not_here_is_left_out(listening: Callable[..., Listener]) -> None:
    assert [host for host, _ in listening(["203.0.113.9", "127.0.0.1", "127.0.0.1"]).endpoints] == ["127.0.0.1"]
    for hosts in (["203.0.113.9"], ["no address"], []):
        with pytest.raises(BackendUnavailable, match="no address to listen on"):
            listening(hosts)


def test_a_closed_listener_refuses(listening: Callable[..., Listener]) -> None:
    made = listening(LOOPBACK)
    made.close()
    made.close()
    with pytest.raises(PeerLost, match="Connection refused"):
        dial(made.endpoints, peer="owner", deadline=within(PATIENCE))


def test_closing_sends_the_strangers_away(end: End) -> None:
    with TcpStranger(end) as stranger:
        assert stranger.challenge()
        end.listener.close()
        assert stranger.hear()["refusal"] == "closing"


def test_addresses_that_refuse_cost_no_time_and_are_all_named() -> None:
    dead = [refusing() for _ in range(20)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        dial([*dead, server.getsockname()], peer="far", deadline=within(2.0)).close()
    with pytest.raises(PeerLost) as caught:
        dial(dead, peer="far", deadline=within(2.0))
    assert "'far'" in str(caught.value)
    for _, port in dead:
        assert f"127.0.0.1 port {port} (Connection refused)" in str(caught.value)


def test_a_silent_address_delays_the_next_but_a_moment() -> None:
    with silent() as first, silent() as second, socket.create_server(("127.0.0.1", 0)) as server:
        sock = dial([first, second, server.getsockname()], peer="far", deadline=within(PATIENCE))
        with sock:
            assert sock.getpeername() == server.getsockname()


def test_when_none_answers_the_deadline_holds_and_each_is_named() -> None:
    dead = refusing()
    with silent() as mute:
        began = time.monotonic()
        with pytest.raises(TransferTimeout) as caught:
            dial([dead, mute], peer="far", deadline=within(0.4))
        assert time.monotonic() - began >= 0.4
    assert f"port {dead[1]} (Connection refused)" in str(caught.value)
    assert f"port {mute[1]} (no answer)" in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [("localhost", 1), ("", 1), ("no such", 1), ("\0", 1), ("é" * 300, 1), ("127.0.0.1", -1), ("127.0.0.1", 1 << 16)],
)
def test_what_is_no_address_is_said_and_no_name_is_looked_up(endpoint: tuple[str, int]) -> None:
    with pytest.raises(PeerLost, match="answers at none"):
        dial([endpoint], peer="far", deadline=within(PATIENCE))


def test_a_peer_without_addresses_is_lost() -> None:
    with pytest.raises(PeerLost, match="it names none"):
        dial([], peer="far", deadline=within(PATIENCE))


def test_a_socket_that_meets_itself_is_no_peer() -> None:
    """TCP joins a socket with itself if it happens to get the port that it connects to and nobody listens there."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert listener_module._is_own_echo(sock)


def test_without_descriptors_it_says_what_to_raise(end: End) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 8, hard))
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        with pytest.raises(BackendUnavailable, match="no socket for peer") as caught:
            dial([end.endpoint], peer="guarded", deadline=within(PATIENCE))
        os.close(fillers.pop())
        sock = dial([end.endpoint], peer="guarded", deadline=within(PATIENCE))
        eventually(lambda: end.dropped["greeting: no descriptors"], "the count")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    assert "ulimit" in caught.value.hint
    sock.close()
    with End("friend", secret=SECRET) as friend:
        friend.meet(end)
    assert end.dropped["greeting: no descriptors"] < 5


def test_the_first_to_connect_wins_and_the_others_are_closed() -> None:
    with silent() as mute, socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []
        thread = threading.Thread(target=lambda: taken.append(server.accept()[0]))
        thread.start()
        with dial([mute, server.getsockname(), refusing()], peer="far", deadline=within(PATIENCE)) as sock:
            thread.join(PATIENCE)
            with taken[0]:
                assert sock.getsockname() == taken[0].getpeername()
                assert not select.select([server], [], [], 0)[0]

"""The guard lets only admitted addresses reach the sockets that were opened under its eyes, and no others."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address

import pytest
from ucx_tools import is_heard

from raynixl import IntegrityError
from raynixl.backends import ucx_sockets
from raynixl.backends.ucx_filter import IpAddress
from raynixl.backends.ucx_guard import LOOPBACK, Guard, own_sources, sources
from raynixl.backends.ucx_wireup import MAX_ADDRESSES, Hello, parse_wireup
from raynixl.topology import addresses

pytestmark = pytest.mark.usefixtures("nothing_left")
ALICE, BOB, MALLORY = "127.0.0.2", "127.0.0.3", "127.0.0.4"


def of(*texts: str) -> set[IpAddress]:
    """Addresses."""
    return {ip_address(text) for text in texts}


def listening() -> socket.socket:
    """A socket as UCX makes its own: it does not block."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def adopted(guard: Guard) -> socket.socket:
    """A socket that the guard has seen being opened."""
    with guard.watch() as adopt:
        sock = listening()
        adopt(b"..." + sock.getsockname()[1].to_bytes(2) + b"...", 1)
    return sock


@contextlib.contextmanager
def connected(door: socket.socket, source: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection from there."""
    with socket.create_connection(door.getsockname(), timeout=5, source_address=(source, 0)) as near:
        far = door.accept()[0]
        with far:
            far.settimeout(5)
            yield near, far


def test_before_a_peer_is_admitted_nobody_is_heard_not_even_this_host() -> None:
    guard = Guard("a")
    with adopted(guard) as door:
        assert not is_heard(door.getsockname())
        assert not is_heard(door.getsockname(), source=ALICE)


def test_who_is_admitted_is_heard_and_nobody_else() -> None:
    guard = Guard("a")
    guard.admit("alice", of(ALICE))
    with adopted(guard) as door:
        assert is_heard(door.getsockname(), source=ALICE)
        assert not is_heard(door.getsockname(), source=BOB)
        guard.admit("bob", of(BOB, "fd00::1"))
        assert is_heard(door.getsockname(), source=BOB)
        assert not is_heard(door.getsockname(), source=MALLORY)


def test_ipv6_is_guarded_alike() -> None:
    guard = Guard("a")
    with guard.watch() as adopt:
        try:
            door = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError as exc:
            pytest.skip(f"no IPv6 here: {exc}")
        adopt(door.getsockname()[1].to_bytes(2), 1)
    with door, socket.socket(socket.AF_INET6) as sock:
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.connect(door.getsockname())
        guard.admit("alice", of("::1"))
        with socket.create_connection(door.getsockname()[:2], timeout=5):
            pass


def test_a_dismissed_peer_is_cut_off_and_connections_of_others_stand() -> None:
    guard = Guard("a")
    guard.admit("alice", of(ALICE))
    guard.admit("bob", of(BOB))
    with (
        adopted(guard) as door,
        connected(door, ALICE) as (alice, at_alice),
        connected(door, BOB) as (bob, at_bob),
    ):
        guard.dismiss("alice")
        assert not is_heard(door.getsockname(), source=ALICE)
        alice.sendall(b"last words")  # UCX may still have to answer them
        assert at_alice.recv(100) == b"last words"
        guard.sever()
        assert alice.recv(1) == at_alice.recv(1) == b""
        bob.sendall(b"still here")
        assert at_bob.recv(100) == b"still here"
        assert is_heard(door.getsockname(), source=BOB)


def test_an_address_of_two_peers_is_admitted_until_both_have_gone() -> None:
    guard = Guard("a")
    guard.admit("one", of(ALICE))
    guard.admit("other", of(ALICE, BOB))
    with adopted(guard) as door, connected(door, ALICE) as (near, far):
        guard.dismiss("one")
        guard.dismiss("one")
        guard.sever()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        guard.dismiss("other")
        guard.sever()
        assert far.recv(1) == b""


def test_a_connection_survives_that_others_come_and_go() -> None:
    guard = Guard("a")
    guard.admit("alice", of(ALICE))
    with adopted(guard) as door, connected(door, ALICE) as (near, far):
        for number in range(50):
            guard.admit(number, of(f"10.0.{number}.1"))
        for number in range(50):
            guard.dismiss(number)
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_who_connected_before_there_was_a_filter_is_sent_away() -> None:
    guard = Guard("a")
    with guard.watch() as adopt:
        door = listening()
        early = [socket.create_connection(door.getsockname(), timeout=5) for _ in range(3)]
        taken = door.accept()[0]
        adopt(door.getsockname()[1].to_bytes(2), 1)
    with door, taken:
        for one in early:
            with one, contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""


def test_sockets_of_others_are_left_alone() -> None:
    guard = Guard("a")
    with listening() as before, guard.watch() as adopt, listening() as meanwhile, listening() as ours:
        adopt(ours.getsockname()[1].to_bytes(2), 1)
        assert is_heard(before.getsockname())
        assert is_heard(meanwhile.getsockname())
        assert not is_heard(ours.getsockname())


def test_a_descriptor_that_is_anothers_by_now_is_left_alone() -> None:
    guard = Guard("a")
    door = adopted(guard)
    number = door.fileno()
    door.close()
    with listening() as other:
        assert other.fileno() == number, "descriptors are given out from the lowest"
        guard.admit("alice", of(ALICE))
        guard.close()
        assert is_heard(other.getsockname())


def test_workers_of_one_process_are_watched_one_at_a_time() -> None:
    guards = [Guard(str(number)) for number in range(4)]
    doors: list[socket.socket] = []
    threads = [threading.Thread(target=lambda one=one: doors.append(adopted(one))) for one in guards]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    assert [len(one._listening) for one in guards] == [1, 1, 1, 1]
    for one in doors:
        one.close()


def test_a_closed_guard_hears_nobody_any_more() -> None:
    guard = Guard("a")
    guard.admit("alice", of(ALICE))
    with adopted(guard) as door, connected(door, ALICE) as (near, far):
        guard.close()
        guard.admit("bob", of(BOB))
        assert not is_heard(door.getsockname(), source=ALICE)
        assert not is_heard(door.getsockname(), source=BOB)
        near.sendall(b"x")
        assert far.recv(1) == b"x", "UCX closes its own connections"


def test_many_hosts_are_told_apart_and_more_than_fit_are_let_in_by_networks(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("a")
    with adopted(guard) as door, caplog.at_level(logging.WARNING):
        guard.admit("a thousand", {IPv4Address(0x7F000000 + 2 * n) for n in range(1, 1001)})
        assert not caplog.records
        assert is_heard(door.getsockname(), source="127.0.0.2")
        assert not is_heard(door.getsockname(), source="127.0.0.3")
        guard.admit("many", {IPv4Address(0x0A000000 + 1024 * n) for n in range(20000)})
        assert ["whole networks" in record.message for record in caplog.records] == [True]
        assert is_heard(door.getsockname(), source="127.0.0.2")
        guard.admit("one more", of("10.200.0.1"))
        assert len(caplog.records) == 1


def test_a_kernel_that_refuses_filters_is_reported_once_and_leaves_the_port_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_sock: object, _program: bytes) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(ucx_sockets, "_attach", refuse)
    guard = Guard("a")
    with adopted(guard) as door:
        guard.admit("alice", of(ALICE))
        guard.dismiss("alice")
        assert is_heard(door.getsockname(), source=BOB)
    assert len([record for record in caplog.records if "are open" in record.message]) == 1
    assert "Operation not permitted" in guard.reason
    assert ucx_sockets.why_no_filter() == "Operation not permitted"


def test_ports_that_are_not_found_are_reported_and_the_others_guarded(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("a")
    with guard.watch() as adopt, listening() as found, listening():
        adopt(found.getsockname()[1].to_bytes(2), 2)
        assert "only 1 of its 2 ports" in caplog.text
        guard.admit("alice", of(ALICE))
        assert is_heard(found.getsockname(), source=ALICE)
        assert not is_heard(found.getsockname(), source=BOB)


def test_a_peer_of_another_host_opens_nothing_to_the_users_of_this_one() -> None:
    ours = {ip_address(one.ip) for one in addresses()}
    stated = ["10.9.8.7", "127.0.0.1", *map(str, ours)]
    assert sources(stated, ip_address("10.9.8.6")) == of("10.9.8.7", "10.9.8.6")
    assert sources(stated, None) == of("10.9.8.7"), "the link is gone already"


def test_a_peer_that_shares_our_network_may_come_by_loopback() -> None:
    for remote in {ip_address(one.ip) for one in addresses()} | LOOPBACK:
        assert sources(["10.9.8.7"], remote) == LOOPBACK | of("10.9.8.7") | {remote}


def test_a_host_states_its_addresses_and_a_bounded_number_of_them() -> None:
    stated = own_sources(addresses())
    assert set(stated) == {one.ip for one in addresses() if not one.is_loopback}
    many = Hello(host="h", pid=1, addresses=tuple(f"10.0.0.{n}" for n in range(MAX_ADDRESSES)))
    assert parse_wireup(many.model_dump_json().encode()) == many


@pytest.mark.parametrize("wrong", [["nonsense"], ["fe80::1%eth0"], ["10.0.0.0/8"], [7], ["1.2.3.4"] * 65, "1.2.3.4"])
def test_a_hello_with_anything_else_than_addresses_is_refused(wrong: object) -> None:
    body = Hello(host="h", pid=1).model_dump(mode="json") | {"addresses": wrong}
    with pytest.raises(IntegrityError):
        parse_wireup(json.dumps(body).encode())

"""Agents on different hosts, over UCX and TCP: what they promise holds across cables, and when these are cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from agent_tools import make_config
from hosts_tools import Bed, Host

from raynixl import BackendUnavailable, PeerLost, TransferTimeout
from raynixl.backends.shm import ShmBackend
from raynixl.backends.ucx import UcxBackend
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess

N = 1 << 20
QUICK = {"heartbeat_interval": 0.2, "heartbeat_timeout": 1.0, "transfer_timeout": 3.0, "connect_timeout": 3.0}
Put = Callable[..., FarProcess]


@pytest.fixture
def put(bed: Bed, nothing_left: Callable[[], list[str]]) -> Iterator[Put]:
    """Put agents on hosts, each with a region 'arena' and a region 'user': put(host, name, factory, **settings)."""
    made: list[FarProcess] = []

    def start(host: Host, name: str, factory: Any, **settings: Any) -> FarProcess:
        far = FarProcess(
            factory,
            make_config(secret=b"of the hosts", ucx={"TLS": "tcp"}, **settings),
            is_busy=False,
            launch=host.run_warm,
        )
        made.append(far)
        far.open(name)
        for seed, memory in enumerate(("arena", "user")):
            far.ask("make", memory, N, memory, seed)
        return far

    yield start
    for far in made:
        far.close()


def meet(*agents: FarProcess) -> None:
    """Make every agent known to every other."""
    for one in agents:
        for other in agents:
            if one is not other:
                one.ask("meet", other.ask("record"))


def test_shm_serves_one_host_and_says_why_it_reaches_no_other(bed: Bed, put: Put) -> None:
    first, second = bed
    alice, bob, carol = (
        put(host, name, ShmBackend) for host, name in ((first, "alice"), (first, "bob"), (second, "carol"))
    )
    meet(alice, bob, carol)
    alice.ask("copy", "read", "arena", "bob", "user")
    assert alice.ask("content", "arena") == pattern(N, 1).tobytes()
    with pytest.raises(BackendUnavailable, match="host") as caught:
        alice.ask("copy", "read", "arena", "carol", "user")
    assert caught.value.hint


@pytest.mark.parametrize("memory", ["arena", "user"])
def test_bytes_notifications_and_answers_cross_between_hosts(bed: Bed, put: Put, memory: str) -> None:
    first, second = bed
    alice, bob = put(first, "alice", UcxBackend), put(second, "bob", UcxBackend)
    meet(alice, bob)
    for near, far, peer in ((alice, bob, "bob"), (bob, alice, "alice")):
        far.ask("fill", memory, 7)
        near.ask("copy", "read", memory, peer, memory)
        assert near.ask("content", memory) == pattern(N, 7).tobytes()
        near.ask("fill", memory, 8)
        near.ask("copy", "write", memory, peer, memory)
        assert far.ask("content", memory) == pattern(N, 8).tobytes()
        near.ask("notify", peer, [b"one", b"two"])
        assert far.ask("hear", 2) == [b"one", b"two"]
        assert near.ask("ask", peer, b"are you there?") == b"are you there?"


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_cable_cut_amid_a_transfer_fails_it_and_healed_it_carries_again(bed: Bed, put: Put, op: str) -> None:
    first, second = bed
    alice = put(first, "alice", UcxBackend, **QUICK)
    bob = put(second, "bob", UcxBackend, **QUICK)
    meet(alice, bob)
    alice.ask("copy", op, "arena", "bob", "arena")
    bed.cap(second, 0.02)
    large = 16 << 20  # six seconds and more, at that cap
    for agent in (alice, bob):
        agent.ask("make", "large", large, "arena", 3)
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(alice.ask, "copy", op, "large", "bob", "large")
        time.sleep(0.3)
        bed.cut(second)
        with pytest.raises((PeerLost, TransferTimeout)):
            copying.result(60)
    bed.free(second)
    bed.heal(second)
    bob.ask("fill", "large", 4 if op == "read" else 5)
    alice.ask("fill", "large", 5 if op == "read" else 4)
    alice.ask("copy", op, "large", "bob", "large")
    for agent in (alice, bob):
        assert agent.ask("content", "large") == pattern(large, 4).tobytes()


def test_a_host_that_vanishes_is_lost_in_time_and_the_others_go_on(bed: Bed, put: Put) -> None:
    first, second = bed
    alice, bob, carol = (
        put(host, name, UcxBackend, **QUICK) for host, name in ((first, "alice"), (second, "bob"), (first, "carol"))
    )
    meet(alice, bob, carol)
    for peer in ("bob", "carol"):
        alice.ask("copy", "read", "arena", peer, "user")
    second.close()
    with pytest.raises((PeerLost, TransferTimeout)):
        alice.ask("copy", "read", "arena", "bob", "user")
    carol.ask("fill", "user", 9)
    alice.ask("copy", "read", "arena", "carol", "user")
    assert alice.ask("content", "arena") == pattern(N, 9).tobytes()

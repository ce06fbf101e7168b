"""UCX's ports across hosts: a host that has no agent that proved itself is not heard, and nobody waits for a filter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from agent_tools import eventually, make_config
from hosts_tools import Bed, Host
from ucx_tools import ucx_ports

from raynixl.backends.ucx import UcxBackend
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess

pytest.importorskip("ucxx", reason="the ucx backend needs ucxx")
N = 1 << 20
KNOCK = """
import json, sys
from ucx_tools import is_heard
print(json.dumps([is_heard(tuple(one)) for one in json.loads(sys.argv[1])]))
"""
Put = Callable[..., FarProcess]


@pytest.fixture
def three(_hosts_allowed: None) -> Iterator[Bed]:
    """Three hosts on two networks."""
    with Bed(3) as made:
        made.second_rail()
        yield made


@pytest.fixture
def put(three: Bed, nothing_left: Callable[[], list[str]]) -> Iterator[Put]:
    """Put agents on hosts, each with a region 'arena'."""
    made: list[FarProcess] = []

    def start(host: Host, name: str, *, seed: int, **settings: Any) -> FarProcess:
        ucx = {"TLS": "tcp"} | settings.pop("ucx", {})
        config = make_config(secret=b"of the hosts", ucx=ucx, **settings)
        far = FarProcess(UcxBackend, config, is_busy=False, launch=host.run_warm)
        made.append(far)
        far.open(name)
        far.ask("make", "arena", N, "arena", seed)
        return far

    yield start
    for far in made:
        far.close()


def heard_from(host: Host, targets: list[tuple[str, int]]) -> list[bool]:
    """Whether a process of the host gets through to each."""
    answers: list[bool] = json.loads(host.ask(KNOCK, json.dumps(targets)))
    return answers


def open_ports(far: FarProcess) -> list[tuple[str, int]]:
    """UCX's ports that other hosts can reach."""
    return sorted(one for one in ucx_ports(far.pid, far.ask("record")) if not one[0].startswith("127."))


def check_reads(reader: FarProcess, peer: str, seed: int) -> None:
    """The peer's bytes arrive."""
    reader.ask("copy", "read", "arena", peer, "arena")
    assert reader.ask("content", "arena") == pattern(N, seed).tobytes()


def test_a_host_is_heard_from_the_moment_its_agent_has_proved_itself_until_it_has_gone(three: Bed, put: Put) -> None:
    first, second, third = three
    alice, bob = put(first, "alice", seed=1), put(second, "bob", seed=2)
    alice.ask("meet", bob.ask("record"))
    check_reads(alice, "bob", 2)
    ports = open_ports(bob)
    assert {ip for ip, _ in ports} == {second.address_on(0), second.address_on(1)}
    others = open_ports(alice)
    assert not any(heard_from(third, ports + others))
    bob.ask("fill", "arena", 3)
    check_reads(alice, "bob", 3)
    carol = put(third, "carol", seed=4)
    carol.ask("meet", bob.ask("record"))
    check_reads(carol, "bob", 3)
    assert all(heard_from(first, ports))
    assert all(heard_from(third, ports))
    assert not any(heard_from(third, others)), "carol is no peer of alice"
    carol.close_agent()
    eventually(lambda: not any(heard_from(third, ports)), "the host to be dismissed")
    bob.ask("fill", "arena", 5)
    check_reads(alice, "bob", 5)


def test_no_packet_of_ucx_is_ever_dropped_between_peers_that_come_and_go(three: Bed, put: Put) -> None:
    first, second, third = three
    bob = put(second, "bob", seed=2)
    others = {"alice": first, "carol": third}
    agents = {name: put(host, name, seed=1) for name, host in others.items()}
    before = [_resent(far) for far in (bob, *agents.values())]
    for turn in range(6):
        for name, far in agents.items():
            far.ask("meet", bob.ask("record"))
            bob.ask("meet", far.ask("record"))
            one, other = (far, "bob"), (bob, name)
            pairs = (one, other) if turn % 2 else (other, one)
            with ThreadPoolExecutor(1 + turn // 3) as pool:  # one after the other; later both at once
                list(pool.map(lambda pair: pair[0].ask("copy", "read", "arena", pair[1], "arena"), pairs))
        for name, far in agents.items():
            far.close_agent()
            far.open(name)
            far.ask("make", "arena", N, "arena", turn)
    bobs, *theirs = [_resent(far) - count for far, count in zip((bob, *agents.values()), before, strict=True)]
    assert theirs == [0, 0], "a SYN was resent: its target did not hear it"
    # bob reads only; the connection for writes may still be under way when they close, and let nobody in any more.
    assert bobs <= 6 * len(agents)


def test_a_network_that_only_ucx_uses_is_admitted_too(three: Bed, put: Put) -> None:
    first, second, third = three
    apart = {"interfaces": ("eth0",), "ucx": {"NET_DEVICES": "eth1"}}
    alice, bob = put(first, "alice", seed=1, **apart), put(second, "bob", seed=2, **apart)
    alice.ask("meet", bob.ask("record"))
    check_reads(alice, "bob", 2)
    ports = open_ports(bob)
    assert {ip for ip, _ in ports} == {second.address_on(1)}
    assert not any(heard_from(third, ports))
    assert all(heard_from(first, ports))


def test_a_peer_whose_ucx_cannot_be_reached_holds_up_no_other(three: Bed, put: Put) -> None:
    first, second, third = three
    apart = {"interfaces": ("eth0",), "ucx": {"NET_DEVICES": "eth1"}}
    alice = put(first, "alice", seed=1, **apart)
    bob, carol = put(second, "bob", seed=2, **apart), put(third, "carol", seed=3, **apart)
    for far in (bob, carol):
        alice.ask("meet", far.ask("record"))
    carol.ask("meet", bob.ask("record"))
    check_reads(carol, "bob", 2)  # both have started UCX
    carol.ask("fill", "arena", 3)
    check_reads(alice, "carol", 3)
    three.cut(second, rail=1)
    assert alice.ask("flood", "write", "arena", "bob", "arena", 1) is None
    for seed in (4, 5, 6):
        carol.ask("fill", "arena", seed)
        check_reads(alice, "carol", seed)
    assert alice.ask("flood_ends") in (["TransferTimeout"], ["PeerLost"])
    three.heal(second, rail=1)
    check_reads(alice, "bob", 2)


def test_ipv6_is_guarded_alike(three: Bed, put: Put) -> None:
    first, second, third = three
    six = {"ucx": {"NET_DEVICES": "eth0", "TCP_AF_PRIO": "inet6"}}
    alice, bob = put(first, "alice", seed=1, **six), put(second, "bob", seed=2, **six)
    alice.ask("meet", bob.ask("record"))
    check_reads(alice, "bob", 2)
    ports = open_ports(bob)
    assert {ip for ip, _ in ports} == {second.address6_on(0)}
    assert not any(heard_from(third, ports))
    assert all(heard_from(first, ports))


def _resent(far: FarProcess) -> int:
    """How many of a host's first packets of connections had to be sent again."""
    rows = [row.split() for row in Path(f"/proc/{far.pid}/net/netstat").read_text(encoding="ascii").splitlines()]
    names, values = (row for row in rows if row[0] == "TcpExt:")
    return int(values[names.index("TCPSynRetrans")])

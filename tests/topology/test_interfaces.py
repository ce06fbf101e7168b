"""The addresses of this host, and the order in which those of a peer are dialled."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl import ConfigError, IntegrityError
from raynixl.topology import Address, addresses, by_nearness, parse_address, same_subnet

LOOPBACK = Address("lo", "127.0.0.1", 8)
OURS = [Address("eth0", "10.0.0.1", 24), Address("docker0", "172.17.0.1", 16), LOOPBACK]


def ips(found: list[Address]) -> list[str]:
    return [one.ip for one in found]


def v4(ip: str, prefix: int = 24) -> Address:
    return Address("eth0", ip, prefix)


def test_this_host_has_its_loopback_and_it_comes_last() -> None:
    found = addresses()
    assert found[-1].is_loopback
    assert "127.0.0.1" in ips(found)
    order = [one.is_loopback for one in found]
    assert order == sorted(order)
    assert len(set(found)) == len(found)


def test_every_address_of_this_host_can_be_listened_on() -> None:
    for one in addresses():
        with socket.socket(one.family) as listener:
            listener.bind((one.ip, 0))


def test_named_interfaces_alone_are_looked_at() -> None:
    assert {one.interface for one in addresses(["lo"])} == {"lo"}


def test_an_unknown_interface_is_refused_and_those_that_exist_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'nowhere0'.*name some of .*\blo\b"):
        addresses(["lo", "nowhere0"])


SCENE = """
set -e
ip link add a0 type veth peer name b0
ip link add c0 type veth peer name d0
ip link set lo up; ip link set a0 up; ip link set b0 up; ip link set c0 up
ip addr add 10.9.0.1/24 dev a0
ip addr add 10.9.1.1/26 dev a0 label a0:1
ip addr add fd09::1/64 dev a0 nodad
ip addr add 10.9.2.1/24 dev c0
ip addr add 10.9.3.1/24 dev d0
ip addr add 169.254.7.1/16 dev b0
ip addr add 10.9.4.1/32 dev lo
exec "$0" -c "$1"
"""
LISTING = (
    "import json; from raynixl.topology import addresses as a; print(json.dumps([(x.interface, str(x)) for x in a()]))"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a network namespace")
@pytest.mark.skipif(not shutil.which("ip") or not shutil.which("unshare"), reason="needs iproute2 and unshare")
def test_addresses_of_interfaces_of_all_sorts() -> None:
    scene = ["unshare", "--net", "sh", "-c", SCENE, sys.executable, LISTING]
    ended = subprocess.run(scene, capture_output=True, text=True, timeout=60, check=False)
    if ended.returncode != 0 and ("not permitted" in ended.stderr or "not supported" in ended.stderr):
        pytest.skip(f"network namespaces or veth are not to be had here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    assert [tuple(one) for one in json.loads(ended.stdout)] == [
        ("lo", "10.9.4.1/32"),  # a routable address on lo
        ("a0", "10.9.0.1/24"),
        ("a0", "10.9.1.1/26"),  # an alias
        ("a0", "fd09::1/64"),
        ("b0", "169.254.7.1/16"),  # link-local
        ("c0", "10.9.2.1/24"),  # without a carrier, since d0 is down
        ("lo", "127.0.0.1/8"),
        ("lo", "::1/128"),
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (v4("10.0.0.1"), v4("10.0.0.2"), True),
        (v4("10.0.0.1"), v4("10.0.1.2"), False),
        (v4("10.0.0.1", 16), v4("10.0.1.2", 24), False),  # only one of them thinks so
        (v4("10.0.0.1", 32), v4("10.0.0.2", 32), False),  # as clouds hand them out: everything goes by a router
        (v4("fd00::1", 64), v4("fd00::2", 64), True),
        (v4("fd00::1", 64), v4("10.0.0.1"), False),
    ],
)
def test_two_are_in_one_subnet_if_both_think_so(one: Address, other: Address, same: bool) -> None:
    assert same_subnet(one, other) is same
    assert same_subnet(other, one) is same


def test_our_subnets_come_before_what_routers_reach_and_loopback_is_left_out() -> None:
    theirs = [LOOPBACK, v4("192.168.7.7"), v4("10.0.0.9")]
    assert ips(by_nearness(theirs, OURS)) == ["10.0.0.9", "192.168.7.7"]


def test_loopback_is_first_on_the_same_host() -> None:
    theirs = [v4("10.0.0.1"), LOOPBACK]
    assert ips(by_nearness(theirs, OURS, same_host=True)) == ["127.0.0.1", "10.0.0.1"]


def test_an_address_that_we_have_ourselves_is_tried_last() -> None:
    theirs = [Address("docker0", "172.17.0.1", 16), v4("192.168.7.7"), v4("fd00::7", 64)]
    assert ips(by_nearness(theirs, OURS)) == ["192.168.7.7", "fd00::7", "172.17.0.1"]


def test_link_local_addresses_are_for_hosts_cabled_to_each_other() -> None:
    theirs = [v4("169.254.9.9", 16), v4("192.168.7.7"), v4("10.0.0.9")]
    assert ips(by_nearness(theirs, OURS)) == ["10.0.0.9", "192.168.7.7", "169.254.9.9"]
    cabled = [*OURS, Address("eth1", "169.254.1.1", 16)]
    assert ips(by_nearness(theirs, cabled)) == ["10.0.0.9", "169.254.9.9", "192.168.7.7"]


addresses_of_anybody = st.builds(
    Address,
    st.just("eth0"),
    st.one_of(st.ip_addresses(v=4).map(str), st.sampled_from(["10.0.0.1", "10.0.0.2", "127.0.0.1", "172.17.0.1"])),
    st.integers(0, 32),
) | st.builds(Address, st.just("eth0"), st.ip_addresses(v=6).map(str), st.integers(0, 128))


@given(st.lists(addresses_of_anybody, max_size=8), st.lists(addresses_of_anybody, max_size=4), st.booleans())
def test_none_that_may_lead_there_is_lost_and_none_is_made_up(
    theirs: list[Address], ours: list[Address], same_host: bool
) -> None:
    ordered = by_nearness(theirs, ours, same_host=same_host)
    assert sorted(map(str, ordered)) == sorted(str(one) for one in theirs if same_host or not one.is_loopback)


@given(st.lists(addresses_of_anybody, max_size=8), st.lists(addresses_of_anybody, max_size=4))
def test_no_router_is_tried_before_a_neighbour(theirs: list[Address], ours: list[Address]) -> None:
    outside = [own for own in ours if not own.is_loopback]
    is_near = [
        any(same_subnet(one, own) for own in outside) and one.ip not in {own.ip for own in ours}
        for one in by_nearness(theirs, ours)
        if not one.is_link_local
    ]
    assert is_near == sorted(is_near, reverse=True)


@given(addresses_of_anybody)
def test_an_address_is_read_back_as_it_is_written(address: Address) -> None:
    assert parse_address(str(address), interface=address.interface) == address


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1/33", "10.0.0/24", "fe80::1%eth0/64", "x" * 5000, "10.0.0.1/-1"]
)
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_address(text)
    assert len(str(caught.value)) < 300

"""Packet filters let in what they name and nothing else, as a machine for them and as the kernel reads them."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.backends.ucx_filter import MAX_INSTRUCTIONS, WIDTHS, IpAddress, compile_filter, count

_NETWORK = 0xFFF00000

v4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
near_v4 = st.integers(0, 600).map(lambda low: ipaddress.IPv4Address(0x0A000000 + low))
near_v6 = st.builds(
    lambda net, low: ipaddress.IPv6Address((0xFD << 120) + (net << 64) + low), st.integers(0, 3), st.integers(0, 2**34)
)
v6 = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)
any_address = st.one_of(v4, near_v4, v6, near_v6)


def header(source: IpAddress) -> bytes:
    """An IP header that comes from there."""
    if source.version == 4:
        return bytes([0x45]) + bytes(11) + source.packed + bytes(4)
    return bytes([0x60]) + bytes(7) + source.packed + bytes(16)


def is_let_in(program: bytes, source: IpAddress) -> bool:
    """Run a program as the kernel does; jumps that lead out of it are errors."""
    packet, instructions, at, word = header(source), list(struct.iter_unpack("=HBBI", program)), 0, 0
    for _ in range(len(instructions)):
        code, if_true, if_false, k = instructions[at]
        at += 1
        match code:
            case 0x06:
                assert k in (0, 0xFFFFFFFF)
                return k > 0
            case 0x20:
                word = int.from_bytes(packet[k - _NETWORK : k - _NETWORK + 4])
            case 0x30:
                word = packet[k - _NETWORK]
            case 0x74:
                word >>= k
            case 0x05:
                at += k
            case 0x15 | 0x25 | 0x35:
                holds = {0x15: word == k, 0x25: word > k, 0x35: word >= k}[code]
                at += if_true if holds else if_false
            case _:
                raise AssertionError(f"an operation {code:#x} that it has no need of")
    raise AssertionError("the program runs in circles")


def is_taken(program: bytes) -> bool:
    """Whether the kernel takes it for a socket."""
    memory = ctypes.create_string_buffer(program, len(program))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("@HP", count(program), ctypes.addressof(memory)))
    return True


@given(admitted=st.sets(any_address, max_size=60), others=st.sets(any_address, max_size=60))
def test_exactly_the_addresses_that_are_named_are_let_in(admitted: set[IpAddress], others: set[IpAddress]) -> None:
    program = compile_filter(admitted)
    assert is_taken(program)
    for one in admitted | others:
        assert is_let_in(program, one) == (one in admitted), one


def test_nobody_is_let_in_where_nobody_is_named() -> None:
    program = compile_filter([])
    for text in ("127.0.0.1", "0.0.0.0", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1"):
        assert not is_let_in(program, ipaddress.ip_address(text))


def test_a_thousand_scattered_hosts_of_both_families_fit_exactly() -> None:
    hosts = [ipaddress.IPv4Address(0x0A000000 + 7 * 911 * n) for n in range(1000)]
    hosts6 = [ipaddress.IPv6Address((0xFD << 120) + 7919 * n) for n in range(1000)]
    program = compile_filter([*hosts, *hosts6])
    assert count(program) <= MAX_INSTRUCTIONS
    assert is_taken(program)
    assert all(is_let_in(program, one) for one in (*hosts, *hosts6))
    assert not any(is_let_in(program, one + 1) for one in (*hosts, *hosts6))


def test_hosts_numbered_one_after_the_other_cost_no_more_than_one() -> None:
    block = [ipaddress.IPv4Address(0x0A000001 + n) for n in range(5000)]
    assert count(compile_filter(block)) < 20


@given(st.sets(st.one_of(v4, v6), min_size=1, max_size=40), st.sampled_from(WIDTHS))
@settings(max_examples=60, deadline=None)
def test_widened_filters_let_in_at_least_what_is_named(admitted: set[IpAddress], width: tuple[int, int]) -> None:
    program = compile_filter(admitted, width)
    assert all(is_let_in(program, one) for one in admitted)


def test_the_widest_filters_fit_whatever_is_named() -> None:
    everywhere = [ipaddress.IPv4Address(n << 24) for n in range(0, 256, 2)]
    everywhere6 = [ipaddress.IPv6Address(n << 120) for n in range(0, 256, 2)]
    program = compile_filter([*everywhere, *everywhere6], WIDTHS[-1])
    assert count(program) <= MAX_INSTRUCTIONS // 4, "half of what old kernels have room for, twice"
    assert is_taken(program)

"""Packet filters: programs of classic BPF that let a TCP socket hear certain source addresses only. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

IpAddress = IPv4Address | IPv6Address

MAX_INSTRUCTIONS = 4096
"""What the kernel takes (BPF_MAXINSNS)."""
WIDTHS = ((32, 128), (28, 64), (24, 56), (20, 48), (16, 40), (12, 32), (8, 8))
"""Lengths of the prefixes that addresses are widened to, IPv4 and IPv6, until they fit; the last always do."""

_LEAF = 16
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here count from the IP header
_LOAD, _LOAD_BYTE, _SHIFT, _RETURN = 0x20, 0x30, 0x74, 0x06
_JUMP, _IF_EQUAL, _IF_GREATER, _IF_AT_LEAST = 0x05, 0x15, 0x25, 0x35

_Instruction = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, operand."""

_ACCEPT: _Instruction = (_RETURN, 0, 0, 0xFFFFFFFF)
_DROP: _Instruction = (_RETURN, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Values of one word of an address, and what then looks at the next word; () accepts at once."""

    low: int
    high: int
    then: Sequence[_Instruction] = ()


def compile_filter(addresses: Iterable[IpAddress], width: tuple[int, int] = WIDTHS[0]) -> bytes:
    """Return the program that lets in what comes from networks, with prefixes so long, that hold the addresses.

    As the kernel takes it, but for its length: that may exceed MAX_INSTRUCTIONS. Addresses are found by bisection: a
    thousand cost some twenty comparisons.
    """
    known = list(addresses)
    v4 = _match({int(one) for one in known if one.version == 4}, width[0], words=1, offset=12)
    v6 = _match({int(one) for one in known if one.version == 6}, width[1], words=4, offset=8)
    program = [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT, 0, 0, 4),
        (_IF_EQUAL, 1, 0, 4),
        (_JUMP, 0, 0, len(v4)),
        *v4,
        (_IF_EQUAL, 1, 0, 6),
        _DROP,
        *v6,
    ]
    return b"".join(struct.pack("=HBBI", *one) for one in program)


def count(program: bytes) -> int:
    """Return how many instructions a program has."""
    return len(program) // 8


def _match(addresses: Iterable[int], prefix: int, *, words: int, offset: int) -> list[_Instruction]:
    """Return code that returns from the filter: looks at the word at `offset` and, if need be, at those behind it.

    Addresses are given by what is left of them, in so many words, and of their prefix.
    """
    rest = 32 * (words - 1)
    if prefix <= 32:
        size = 1 << (32 - prefix)
        starts = {address >> rest & -size for address in addresses}
        entries = [_Entry(low, high) for low, high in _joined([(start, start + size - 1) for start in starts])]
    else:
        tails: dict[int, set[int]] = {}
        for address in addresses:
            tails.setdefault(address >> rest, set()).add(address & ((1 << rest) - 1))
        entries = [
            _Entry(word, word, _match(tails[word], prefix - 32, words=words - 1, offset=offset + 4))
            for word in sorted(tails)
        ]
    return [(_LOAD, 0, 0, _NETWORK_HEADER + offset), *_bisect(entries)]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that adjoin made one."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and joined[-1][1] + 1 == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _bisect(entries: Sequence[_Entry]) -> list[_Instruction]:
    if len(entries) <= _LEAF:
        return _leaf(entries)
    middle = len(entries) // 2
    below, above = _bisect(entries[:middle]), _bisect(entries[middle:])
    return [(_IF_AT_LEAST, 0, 1, entries[middle].low), (_JUMP, 0, 0, len(below)), *below, *above]


def _leaf(entries: Sequence[_Entry]) -> list[_Instruction]:
    """Return code that looks for the word in a few entries, one after the other; conditions jump 255 far at most."""
    tests: list[_Instruction] = []
    for one in reversed([one for one in entries if not one.then]):
        to_accept = len(tests) + 1
        if one.low == one.high:
            tests.insert(0, (_IF_EQUAL, to_accept, 0, one.low))
        else:
            tests[:0] = [(_IF_AT_LEAST, 0, 1, one.low), (_IF_GREATER, 0, to_accept, one.high)]
    code = [*tests, (_JUMP, 0, 0, 1), _ACCEPT] if tests else []
    for one in entries:
        if one.then:
            code += [(_IF_EQUAL, 1, 0, one.low), (_JUMP, 0, 0, len(one.then)), *one.then]
    return [*code, _DROP]

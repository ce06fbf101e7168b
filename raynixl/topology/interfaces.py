"""The addresses of this host's interfaces, and the order in which a peer's addresses are worth dialling."""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from raynixl.errors import ConfigError, IntegrityError

_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40  # has a carrier: docker0 without containers and an unplugged cable are up, but have none


@dataclass(frozen=True, slots=True)
class Address:
    """One IP address and its subnet; `interface` is the name at its owner, '' where that is not known."""

    interface: str
    ip: str
    prefix: int

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if ":" in self.ip else socket.AF_INET

    @property
    def is_loopback(self) -> bool:
        """Whether it reaches its own host only. What counts is the address: routable ones live on `lo`, too."""
        return _network(self)[0].is_loopback

    @property
    def is_link_local(self) -> bool:
        """Whether no router forwards it. Hosts that are cabled to each other may have no other (169.254.0.0/16)."""
        return _network(self)[0].is_link_local

    def __str__(self) -> str:
        return f"{self.ip}/{self.prefix}"


class _SockAddr(ctypes.Structure):
    _fields_ = (("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26))  # as much of it as sockaddr_in6 has


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = (  # of Linux' <ifaddrs.h>; the two pointers at its end are not needed
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SockAddr)),
    ("netmask", ctypes.POINTER(_SockAddr)),
)


def parse_address(text: str, *, interface: str = "") -> Address:
    """Return the address that a peer wrote as "192.0.2.7/24".

    Raises:
        IntegrityError: that is no address with a prefix length.
    """
    try:
        if "/" not in text:
            raise ValueError("no prefix length")
        parsed = ipaddress.ip_interface(text)
    except ValueError as exc:
        raise IntegrityError(f"{text!r:.60} is no address with a prefix length, such as '192.0.2.7/24'") from exc
    if isinstance(parsed, ipaddress.IPv6Interface) and parsed.scope_id:
        raise IntegrityError(f"{text!r:.60} has a scope, which means nothing on another host")
    return Address(interface, str(parsed.ip), parsed.network.prefixlen)


def addresses(interfaces: Sequence[str] = ()) -> list[Address]:
    """Return the addresses of the interfaces that are up, or of those named among them, loopback last.

    IPv6 link-local ones are left out: they mean nothing without the name of the dialler's interface. Those of
    interfaces without a carrier come after the others.

    Raises:
        ConfigError: there is no interface of that name.
    """
    known = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in interfaces if name not in known]
    if unknown:
        raise ConfigError(
            f"there is no network interface {', '.join(map(repr, unknown))}", hint=f"name some of {', '.join(known)}"
        )
    found = {one: running for one, running in _up() if not interfaces or one.interface in interfaces}
    return sorted(found, key=lambda one: (one.is_loopback, not found[one], one.is_link_local))


def _up() -> Iterator[tuple[Address, bool]]:
    """Walk getifaddrs(3): addresses of interfaces that are up, and whether these have a carrier."""
    libc = _libc()
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, "getifaddrs failed")
    try:
        entry = first
        while entry:
            one = entry.contents
            address = _address(one) if one.flags & _IFF_UP and one.address and one.netmask else None
            if address is not None:
                yield address, bool(one.flags & _IFF_RUNNING)
            entry = one.next
    finally:
        libc.freeifaddrs(first)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.getifaddrs.argtypes = (ctypes.POINTER(ctypes.POINTER(_IfAddrs)),)
    libc.freeifaddrs.argtypes = (ctypes.POINTER(_IfAddrs),)
    libc.freeifaddrs.restype = None
    return libc


def _address(entry: _IfAddrs) -> Address | None:
    """Return what one entry says; None for packet sockets' and for IPv6 link-local addresses."""
    family = entry.address.contents.family
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    start, nbytes = (2, 4) if family == socket.AF_INET else (6, 16)  # behind the port, and the flow of IPv6
    ip, mask = (bytes(one.contents.data[start : start + nbytes]) for one in (entry.address, entry.netmask))
    # An alias is labelled eth0:1; no interface's own name has a colon.
    name = entry.name.decode(errors="replace").split(":")[0]
    found = Address(name, socket.inet_ntop(family, ip), int.from_bytes(mask).bit_count())
    return None if family == socket.AF_INET6 and found.is_link_local else found


@functools.lru_cache(maxsize=4096)
def _network(
    address: Address,
) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ipaddress.IPv4Network | ipaddress.IPv6Network]:
    parsed = ipaddress.ip_interface(str(address))
    return parsed.ip, parsed.network


def same_subnet(one: Address, other: Address) -> bool:
    """Whether each lies in the other's subnet, so that no router stands between them (as far as they know)."""
    (ip, network), (other_ip, other_network) = _network(one), _network(other)
    return ip in other_network and other_ip in network


def by_nearness(theirs: Sequence[Address], ours: Sequence[Address], *, same_host: bool = False) -> list[Address]:
    """Return a peer's addresses in the order in which we should dial them; equals keep the peer's order.

    Loopback is for the same host only, and best there. Otherwise: our subnets, then what routers reach, then those
    that probably lead nowhere: a family of which we have none, and link-local ones of no subnet of ours. An address
    that we have ourselves is last (docker0 has the same on every host): dialling it most likely finds ourselves.
    """
    useful = [one for one in theirs if same_host or not one.is_loopback]
    return sorted(useful, key=lambda one: _rank(one, ours, same_host=same_host))


def _rank(one: Address, ours: Sequence[Address], *, same_host: bool) -> int:
    if one.is_loopback:
        return 0
    if not same_host and any(own.ip == one.ip for own in ours):
        return 5
    outside = [own for own in ours if not own.is_loopback]
    if any(same_subnet(one, own) for own in outside):
        return 2 if one.is_link_local else 1
    is_routable = any(own.family == one.family and not own.is_link_local for own in outside)
    return 3 if is_routable and not one.is_link_local else 4

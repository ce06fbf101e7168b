"""What UCX finds of this host's network under the user's settings, looked at before it hangs or goes without."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from raynixl.backends.ucx_options import PREFIX
from raynixl.errors import BackendUnavailable
from raynixl.topology import Address, addresses

_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?")
_NO_NETWORK = ("self", "sysv", "posix", "cma", "xpmem", "knem", "cuda", "gdr", "rocm", "ze_")
"""Beginnings of the names of transports that stay inside the host."""


def tcp_devices(resources: Sequence[str]) -> list[str]:
    """Return the interfaces on which UCX will listen, of resources such as 'tcp/eth0'."""
    return [name.removeprefix("tcp/") for name in resources if name.startswith("tcp/")]


def network_devices(resources: Sequence[str]) -> list[str]:
    """Return the names by which NET_DEVICES knows the devices of resources such as 'tcp/eth0'."""
    found = [name.partition("/")[2] for name in resources if not name.startswith(_NO_NETWORK)]
    return sorted(set(found))


def setting(name: str, options: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return what UCX goes by, and how a message names it; '' if nobody has set it."""
    if name in options:
        return options[name], f"{PREFIX}{name}={options[name]}"
    value = environment.get(PREFIX + name, "")
    return value, f"{PREFIX}{name}={value}" if value else ""


def check_names(said: tuple[str, str], resources: Sequence[str], all_resources: Callable[[], Sequence[str]]) -> None:
    """Refuse a NET_DEVICES of which UCX has nothing: it only warns, and goes on without network.

    Raises:
        BackendUnavailable: no device of that name; says which there are.
    """
    names = [name.strip() for name in said[0].split(",") if name.strip()]
    if not names or "all" in names or names[0].startswith("^"):
        return
    has = network_devices(resources)
    if not any(fnmatchcase(device, name) or device.startswith(f"{name}:") for device in has for name in names):
        there = network_devices(all_resources())
        if not there:
            return  # TLS leaves none: no endpoint can be made, and then that is said
        raise BackendUnavailable(
            f"{said[1]} names no network device that UCX has on this host; it has {', '.join(there)}",
            hint="name one of those, or see docs/networking.md for the UCX that has the one you want",
        )


def check_ports(said: tuple[str, str], devices: Sequence[str]) -> None:
    """Refuse a TCP_PORT_RANGE without a free port: UCX 1.21 would pick among them for ever.

    Raises:
        BackendUnavailable: on one of these interfaces every port is taken.
    """
    match = _RANGE.fullmatch(said[0])
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < first <= last < 1 << 16:
        return  # any port, or nothing that UCX takes: it says so itself
    for device in devices:
        for address in _first_of(device):
            if not any(_is_free(address, port) for port in range(first, last + 1)):
                raise BackendUnavailable(
                    f"{said[1]} has no free port on {device} ({address.ip})",
                    hint="each agent needs three on each device: widen it, or end what holds them",
                )


def _first_of(device: str) -> list[Address]:
    """Return the address of an interface that UCX takes, as far as can be told: the first, IPv4 if there is one."""
    found = [one for one in addresses() if one.interface == device]
    return sorted(found, key=lambda one: one.family != socket.AF_INET)[:1]


def _is_free(address: Address, port: int) -> bool:
    with socket.socket(address.family, socket.SOCK_STREAM) as sock:  # without SO_REUSEADDR, as UCX does
        try:
            sock.bind((address.ip, port))
        except OSError as exc:
            return exc.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True

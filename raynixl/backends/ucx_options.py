"""The options that UCX runs with here, and what is to be known of the transports that it then chooses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FORCED = {"RNDV_THRESH": "inf"}
"""With peer error handling UCX takes no zero-copy lane for one-sided operations unless rendezvous is out of the way."""

TUNED = {
    "USE_MT_MUTEX": "y",
    "CMA_TX_QUOTA": "16",
    "TCP_TX_SEG_SIZE": "64K",
    "TCP_CONN_NB": "y",
    "LOG_LEVEL": "fatal",
}
"""Ours where the user says nothing: a waiter sleeps instead of spinning while another thread is in UCX; of many small
blocks 16 are copied between two looks at the sockets (10,000 of 4 KiB: half the time); reads over TCP come in pieces
of 64 KiB (twice the speed of the 8 KiB of UCX); a host that does not answer to a connection stops nothing else, where
UCX would wait for it with its worker locked, for minutes; what UCX says of a dead peer comes as a typed error, not in
print.
"""

PREFIX = "UCX_"
_REMOTE_MEMORY = (
    "rc_",
    "dc_",
    "ud_",
    "srd",
    "gdaki",
    "cuda_ipc",
    "rocm_ipc",
    "ze_ipc",
    "cma",
    "knem",
    "xpmem",
    "ugni",
    "gga_",
)
"""Transports that read and write a peer's memory without its help; ud has no such operations, but is never alone."""


def merge(given: Mapping[str, str], environment: Mapping[str, str], *, device: str, is_local: bool) -> dict[str, str]:
    """Return the options of one rail: what was given, then the user's variables, then ours.

    `device` restricts the rail to one network device; `is_local` keeps it off all but the loopback interface.
    """
    tuned = {name: value for name, value in TUNED.items() if PREFIX + name not in environment}
    options = {**tuned, **FORCED, **given}
    if device:
        options["NET_DEVICES"] = device
    elif is_local and "NET_DEVICES" not in given and PREFIX + "NET_DEVICES" not in environment:
        options["NET_DEVICES"] = "lo"
    return options


def blame(options: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Name the settings that decide which transports there are, for a message that none is usable."""
    said = [f"{PREFIX}{name}={value}" for name, value in options.items() if name in _DECIDING]
    said += [
        f"{name}={value}"
        for name, value in environment.items()
        if name.removeprefix(PREFIX) in _DECIDING and name.removeprefix(PREFIX) not in options
    ]
    return " and ".join(said) if said else "UCX's own settings"


_DECIDING = ("TLS", "NET_DEVICES", "PROTOS", "SOCKADDR_TLS_PRIORITY")


@dataclass(frozen=True, slots=True)
class Lanes:
    """The transports of one endpoint, as 'transport/device'."""

    transports: tuple[str, ...]

    @staticmethod
    def of(transports: Sequence[str]) -> Lanes:
        """Return them sorted, each once."""
        return Lanes(tuple(sorted(set(transports))))

    @property
    def direct(self) -> tuple[str, ...]:
        """Those that reach a peer's memory without its help."""
        return tuple(one for one in self.transports if one.startswith(_REMOTE_MEMORY))

    @property
    def is_emulation(self) -> bool:
        """Whether the peer's UCX must take part in each operation."""
        return not self.direct

    def __str__(self) -> str:
        if self.is_emulation:
            return f"{', '.join(self.transports) or 'no transport'} (software emulation)"
        return ", ".join(one.removesuffix("/memory") for one in self.direct)

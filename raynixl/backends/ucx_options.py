"""The options that UCX runs with here, and what is to be known of the transports that it then chooses. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raynixl.memory import MemoryKind

FORCED = {"RNDV_THRESH": "inf"}
"""With peer error handling UCX takes no zero-copy lane for one-sided operations unless rendezvous is out of the way."""

TUNED = {
    "USE_MT_MUTEX": "y",
    "CMA_TX_QUOTA": "16",
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "256K",
    "TCP_CONN_NB": "y",
    "LOG_LEVEL": "fatal",
}
"""Ours where the user says nothing: a waiter sleeps instead of spinning while another thread is in UCX; of many small
blocks 16 are copied between two looks at the sockets (10,000 of 4 KiB: half the time); reads over TCP come in messages
of 256 KiB instead of 8, and each asks for no more than one (see `read_window`); a host that does not answer to a
connection stops nothing else, where UCX would wait for it with its worker locked, for minutes; what UCX says of a dead
peer comes as a typed error, not in print.
"""

PREFIX = "UCX_"
_SNDBUF = "TCP_SNDBUF"
_SEGMENT = "TCP_TX_SEG_SIZE"
_UCX_SEGMENT = 8 << 10
_HEADERS = 64
"""More than UCX puts in front of the bytes of a message."""
MAX_SEND_BUFFER = 4 << 20
MIN_READ_WINDOW = 16 << 10
_RDMA = ("rc_mlx5", "rc_verbs", "dc_mlx5", "srd", "gga_mlx5", "ugni_rdma")
_DIRECT = {
    MemoryKind.DRAM: (*_RDMA, "cma", "knem", "xpmem"),
    MemoryKind.VRAM: (*_RDMA, "cuda_ipc", "rocm_ipc"),
}
"""Transports that read and write a peer's memory of a kind without its help, as far as their names tell.

Not ud, which has no such operations, nor rc_gda, which only kernels of a GPU can post to; sysv, posix and self reach
only what UCX itself has allocated. What the name does not tell: the first generation of EFA has no writes by srd, and
RDMA reaches VRAM only where GPUDirect does. UCX emulates what is lacking.
"""


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


def with_send_buffer(options: Mapping[str, str], environment: Mapping[str, str], most: int) -> dict[str, str]:
    """Return options that give UCX's sockets a send buffer of a known size, unless the user has named one.

    `most` is what the kernel grants (net.core.wmem_max).
    """
    if _SNDBUF in options or PREFIX + _SNDBUF in environment:
        return dict(options)
    return {**options, _SNDBUF: str(min(most, MAX_SEND_BUFFER))}


def read_window(options: Mapping[str, str], environment: Mapping[str, str], most: int) -> int:
    """Return how many bytes peers may ask for at a time where UCX emulates reads: half a send buffer, one message.

    Answers that find no room in the buffer wait in a queue of UCX's, in which it crashes when the peer dies. Of an
    answer of several messages the kernel refuses those that come after the reader's death, upon which UCX aborts.
    """

    def size(name: str) -> int:
        return _nbytes(options.get(name, environment.get(PREFIX + name, "")))

    buffered = max(MIN_READ_WINDOW, min(size(_SNDBUF), most) // 2)
    return max(1, min(buffered, (size(_SEGMENT) or _UCX_SEGMENT) - _HEADERS))


def _nbytes(text: str) -> int:
    """Return a size as UCX writes it (65536, 64K, 4M, 4MB), 0 for one that is not known (auto)."""
    found = re.fullmatch(r"([0-9]+)([kmg]?)b?", text.strip().lower())
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2]] if found else 0


def blame(options: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Name what was given, and what decides on the transports, for a message that none is usable."""
    ours = TUNED | FORCED
    said = [
        f"{PREFIX}{name}={value}" for name, value in options.items() if name in _DECIDING or ours.get(name) != value
    ]
    said += [
        f"{name}={value}"
        for name, value in environment.items()
        if name.removeprefix(PREFIX) in _DECIDING and name.removeprefix(PREFIX) not in options
    ]
    return " and ".join(said) if said else "UCX's own settings"


_DECIDING = ("TLS", "NET_DEVICES", "PROTOS", "SOCKADDR_TLS_PRIORITY")


@dataclass(frozen=True, slots=True)
class Lanes:
    """The transports of one endpoint, as 'transport/device', and the kind of memory that they shall reach."""

    transports: tuple[str, ...]
    kind: MemoryKind = MemoryKind.DRAM
    slow: str = ""
    """Why CUDA IPC does not reach that memory, if it does not."""
    near: MemoryKind | None = None
    """The kind of our memory at the other end of a transfer; None: the peer's alone is asked about."""

    @staticmethod
    def of(transports: Sequence[str]) -> Lanes:
        """Return them sorted, each once, as a way to host memory."""
        return Lanes(tuple(sorted(set(transports))))

    def reaching(self, kind: MemoryKind, slow: str = "", near: MemoryKind | None = None) -> Lanes:
        """Return them as a way to memory of that kind, from memory `near`: cma reaches no GPU's, CUDA IPC no host's."""
        return replace(self, kind=kind, slow=slow, near=near)

    @property
    def direct(self) -> tuple[str, ...]:
        """Those that reach a peer's memory without its help."""
        near = _DIRECT.get(self.kind if self.near is None else self.near, ())
        far = [name for name in _DIRECT.get(self.kind, ()) if not (self.slow and name == "cuda_ipc")]
        names = [name for name in far if name in near]
        return tuple(one for one in self.transports if one.partition("/")[0] in names)

    @property
    def is_emulation(self) -> bool:
        """Whether the peer's UCX must take part in each operation."""
        return not self.direct

    def __str__(self) -> str:
        if self.is_emulation:
            return f"{', '.join(self.transports) or 'no transport'} (software emulation)"
        return ", ".join(one.removesuffix("/memory") for one in self.direct)

    def explain(self) -> str:
        """Say how memory is reached, and list all transports of the endpoint."""
        how = "the peer's UCX takes part in each operation" if self.is_emulation else "without the peer's help"
        slow = f"; {self.slow}" if self.slow else ""
        return f"{self}: {how}{slow}; all transports: {', '.join(self.transports)}"

"""The guard of UCX's own TCP ports: the kernel drops there what does not come from a host of an authenticated peer.

UCX accepts whoever connects and speaks its protocol, which writes to memory by plain address. So no stranger may reach
its ports: a packet filter on each of its listening sockets names the source addresses of the peers that have proved
themselves on their links. A connection that was accepted keeps the filter of that moment, which admits its own source
for good, so it is shut down when that source is dismissed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from ipaddress import ip_address

from raynixl.backends.ucx_filter import MAX_INSTRUCTIONS, WIDTHS, IpAddress, compile_filter, count
from raynixl.backends.ucx_sockets import OwnSocket, own_sockets
from raynixl.backends.ucx_wireup import MAX_ADDRESSES
from raynixl.topology import Address, addresses

logger = logging.getLogger(__name__)

LOOPBACK: frozenset[IpAddress] = frozenset(map(ip_address, ("127.0.0.1", "::1")))
LEAVE_SECONDS = 0.5
"""How long a peer that leaves has to close its connections itself."""
QUIET_SECONDS = 0.1
"""How long UCX has to see to what has come in from peers that have let go of us."""
_LOOK_SECONDS = 0.01
_STARTING = threading.Lock()
"""Held while UCX makes a worker, so that sockets which appear meanwhile are not those of another agent's worker."""


class Guard:
    """Admits peers to the ports of one agent's workers. Any thread may call it, before there is a worker too."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # protects all below, and the order in which filters are replaced
        self._admitted: dict[Hashable, frozenset[IpAddress]] = {}
        self._listening: list[OwnSocket] = []
        self._width = WIDTHS[0]
        self._is_refused = False
        self._is_closed = False
        self.reason = ""
        """Why not all ports are guarded, '' if they are."""

    def __repr__(self) -> str:
        ports = ", ".join(f"{host} port {port}" for host, port in (one.here for one in self._listening))
        return f"Guard({ports or 'no port'}; {self.reason or f'{len(self._union())} addresses admitted'})"

    @contextlib.contextmanager
    def watch(self) -> Iterator[Callable[[bytes, int], None]]:
        """Watch a worker being made. To be told its address, which names its ports, and how many it should have."""
        with _STARTING:
            before = {(one.fd, one.inode) for one in own_sockets() if not one.there}

            def adopt(address: bytes, expected: int) -> None:
                new = [one for one in own_sockets() if not one.there and (one.fd, one.inode) not in before]
                # Other threads may have begun to listen meanwhile. UCX packs a port as the network has it.
                self._adopt([one for one in new if struct.pack("!H", one.here[1]) in address], expected)

            yield adopt

    @contextlib.contextmanager
    def open_to_ourselves(self) -> Iterator[None]:
        """Admit, for as long as this lasts, the addresses that the workers themselves listen on."""
        with self._lock:
            own = frozenset(_parsed(one.here[0]) for one in self._listening)
        self.admit(self, own)
        try:
            yield
        finally:
            self.dismiss(self)

    def admit(self, who: Hashable, addresses: Iterable[IpAddress]) -> None:
        """Let in what comes from these addresses, until `who` is dismissed. In force when this returns."""
        self._change(who, frozenset(addresses))

    def dismiss(self, who: Hashable) -> None:
        """Take back what was admitted for `who`: no new connections from addresses that nobody else has.

        Those that stand are for `sever`, a while later: a peer that leaves closes them itself, and UCX aborts when it
        finds a connection shut under a read that it has heard of but not answered.
        """
        self._change(who, frozenset())

    def close(self) -> None:
        """Let nobody in any more; connections stand until UCX closes them. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._admitted.clear()
            self._apply()

    def sever(self) -> None:
        """Shut down the connections that UCX has accepted from addresses that are not admitted."""
        with self._lock:
            self._sever()

    def cut(self, timeout: float) -> bool:
        """Wait until UCX has let go of the connections that it has accepted; False if it does not.

        UCX keeps connections whose endpoints are closed at the other end, so they are shut down once what has arrived
        over them has been seen to. A worker destroyed while it has answers to send to a read aborts the process.
        """
        now = time.monotonic()
        deadline, patience = now + timeout, now + min(timeout, QUIET_SECONDS)
        while accepted := self._accepted():
            if time.monotonic() >= patience:
                for one in accepted:
                    one.shut_down()
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _accepted(self) -> list[OwnSocket]:
        with self._lock:
            ours = {one.here for one in self._listening}
        return [one for one in own_sockets() if one.there and one.here in ours] if ours else []

    def _change(self, who: Hashable, addresses: frozenset[IpAddress]) -> None:
        with self._lock:
            if self._is_closed:
                return
            before = self._union()
            self._admitted.pop(who, None)
            if addresses:
                self._admitted[who] = addresses
            if self._union() != before:
                self._apply()

    def _union(self) -> frozenset[IpAddress]:
        return frozenset().union(*self._admitted.values())

    def _adopt(self, sockets: Sequence[OwnSocket], expected: int) -> None:
        with self._lock:
            self._listening += sockets
            self._apply()
            for one in sockets:
                one.send_away()
            self._sever()
            if len(sockets) < expected:
                self._report(f"only {len(sockets)} of its {expected} ports were found")

    def _apply(self) -> None:
        """Replace the filter of every listening socket; _lock is held."""
        self._listening = [one for one in self._listening if one.is_open]
        if not self._listening or self._is_refused:
            return
        width = self._width
        try:
            while not self._attach(self._program()):
                self._widen()
        except OSError as exc:
            self._is_refused = True
            for one in self._listening:
                one.detach()  # a filter that cannot be replaced would keep new peers out
            self._report(f"the kernel refuses a packet filter: {exc.strerror}")
        if self._width != width:
            logger.warning(
                "agent %r has peers at so many addresses that UCX's ports let in whole networks: /%d, of IPv6 /%d",
                self._name, *self._width,
            )  # fmt: skip

    def _program(self) -> bytes:
        """Return the narrowest program that the kernel takes; _lock is held."""
        addresses = self._union()
        while count(program := compile_filter(addresses, self._width)) > MAX_INSTRUCTIONS:
            self._widen()
        return program

    def _attach(self, program: bytes) -> bool:
        """Put a program on every listening socket; False if the kernel finds it too large."""
        try:
            for one in self._listening:
                one.attach(program)
        except OSError as exc:
            if exc.errno == errno.ENOMEM and self._width != WIDTHS[-1]:  # beyond net.core.optmem_max
                return False
            raise
        return True

    def _widen(self) -> None:
        self._width = WIDTHS[WIDTHS.index(self._width) + 1]

    def _sever(self) -> None:
        if not self._listening or self._is_refused:
            return
        ours, admitted = {one.here for one in self._listening}, self._union()
        for one in own_sockets():
            if one.there and one.here in ours and _parsed(one.there) not in admitted:
                logger.debug("a connection of UCX from %s is shut down", one.there)
                one.shut_down()

    def _report(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            logger.warning(
                "UCX's TCP ports of agent %r are open to whoever reaches them: %s; see docs/networking.md",
                self._name, reason,
            )  # fmt: skip


def own_sources(preferred: Iterable[Address]) -> tuple[str, ...]:
    """Return the addresses from which this host's UCX may connect to other hosts, so many as a `Hello` takes."""
    found = [one.ip for one in (*preferred, *addresses()) if not one.is_loopback]
    return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]


def sources(stated: Iterable[str], remote: IpAddress | None) -> set[IpAddress]:
    """Return the addresses to admit for a peer that states its own, and whose link comes from or leads to `remote`.

    A peer that shares our network has one of our own addresses there, and may come by loopback, too. For any other,
    addresses that we have as well (that of docker0 is the same on every host) would admit only users of this host.
    """
    ours = {ip_address(one.ip) for one in addresses()} | LOOPBACK
    theirs = {ip_address(text) for text in stated} | ({remote} if remote is not None else set())
    return theirs | LOOPBACK if remote in ours else theirs - ours


def _parsed(text: str) -> IpAddress:
    """Return an address as the socket module writes it, which adds the interface to IPv6 link-local ones."""
    return ip_address(text.partition("%")[0])

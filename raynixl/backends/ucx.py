"""The ucx backend: host and GPU memory of any host, by one-sided operations of UCX, behind authenticated TCP links."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from raynixl.backends.base import Binding, Capabilities, Link, Local, Request
from raynixl.backends.greeting import Newcomer, greet
from raynixl.backends.listener import Listener, dial
from raynixl.backends.ucx_presence import INSTALL, is_installed
from raynixl.backends.wire import StreamWire
from raynixl.cuda import examine, has_driver
from raynixl.errors import AgentClosed, BackendUnavailable, RaynixlError
from raynixl.memory import Memory, MemoryKind
from raynixl.native import Program
from raynixl.record import AgentRecord
from raynixl.region import Region, RemoteRegion
from raynixl.topology import Address, addresses, by_nearness, parse_address

if TYPE_CHECKING:
    from raynixl.backends.ucx_network import Network
    from raynixl.backends.ucx_options import Lanes


class UcxBackend:
    """Endpoints of UCX to peers that have proved themselves on a TCP link, which also carries the messages.

    An agent that talks to its own host only pays for a listening socket: all else is loaded when the first peer on
    the network is met, and UCX when its memory is.
    """

    name = "ucx"

    def __init__(self, local: Local) -> None:
        if not is_installed():
            raise BackendUnavailable("the backend 'ucx' needs the package ucxx", hint=INSTALL)
        self._local = local
        far = (MemoryKind.DRAM, MemoryKind.VRAM)
        near = far if has_driver() else (MemoryKind.DRAM,)
        self.capabilities = Capabilities(kinds=frozenset(product(near, far)), messages=True)
        self._has_secret = bool(local.config.secret.get_secret_value())
        self._addresses = self._own_addresses()
        self._lock = threading.Lock()  # protects _memories, _network, _is_closed
        self._memories: dict[int, Memory] = {}  # until there is a network
        self._network: Network | None = None
        self._is_closed = False
        hosts = [address.ip for address in self._addresses]
        self._listener = Listener(local, hosts=hosts, port=local.config.listen_port, admit=self._admit)

    def local_metadata(self) -> dict[str, str | int]:
        """Where peers find our TCP sockets: addresses with their networks, and the port of each."""
        ports = dict(self._listener.endpoints)
        return {
            "addresses": " ".join(f"{one}" for one in self._addresses if one.ip in ports),
            "ports": " ".join(str(ports[one.ip]) for one in self._addresses if one.ip in ports),
        }

    def reaches(self, record: AgentRecord) -> str:
        """Any agent that offers it; without a secret, those of this host only."""
        if self.name not in record.backends:
            return f"{record.name!r} does not offer it"
        if not self._has_secret and record.host != self._local.host:
            return f"{record.name!r} is on another host, and without AgentConfig.secret only this host is trusted"
        return "" if self._endpoints(record) else f"{record.name!r} names no address that can be reached"

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        """Remember the memory; UCX maps it when the first peer on the network asks for it."""
        if (memory.kind, memory.kind) not in self.capabilities.kinds:
            raise BackendUnavailable(f"ucx carries host memory here, not {memory.kind.value}", hint="it finds no CUDA")
        if memory.kind is MemoryKind.VRAM:
            examine(memory.address, memory.nbytes)  # a wrong address is told to who gave it, not to a peer
        with self._lock:
            if self._network is None:
                self._memories[region_id] = memory
            else:
                self._network.exports.add(region_id, memory)
        return {}

    def deregister(self, region_id: int) -> None:
        """Have UCX forget the memory."""
        with self._lock:
            self._memories.pop(region_id, None)
            network = self._network
        if network is not None:
            network.exports.remove(region_id)

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        """Connect to one of the agent's addresses and greet it."""
        sock = dial(self._endpoints(record), peer=record.name, deadline=deadline)
        try:
            greet(self._local, StreamWire(sock), record, probe=0, deadline=deadline)
            return self.network.join(sock, record.name, record.incarnation)
        except BaseException:
            sock.close()
            raise

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Ask the peer for the region's keys and hand them to UCX; makes the lane if there is none."""
        from raynixl.backends.ucx_lane import UcxLink

        assert isinstance(link, UcxLink)
        return self.network.bind(link, remote)

    def prepare(self, request: Request) -> list[Program]:
        """Turn a request into one program over all rails that it uses."""
        return self.network.prepare(request)

    def path(self, local: Region, binding: Binding) -> str:
        """Name the transports that carry a region's bytes: which they are depends on both ends' kinds of memory."""
        return self.network.path(local, binding)

    def describe(self, local: Region, binding: Binding) -> str:
        """Say which rails carry a region's bytes and why, whether UCX emulates, and list all transports."""
        return self.network.describe(local, binding)

    def own_lanes(self) -> Lanes:
        """Start UCX, and return by which transports it reaches this very process.

        Raises:
            BackendUnavailable: it does not start, or the user's settings leave no usable transport.
        """
        return self.network.own_lanes()

    @property
    def network(self) -> Network:
        """What is needed once a peer is met, made at the first use.

        Raises:
            AgentClosed: it was closed.
        """
        with self._lock:
            if self._network is None:
                if self._is_closed:
                    raise AgentClosed(f"agent {self._local.name!r} is closed")
                from raynixl.backends.ucx_network import Network

                self._network = Network(self._local, self._addresses, self._memories)
                self._memories = {}
            return self._network

    def close(self) -> None:
        """Stop listening, close every link and let UCX go."""
        with self._lock:
            self._is_closed = True
            network = self._network
        self._listener.close()
        if network is not None:
            network.close()

    def _own_addresses(self) -> list[Address]:
        if self._has_secret:
            return addresses(self._local.config.interfaces)
        return [one for one in addresses() if one.is_loopback]

    def _endpoints(self, record: AgentRecord) -> list[tuple[str, int]]:
        """Return where to find an agent, the most likely first; [] if its record says nothing that makes sense."""
        said = record.backends[self.name]
        try:
            theirs = [parse_address(text) for text in str(said.get("addresses", "")).split()]
            ports = [int(text) for text in str(said.get("ports", "")).split()]
        except (ValueError, RaynixlError):
            return []
        port_of = dict(zip((one.ip for one in theirs), ports, strict=False))
        is_here = record.host == self._local.host
        usable = by_nearness(theirs, self._addresses, same_host=is_here)
        return [(one.ip, port_of[one.ip]) for one in usable if one.ip in port_of and (is_here or not one.is_loopback)]

    def _admit(self, newcomer: Newcomer) -> None:
        """Take in a peer that has connected and proved itself."""
        client = newcomer.client
        assert client is not None
        try:
            self.network.admit(newcomer.sock, client.name, client.incarnation)
        except AgentClosed:
            newcomer.sock.close()

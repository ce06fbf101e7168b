"""The loopback backend: agents of one process; the reference meaning of every operation."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

from raynixl.backends.base import MEMORY, Binding, Capabilities, Link, Local, Request
from raynixl.backends.shm import addresses
from raynixl.blocks import refuse_overlap
from raynixl.errors import BackendUnavailable, ConfigError, PeerLost, RaynixlError
from raynixl.memory import Memory, MemoryKind
from raynixl.native import COPY, Program
from raynixl.record import AgentRecord
from raynixl.region import RemoteRegion

_HERE: weakref.WeakValueDictionary[str, LoopbackBackend] = weakref.WeakValueDictionary()
"""Who is in this process, by incarnation: the one thing that agents of one process must share."""


class LoopbackLink:
    """One end of a connection inside the process; `other` is the far end."""

    def __init__(self, local: Local, peer: str, incarnation: str, *, backend: str) -> None:
        self.backend = backend
        self.peer = peer
        self.incarnation = incarnation
        self.lost: RaynixlError | None = None
        self.other: LoopbackLink
        self._local = local

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Hand the message to the other agent's reactor."""
        if self.lost is not None:
            raise PeerLost(f"peer {self.peer!r} is lost: {self.lost}", peer=self.peer)
        copies = [os.dup(fd) for fd in fds]
        other = self.other
        other._local.reactor.call_soon(lambda: other._local.events.message_received(other, message, copies))

    def flushed(self) -> bool:
        """Nothing is ever held back."""
        return True

    def is_frozen(self) -> bool:
        """Who looks is not frozen, and the peer is the same process."""
        return False

    def close(self, error: RaynixlError | None = None) -> None:
        """Close both ends."""
        for end in (self, self.other):
            if end.lost is None:
                end.lost = error if end is self and error else PeerLost(f"{end.peer!r} closed", peer=end.peer)
                if not end._local.reactor.is_closed:
                    end._local.reactor.call_soon(end._report)

    def _report(self) -> None:
        assert self.lost is not None
        self._local.events.link_lost(self, self.lost)


class LoopbackBackend:
    """Plain copies between two agents of this process."""

    name = "loopback"
    capabilities = Capabilities(kinds=frozenset({(MemoryKind.DRAM, MemoryKind.DRAM)}), messages=True)

    def __init__(self, local: Local) -> None:
        self._local = local
        self._memories: dict[int, Memory] = {}
        self._links: weakref.WeakSet[LoopbackLink] = weakref.WeakSet()
        _HERE[local.incarnation] = self

    def local_metadata(self) -> dict[str, str | int]:
        """Peers find this object by the incarnation alone."""
        return {}

    def reaches(self, record: AgentRecord) -> str:
        """Only agents of this process."""
        if self.name not in record.backends:
            return f"{record.name!r} does not offer it"
        is_here = record.incarnation in _HERE or (record.pid == os.getpid() and record.host == self._local.host)
        return "" if is_here else f"{record.name!r} is in another process"  # one that was here is lost, not elsewhere

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        """Remember the memory; peers look it up by number."""
        if memory.kind is not MemoryKind.DRAM:
            raise BackendUnavailable(f"loopback carries host memory, not {memory.kind.value}")
        self._memories[region_id] = memory
        return {}

    def deregister(self, region_id: int) -> None:
        """Forget the memory."""
        self._memories.pop(region_id, None)

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        """Join two ends."""
        other = _HERE.get(record.incarnation)
        if other is None:
            raise PeerLost(f"peer {record.name!r} is no longer in this process", peer=record.name)
        if _secret(other._local) != _secret(self._local):
            raise ConfigError(f"peer {record.name!r} does not share our secret", peer=record.name)
        near = LoopbackLink(self._local, record.name, record.incarnation, backend=self.name)
        far = LoopbackLink(other._local, self._local.name, self._local.incarnation, backend=self.name)
        near.other, far.other = far, near
        self._links.add(near)
        other._links.add(far)
        other._local.reactor.call_soon(lambda: other._local.events.link_opened(far))
        return near

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Take the address straight from the other agent."""
        other = _HERE.get(remote.incarnation)
        memory = None if other is None else other._memories.get(remote.id)
        if memory is None:
            raise BackendUnavailable(f"{remote.label} is not in this process", peer=link.peer)
        return Binding(remote, link, self._local.native.Gate(), MEMORY, memory.address)

    def prepare(self, request: Request) -> list[Program]:
        """Turn a request into one native program; refuse to copy memory onto itself."""
        table = addresses(request)
        refuse_overlap(table)
        return [self._local.engine.program(COPY, 0, table, request.gates)]

    def close(self) -> None:
        """Close every link and leave the process's table."""
        _HERE.pop(self._local.incarnation, None)
        for link in list(self._links):
            link.close(PeerLost("this agent was closed", peer=link.peer))
        self._memories.clear()


def _secret(local: Local) -> bytes:
    return local.config.secret.get_secret_value()

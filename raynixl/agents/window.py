"""Windows: a peer's region as it can be reached from here, by address where its memory is mapped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from raynixl.agents.prepared import Prepared
from raynixl.backends.base import Binding, Op, ServesKernels
from raynixl.blocks import Blocks, Segments, make_table
from raynixl.config import check_timeout
from raynixl.errors import (
    AgentClosed,
    BackendUnavailable,
    ConfigError,
    PeerLost,
    PeerRestarted,
    RangeError,
    RaynixlError,
    RegionStale,
)
from raynixl.memory import MemoryKind
from raynixl.native import CLOSED, LOST, STALE, Gate
from raynixl.region import Region, RemoteRegion

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent
    from raynixl.agents.connection import Connection
    from raynixl.agents.prepared import Kinds
    from raynixl.agents.transfer import Transfer

Table = np.ndarray[Any, np.dtype[np.uint64]]
_FEW = 32
"""Blocks that are looked at one by one in less time than numpy takes for so many."""


class Window:
    """One region of one incarnation of a peer, bound. It holds nothing that must be closed.

    Where `is_mapped`, `address` is that of the region's first byte in this process. Whoever loads or stores there
    enters `gates` first and leaves them afterwards (native calls that take gates do): the memory is unmapped once
    the peer is lost or withdraws the region, as soon as nobody is inside. Any thread may use a window.
    Where it was opened for a GPU, `address` is that for its kernels, which likewise run inside of the gates.
    """

    __slots__ = ("_agent", "_binding", "_connection", "address", "gates", "is_mapped", "remote")

    def __init__(self, agent: Agent, connection: Connection, binding: Binding, address: int | None = None) -> None:
        self.remote = binding.remote
        self.is_mapped = binding.is_mapped if address is None else True
        self.address = address or (binding.address if binding.is_mapped else 0)
        self.gates: list[Gate] = [binding.gate]
        self._agent = agent
        self._connection = connection
        self._binding = binding

    def __repr__(self) -> str:
        return f"Window({self.remote.label}, {self.path}, {self.error or 'usable'})"

    @property
    def path(self) -> str:
        """The way to it, for people: 'mapped', 'memory', 'process_vm', 'cma', ..."""
        return self._binding.path

    @property
    def is_usable(self) -> bool:
        """Whether it can be written to."""
        return self._code == 0

    @property
    def error(self) -> RaynixlError | None:
        """Why it is not usable, or None."""
        code = self._code
        return None if code == 0 else self.translate(code)

    @property
    def _code(self) -> int:
        """What ended it, or 0. A path that is not mapped may be reset, and then the next write makes it anew."""
        code = self._binding.gate.code
        is_reset = code == LOST and not self.is_mapped and self._connection.lost is None
        return 0 if is_reset else code

    def translate(self, code: int) -> RaynixlError:
        """Return the typed error for a code that a gate refused with, or a native call that has entered it."""
        peer = self.remote.owner
        if code == STALE:
            return RegionStale(f"{self.remote.label} is no longer registered", peer=peer)
        if code == CLOSED or self._agent.is_closed:
            return AgentClosed(f"agent {self._agent.name!r} was closed")
        lost = self._connection.lost
        return lost.afresh() if lost is not None else PeerLost(f"peer {peer!r} is lost", peer=peer)

    def write(self, local: Region, table: Table, *, timeout: float | None = None) -> Transfer:
        """Copy blocks of a region of ours into the peer's: rows of (offset here, offset there, nbytes).

        See `Agent.write`. For any path, but where `is_mapped` a store does the same for less.

        Raises:
            RangeError: a block is outside its region, they overlap at the peer, or that is no such table.
            PeerLost, RegionStale, AgentClosed: the window is not usable any more.
        """
        error = self.error
        if error is not None:
            raise error
        rows = np.asarray(table)
        if rows.ndim != 2 or rows.shape[1] != 3:
            raise RangeError("what a window writes is not an (N, 3) table", hint="give (ours, theirs, nbytes) rows")
        return self._prepare(local, rows).post(timeout=timeout)

    def _prepare(self, local: Region, rows: Table) -> Prepared:
        """Compile a write for what is bound already; a table that is not plain goes the way of all others."""
        if not _is_plain(local, rows, self.remote.nbytes):
            source = Blocks(local, make_table(rows[:, 0], rows[:, 2]))
            target = Blocks(self.remote, make_table(rows[:, 1], rows[:, 2]))
            return Prepared(self._agent, Op.WRITE, source, target)
        only = np.zeros(len(rows), np.int64)
        segments = Segments(only, rows[:, 0], only, rows[:, 1], rows[:, 2])
        prepared = Prepared.of_segments(self._agent, Op.WRITE, segments, local=local, remote=self.remote)
        if self._binding.is_usable:
            with suppress(PeerLost, BackendUnavailable):  # meanwhile: the post binds anew
                prepared.bind([self._binding])
        return prepared


def _is_plain(local: Region, rows: Table, limit: int) -> bool:
    """Whether these are a few blocks of host memory, none of them empty, inside of both regions and ascending there."""
    if rows.dtype != np.uint64 or not 0 < len(rows) <= _FEW or not isinstance(local, Region):
        return False
    if local.kind is not MemoryKind.DRAM:
        return False
    room, end = local.nbytes, 0
    for ours, theirs, nbytes in rows.tolist():
        if not nbytes or ours + nbytes > room or theirs < end:
            return False
        end = theirs + nbytes
    return end <= limit


class _Claim:
    """What the binder asks of a window: one region of a peer, for threads of the host or for kernels of a GPU."""

    def __init__(self, remote: RemoteRegion, near: MemoryKind) -> None:
        self.remote: Sequence[RemoteRegion] = (remote,)
        self.local: Sequence[Region] = ()
        self._near = near
        self.peer = remote.owner
        self.incarnation = remote.incarnation

    def kinds(self) -> Kinds:
        """Stores of this process's threads come from the host, those of kernels from a GPU."""
        return frozenset({(self._near, self.remote[0].kind)})

    def bind(self, bindings: Sequence[Binding]) -> None:
        """Nothing is compiled."""


def open_window(agent: Agent, remote: RemoteRegion, timeout: float | None, device: int | None) -> Window:
    """Connect a region's owner and bind the region; see `Agent.window`."""
    agent.check_open()
    if not isinstance(remote, RemoteRegion):
        raise ConfigError(f"{type(remote).__name__} is not a peer's region", hint="look it up: agent.peer(name)[name]")
    deadline = time.monotonic() + check_timeout(timeout, agent.config.connect_timeout)
    near = MemoryKind.DRAM if device is None else MemoryKind.VRAM
    (binding,) = agent.connector.bind(_Claim(remote, near), deadline)
    connection = agent.connector.by_link(binding.link)
    if connection is None:  # it was lost a moment ago, and the peer has come back as another incarnation
        raise PeerRestarted(f"peer {remote.owner!r} restarted; its regions of before are gone", peer=remote.owner)
    address = None if device is None else _reach(agent, binding, device)
    return Window(agent, connection, binding, address)


def _reach(agent: Agent, binding: Binding, device: int) -> int:
    """Return where kernels of a GPU reach what is bound."""
    backend = next(one for one in agent.backends if one.name == binding.link.backend)
    if not isinstance(backend, ServesKernels):
        raise BackendUnavailable(
            f"{binding.remote.label} is reached over {backend.name}, by no kernel of a GPU",
            hint="kernels reach memory of GPUs of this host: see agent.explain()", peer=binding.link.peer,
        )  # fmt: skip
    return backend.reach(binding, device)

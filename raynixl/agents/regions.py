"""The regions of an agent: by number and by name, and which peers use them."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from raynixl.agents.connection import Connection
from raynixl.agents.keeping import keep_until_ended, keep_until_left
from raynixl.backends.base import Link
from raynixl.errors import (
    AgentClosed,
    BackendUnavailable,
    ConfigError,
    PeerLost,
    RangeError,
    RegionStale,
    RegionUnknown,
)
from raynixl.host import is_ending
from raynixl.memory import Memory, MemoryKind, allocate, allocate_on, is_writable
from raynixl.native import CLOSED, STALE
from raynixl.record import RegionRecord, check_name
from raynixl.region import Region

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

logger = logging.getLogger(__name__)


class Regions:
    """Registers, finds and withdraws regions. Numbers are never reused within an incarnation."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()  # protects everything below
        self._by_id: dict[int, Region] = {}
        self._by_name: dict[str, Region] = {}
        self._generations: dict[str, int] = {}
        self._importers: dict[int, set[Link]] = {}
        self._sleepers: dict[int, set[int]] = {}  # processes that were frozen when we gave them up, by region
        self._numbers = itertools.count(1)
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, memory: Memory, name: str) -> Region:
        """Register memory with every backend that takes its kind."""
        if name != "":
            check_name(name, "region name")
        memory = self._check_mapped(memory)
        number = next(self._numbers)
        keys, refusals = {}, []
        for backend in self._agent.backends:
            try:
                keys[backend.name] = backend.register(number, memory)
            except BackendUnavailable as exc:
                refusals.append(str(exc))
        if not keys:
            raise BackendUnavailable(
                f"no backend takes {memory.kind.value} memory ({'; '.join(refusals)})",
                hint=_hint(memory.kind, [backend.name for backend in self._agent.backends]),
            )
        try:
            return self._insert(number, name, memory, keys)
        except BaseException:
            for backend in self._agent.backends:
                backend.deregister(number)
            raise

    def make(self, nbytes: int, kind: str, device: int, name: str) -> Region:
        """Register fresh zeroed memory of a kind; what it is made of goes with the region."""
        memory = _allocate(nbytes, kind, device)
        try:
            return self.add(memory, name)
        except BaseException:
            if memory.fd >= 0:
                os.close(memory.fd)
            raise

    def remove(self, region: Region) -> None:
        """Withdraw a region and wait until nobody uses it."""
        if not isinstance(region, Region):
            raise ConfigError(
                f"{type(region).__name__} is no region of ours", hint="deregister what register() or empty() returned"
            )
        self._agent.check_open()
        with self._lock:
            if self._by_id.get(region.id) is not region:
                if region.incarnation != self._agent.incarnation:
                    raise RegionUnknown(f"{region.label} belongs to another agent", hint="deregister it there")
                raise RegionStale(f"{region.label} was deregistered already", hint="deregister once")
            del self._by_id[region.id]
            if self._by_name.get(region.name) is region:
                del self._by_name[region.name]
            importers = self._importers.pop(region.id, set())
            sleepers = self._sleepers.pop(region.id, set())
        region.gate.close(STALE, abort=False)
        self._let_go(region, importers, sleepers)
        if region.name:
            self._agent.publisher.touch()

    def by_name(self, name: str) -> Region:
        """Return a region by name."""
        with self._lock:
            self._check_open()
            region = self._by_name.get(name)
            names = sorted(self._by_name)
        if region is None:
            shown = ", ".join(names[:10]) or "none"
            raise RegionUnknown(
                f"agent {self._agent.name!r} has no region named {name!r:.220}",
                hint=f"its named regions: {shown}",
            )
        return region

    def by_id(self, number: int) -> Region:
        """Return a region by number; a number once given out and not here is stale."""
        with self._lock:
            self._check_open()
            region = self._by_id.get(number)
            highest = max(self._by_id, default=0)
        if region is None:
            raise RegionStale(
                f"region {number} of {self._agent.name!r} is no longer registered (highest is {highest})",
                hint="look it up again by name",
            )
        return region

    def named_records(self) -> tuple[RegionRecord, ...]:
        """Return what travels of the named regions."""
        with self._lock:
            regions = list(self._by_name.values())
        return tuple(region.record() for region in regions[:4096])

    def add_importer(self, number: int, link: Link) -> None:
        """Remember that a peer uses a region."""
        with self._lock:
            self._check_open()
            if number not in self._by_id:
                raise RegionStale(f"region {number} was deregistered meanwhile", hint="look it up again by name")
            self._importers.setdefault(number, set()).add(link)

    def forget_importer(self, link: Link) -> None:
        """Forget a peer that is gone, but not that a frozen one may be amid a copy, or the GPU of one that lives."""
        pid, is_frozen = getattr(link, "pid", 0), link.is_frozen()
        has_let_go = pid == os.getpid() or getattr(link, "has_let_go", False)
        with self._lock:
            for number, links in self._importers.items():
                region = self._by_id.get(number)
                is_open = not has_let_go and region is not None and region.kind is MemoryKind.VRAM
                if link in links and pid and (is_frozen or is_open):
                    self._sleepers.setdefault(number, set()).add(pid)
                links.discard(link)

    def withdraw_all(self) -> None:
        """Take no more regions, refuse the use of those that are here, and wait until no peer uses one."""
        with self._lock:
            self._is_closed = True
            links = set().union(*self._importers.values())
            regions = list(self._by_id.values())
            sleepers = set().union(*self._sleepers.values())
            self._importers.clear()
        connections = self._connections(links)
        stuck = self._agent.consent.announce_end(connections, self._agent.config.deregister_timeout)
        if any(region.kind is MemoryKind.VRAM for region in regions):
            stuck = [*stuck, *_gone_without_a_word(connections)]
        self._keep(_pids(stuck) | sleepers, regions)

    def close_in_child(self) -> None:
        """Refuse the use of every region in a forked child: its engine has no threads. Takes no lock."""
        for region in list(self._by_id.values()):
            region.gate.close(CLOSED)

    def close(self) -> None:
        """Let go of every region; the engine has ended all that was in flight."""
        with self._lock:
            regions = list(self._by_id.values())
            self._by_id.clear()
            self._by_name.clear()
            self._importers.clear()
        for region in regions:
            region.gate.close(CLOSED)
            if region.gate.drain(self._agent.config.deregister_timeout):
                _close_fd(region)
            else:
                self._abandon(region)

    @staticmethod
    def _abandon(region: Region) -> None:
        """Give up on memory that a transfer of ours is still under: a GPU hangs, or a system call does."""
        logger.error("a transfer with %s does not end: its memory is kept until it does", region.label)
        keep_until_left(region.memory, region.gate)

    def _check_open(self) -> None:
        """Refuse a peer that asks while this agent is closing; _lock is held."""
        if self._is_closed:
            raise PeerLost(f"agent {self._agent.name!r} is closing")

    def _insert(self, number: int, name: str, memory: Memory, keys: dict[str, dict[str, str | int]]) -> Region:
        agent = self._agent
        with self._lock:
            if self._is_closed:
                raise AgentClosed(f"agent {agent.name!r} is closed")
            if name and name in self._by_name:
                raise ConfigError(f"region name {name!r} is taken", hint="deregister that region or use another name")
            generation = self._generations.get(name, 0) + 1 if name else 1
            region = Region(
                number, generation, name, memory, keys, agent.name, agent.incarnation, agent.native.Gate(),
                memory.kind, memory.device, memory.nbytes,
            )  # fmt: skip
            self._by_id[number] = region
            if name:
                self._generations[name] = generation
                self._by_name[name] = region
        if name:
            agent.publisher.touch()
        return region

    def _let_go(self, region: Region, importers: set[Link], sleepers: set[int]) -> None:
        agent = self._agent
        deadline = time.monotonic() + agent.config.deregister_timeout
        connections = self._connections(importers)
        stuck = agent.consent.announce_gone(region.id, connections, agent.config.deregister_timeout)
        if region.kind is MemoryKind.VRAM:
            stuck = [*stuck, *_gone_without_a_word(connections)]
        self._keep(_pids(stuck) | sleepers, [region])
        if not region.gate.drain(max(0.001, deadline - time.monotonic())):
            region.gate.close(STALE)  # our own transfers end now, by force
            if not region.gate.drain(agent.config.transfer_timeout):
                self._abandon(region)
                return
        for backend in agent.backends:
            backend.deregister(region.id)
        _close_fd(region)

    def _keep(self, pids: set[int], regions: Sequence[Region]) -> None:
        """Keep plain memory from being freed while a process lives that did not say that it has let go.

        A frozen one goes on with the system calls of its copy when it wakes, before it hears that its link is closed.
        Arenas need no keeping: what peers have mapped is theirs too.
        """
        memories = [region.memory for region in regions if region.memory.fd < 0]
        for pid in pids if memories else ():
            if not is_ending(pid):
                logger.warning(
                    "process %d did not let go of %r's memory: it is kept until that has ended", pid, self._agent.name
                )
                keep_until_ended(memories, pid)

    def _connections(self, links: set[Link]) -> list[Connection]:
        connections = [self._agent.connector.by_link(link) for link in links]
        return list(dict.fromkeys(one for one in connections if one is not None))

    def _check_mapped(self, memory: Memory) -> Memory:
        """Return memory as it is: what is said to be writable and is protected serves as a source alone."""
        if memory.kind is not MemoryKind.DRAM or memory.fd >= 0:
            return memory
        if not self._agent.native.mapped(memory.address, memory.nbytes):
            raise RangeError(
                f"memory at {memory.address:#x} of {memory.nbytes} bytes is not mapped in this process",
                hint="register memory that exists",
            )
        if memory.writable and not is_writable(memory.address, memory.nbytes):
            return replace(memory, writable=False)
        return memory


def _gone_without_a_word(connections: Sequence[Connection]) -> list[Connection]:
    """Return the peers that are lost and have not said that they let go: their GPUs may go on in our memory."""
    return [connection for connection in connections if connection.lost is not None and not connection.has_let_go]


def _pids(connections: Sequence[Connection]) -> set[int]:
    """Return the processes at the other ends, as far as links know them, ours left out."""
    links = [link for connection in connections for link in connection.links]
    return {getattr(link, "pid", 0) for link in links} - {0, os.getpid()}


def _allocate(nbytes: int, kind: str, device: int) -> Memory:
    if kind == MemoryKind.DRAM.value:
        return allocate(nbytes)
    if kind == MemoryKind.VRAM.value:
        return allocate_on(device, nbytes)
    raise ConfigError(f"memory of kind {kind!r} cannot be made", hint="use kind='dram' or kind='vram'")


def _hint(kind: MemoryKind, names: Sequence[str]) -> str:
    """Return what to do about memory that no backend takes."""
    if kind is MemoryKind.VRAM and not {"nvlink", "ucx"} & set(names):
        return "name nvlink or ucx in AgentConfig(backends=...); see `raynixl doctor` for why one is not there"
    return "run `raynixl doctor`"


def _close_fd(region: Region) -> None:
    if region.memory.fd >= 0:
        os.close(region.memory.fd)

"""What an agent lets its network peers reach: its regions, mapped for UCX when first needed, and their sealed keys."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from raynixl.backends.base import Local
from raynixl.backends.link import BaseLink
from raynixl.backends.ucx_key import Keys
from raynixl.errors import BackendUnavailable, RegionStale
from raynixl.memory import Memory, MemoryKind
from raynixl.native.ucx import CUDA_MEMORY, HOST_MEMORY, Mapping, Rail

logger = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
"""How long the bytes of a peer that died may still be on their way; its sockets end with it."""


@dataclass(slots=True, eq=False)
class Export:
    """One region: its memory, what UCX made of it, and the links of the peers that asked for its key."""

    memory: Memory
    mappings: tuple[Mapping, ...] = ()
    slow: str = ""
    """Why peers reach it only slowly, if they do."""
    sealed: bytes = b""
    links: set[BaseLink] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is mapped, so that it is mapped once
    is_gone: bool = False
    died_at: float = -math.inf
    """When it was last seen that a peer of another host had died."""

    def unmap(self) -> None:
        """Have UCX forget it."""
        with self.lock:
            self.is_gone = True
            mappings, self.mappings = self.mappings, ()
        for mapping in mappings:
            mapping.unmap()


class Exports:
    """The regions by number. `rails` gives the rails, made at the first call, which may take a second."""

    def __init__(
        self,
        local: Local,
        rails: Callable[[], Sequence[Rail]],
        ready: Callable[[Memory], AbstractContextManager[str]] = lambda _: nullcontext(""),
    ) -> None:
        self._local = local
        self._name = local.name
        self._rails = rails
        self._ready = ready
        self._lock = threading.Lock()  # protects _exports, _kept and the sets of links
        self._exports: dict[int, Export] = {}
        self._kept: dict[int, Memory] = {}

    def add(self, number: int, memory: Memory) -> None:
        """Take a region; it costs nothing until a network peer, or a transfer to one, needs it."""
        with self._lock:
            self._exports[number] = Export(memory)

    def remove(self, number: int) -> None:
        """Withdraw a region, and keep its memory for as long as a peer that is out of reach might still write to it."""
        with self._lock:
            export = self._exports.pop(number, None)
        if export is None:
            return
        export.unmap()
        self._linger(number, export)

    def mappings(self, number: int) -> tuple[Mapping, ...]:
        """Return the region's mapping on each rail, made now if need be.

        Raises:
            RegionStale: there is no such region any more.
            BackendUnavailable: UCX does not map it.
        """
        export = self._mapped(number)
        with export.lock:
            if export.is_gone:
                raise self._stale(number)
            return export.mappings

    def sealed(self, number: int, link: BaseLink) -> bytes:
        """Return the region's keys for a peer, and remember the peer. Raises as `mappings` does."""
        export = self._mapped(number)
        with self._lock:
            if self._exports.get(number) is not export:  # who removes it asks its links, which this one would miss
                raise self._stale(number)
            dead = {one for one in export.links if one.lost is not None and one.has_hung_up}
            export.links = (export.links - dead) | {link}
            if any(not one.pid for one in dead):
                export.died_at = time.monotonic()
        return export.sealed

    def why_slow(self, number: int) -> str:
        """Say why peers reach a mapped region only slowly; '' if they do not, or it is gone."""
        with self._lock:
            export = self._exports.get(number)
        return "" if export is None else export.slow

    def is_mapped(self, number: int) -> bool:
        """Whether a region's keys are there without any work; True also if there is no such region."""
        with self._lock:
            export = self._exports.get(number)
        return export is None or bool(export.sealed)

    def unmap_all(self) -> None:
        """Have UCX forget every region; the rails are closed."""
        with self._lock:
            exports = list(self._exports.values())
            self._exports.clear()
        for export in exports:
            export.unmap()

    def forget_all(self) -> None:
        """Hold on to nothing any more; the workers are gone."""
        with self._lock:
            self._kept.clear()

    def _mapped(self, number: int) -> Export:
        with self._lock:
            export = self._exports.get(number)
        if export is None:
            raise self._stale(number)
        if not export.sealed:
            self._map(number, export)
        return export

    def _stale(self, number: int) -> RegionStale:
        return RegionStale(f"region {number} of {self._name!r} is no longer registered")

    def _map(self, number: int, export: Export) -> None:
        rails, memory = self._rails(), export.memory
        kind = CUDA_MEMORY if memory.kind is MemoryKind.VRAM else HOST_MEMORY
        with export.lock:
            if export.is_gone:
                raise RegionStale(f"region {number} of {self._name!r} was deregistered meanwhile")
            if export.sealed:
                return
            mappings: list[Mapping] = []
            try:
                with self._ready(memory) as export.slow:
                    mappings.extend(rail.map(memory.address, memory.nbytes, kind) for rail in rails)
                    packed = tuple(mapping.key for mapping in mappings)
            except RuntimeError as exc:
                for mapping in mappings:
                    mapping.unmap()
                raise BackendUnavailable(
                    f"region {number} of {self._name!r}: {exc}", hint="raise the limit of locked memory: ulimit -l"
                ) from exc
            export.mappings = tuple(mappings)
            export.sealed = Keys(self._local.incarnation, number, memory.address, memory.nbytes, packed).seal()

    def _linger(self, number: int, export: Export) -> None:
        """Hold on to memory that bytes on their way may still reach.

        Peers that stand have let go, and said so. A process that died has no more than what is on its way. One that was
        given up alive, frozen or cut off, may go on where it stopped: what UCX emulates in software cannot be revoked,
        save by ending our own worker.
        """
        lost = [link for link in export.links if link.lost is not None and not link.pid]
        alive = sorted({link.peer for link in lost if not link.has_hung_up})
        if not lost and time.monotonic() - export.died_at > LINGER_SECONDS:
            return
        with self._lock:
            self._kept[number] = export.memory
        if alive:
            logger.warning(
                "%s did not let go of memory of %r: it is kept until this agent is closed", ", ".join(alive), self._name
            )
        else:
            self._local.reactor.call_later(LINGER_SECONDS, lambda: self._forget(number))

    def _forget(self, number: int) -> None:
        with self._lock:
            self._kept.pop(number, None)

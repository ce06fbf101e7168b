"""Registrations: the regions behind the buffers that a group is called with, kept for the next call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raynixl.errors import AgentClosed, RaynixlError
from raynixl.memory import MemoryKind, resolve
from raynixl.region import Region

if TYPE_CHECKING:
    from raynixl.agents import Agent

MAX_KEPT = 16
KEPT_NBYTES = 64 << 20
"""A region holds on to its buffer, so only the last few that were used are kept, of so many bytes together.

Registering a larger one anew costs nothing beside copying it.
"""


class Registrations:
    """Registers buffers as they are used, by address and length."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._kept: OrderedDict[tuple[int, int], Region] = OrderedDict()

    def get(self, buffer: Any) -> Region | None:
        """Return a buffer's region, or None for an empty one. Regions stand for themselves."""
        if isinstance(buffer, Region):
            return buffer
        if _is_empty(buffer):
            return None
        memory = resolve(buffer)
        key = (memory.address, memory.nbytes)
        region = self._kept.pop(key, None)
        if region is None or not region.is_registered or region.memory.writable != memory.writable:
            region = self._agent.register(buffer)
        self._kept[key] = region
        return region

    def trim(self) -> None:
        """Let go of buffers that are too many, or too large to be kept for a next call that may not come."""
        nbytes = sum(region.nbytes for region in self._kept.values())
        while len(self._kept) > MAX_KEPT or nbytes > KEPT_NBYTES:
            _, oldest = self._kept.popitem(last=False)
            nbytes -= oldest.nbytes
            self._deregister(oldest)

    def close(self) -> None:
        """Deregister everything."""
        while self._kept:
            self._deregister(self._kept.popitem()[1])

    def _deregister(self, region: Region) -> None:
        if region.is_registered:
            try:
                self._agent.deregister(region)
            except AgentClosed:
                return  # it has withdrawn everything


def gpus_of(buffers: Iterable[Any]) -> set[int]:
    """Return the GPUs that buffers lie on. What is no memory is left to whoever registers it."""
    found = set()
    for buffer in buffers:
        try:
            memory = buffer if isinstance(buffer, Region) else resolve(buffer)
        except RaynixlError:
            continue
        if memory.kind is MemoryKind.VRAM:
            found.add(memory.device)
    return found


def _is_empty(buffer: Any) -> bool:
    if buffer is None:
        return True
    face = getattr(buffer, "__cuda_array_interface__", None) if not hasattr(buffer, "nbytes") else None
    if face is not None:
        return 0 in face["shape"]
    nbytes = getattr(buffer, "nbytes", None)
    return nbytes == 0 if isinstance(nbytes, int) else hasattr(buffer, "__len__") and len(buffer) == 0

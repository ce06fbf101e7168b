"""Pulling: one pull at work at a target, of a whole image or of a delta, straight from the sources or in a relay."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, RegionStale
from raynixl.weights.bank import HostBank
from raynixl.weights.cargo import DeltaCargo, Giver, ImageCargo, givers_of, givers_of_blob
from raynixl.weights.protocol import Holder
from raynixl.weights.receiver import Place, PullTimes, Receiver
from raynixl.weights.relay import Relay
from raynixl.weights.workers import run_workers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raynixl.agents import Agent
    from raynixl.region import Region
    from raynixl.weights.arenas import Arenas
    from raynixl.weights.slots import Slot
    from raynixl.weights.targeting import Pull
    from raynixl.weights.throttle import Throttle

_MAX_NAMES = 4


class Blobs:
    """The memory that a delta came into, in which other receivers find it until it is let go of."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def __len__(self) -> int:
        return len(self.regions)

    @property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The blobs, one for each part."""
        return [region.array() for region in self.regions]

    def make(self, agent: Agent, sizes: Sequence[int]) -> None:
        """Make room for blobs; those before must have been let go of.

        Raises:
            RangeError: the host has too little memory.
        """
        for nbytes in sizes:
            self.regions.append(agent.empty(nbytes))

    def holder(self, agent: Agent) -> Holder:
        """Say where they lie."""
        records = tuple(region.record() for region in self.regions)
        return Holder(name=agent.name, incarnation=agent.incarnation, regions=records)

    def release(self, agent: Agent) -> None:
        """Let go of them; idempotent."""
        while self.regions:
            region = self.regions.pop()
            try:
                agent.deregister(region)
            except (AgentClosed, RegionStale):
                continue  # the agent was closed before us and has withdrawn it


@dataclass(frozen=True, slots=True)
class Pulling:
    """One pull at work."""

    agent: Agent
    name: str
    coordinator: str
    request: Pull
    deadline: float
    stop: threading.Event

    def image(self, cargo: ImageCargo, slot: Slot, throttle: Throttle, threads: int) -> PullTimes:
        """Bring the whole image in."""
        began = time.monotonic()
        receiver = self.receiver(cargo, slot.arenas, throttle)
        if self.request.is_relay:
            self._relay(receiver, slot.holder(self.agent)).run(threads=threads)
        else:
            run_workers(receiver.from_origin, len(receiver.digests), threads=threads)
        return receiver.times(began, threads)

    def mend(self, receiver: Receiver, slot: Slot, wrong: Sequence[int], threads: int) -> None:
        """Bring some chunks of an image in; all others lie in the slot, and are given to others."""
        if self.request.is_relay:
            have = sorted(set(range(len(receiver.digests))) - set(wrong))
            self._relay(receiver, slot.holder(self.agent), have=have).run(threads=threads)
        else:
            run_workers(lambda number: receiver.from_origin(wrong[number]), len(wrong), threads=threads)

    def delta(self, cargo: DeltaCargo, throttle: Throttle, threads: int, blobs: Blobs) -> PullTimes:
        """Bring the blobs of a delta in, to memory where they stay for other receivers."""
        began = time.monotonic()
        blobs.make(self.agent, cargo.sizes)
        givers = {place: givers_of_blob(blob) for place, blob in enumerate(self.request.blobs)}
        place = Place(blobs.regions, HostBank(blobs.arrays, self.agent.native))
        receiver = Receiver(
            self.agent, cargo, place, self.request.version, self.request.blob_digests,
            givers, self.deadline, self.stop, lambda _chunk: "a delta", throttle,
        )  # fmt: skip
        if self.request.relays_delta:
            self._relay(receiver, blobs.holder(self.agent), is_delta=True).run(threads=threads)
        else:
            run_workers(receiver.from_origin, len(receiver.digests), threads=threads)
        return receiver.times(began, threads)

    def _relay(self, receiver: Receiver, holder: Holder, have: Sequence[int] = (), *, is_delta: bool = False) -> Relay:
        to = (self.name, self.request.push, self.coordinator)
        return Relay(self.agent, receiver, *to, holder, have, is_delta)

    def receiver(self, cargo: ImageCargo, arenas: Arenas, throttle: Throttle) -> Receiver:
        """Return what brings chunks of an image in."""
        givers: dict[int, tuple[Giver, ...]] = {part: givers_of(own) for part, own in self.request.origins.items()}
        place = Place(arenas.regions, arenas.bank, arenas.reads)
        return Receiver(
            self.agent, cargo, place, self.request.version, self.request.digests, givers, self.deadline, self.stop,
            lambda chunk: names_in(cargo, chunk), throttle,
        )  # fmt: skip


def names_in(cargo: ImageCargo, chunk: int) -> str:
    """Name the tensors that lie in a chunk, the first few of many."""
    arena, offset, nbytes = cargo.chunks[chunk].tolist()
    names = [
        entry.name
        for entry in cargo.layout.entries
        if entry.arena == arena and entry.offset < offset + nbytes and offset < entry.offset + entry.nbytes
    ]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name[:100]) for name in names[:_MAX_NAMES]) + more

"""Pulling: one pull at work at a target, of a whole image or of a delta, straight from the sources or in a relay."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.weights.cargo import DeltaCargo, Giver, ImageCargo, givers_of, givers_of_blob
from raynixl.weights.receiver import Place, PullTimes, Receiver
from raynixl.weights.relay import Relay
from raynixl.weights.workers import run_workers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raynixl.agents import Agent
    from raynixl.weights.arenas import Arenas
    from raynixl.weights.slots import Slot
    from raynixl.weights.targeting import Pull
    from raynixl.weights.throttle import Throttle

_MAX_NAMES = 4


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
            relay = Relay(self.agent, receiver, self.name, self.request.push, self.coordinator, slot.holder(self.agent))
            relay.run(threads=threads)
        else:
            run_workers(receiver.from_origin, len(cargo.chunks), threads=threads)
        return receiver.times(began, threads)

    def delta(self, cargo: DeltaCargo, throttle: Throttle, threads: int) -> tuple[PullTimes, list[NDArray[np.uint8]]]:
        """Bring the blobs of a delta in."""
        began = time.monotonic()
        regions = [self.agent.empty(nbytes) for nbytes in cargo.sizes]
        try:
            arrays = [region.array() for region in regions]
            givers = {place: givers_of_blob(blob) for place, blob in enumerate(self.request.blobs)}
            receiver = Receiver(
                self.agent, cargo, Place(regions, arrays), self.request.version, self.request.blob_digests, givers,
                self.deadline, self.stop, lambda _chunk: "a delta", throttle,
            )  # fmt: skip
            run_workers(receiver.from_origin, len(cargo.chunks), threads=threads)
            return receiver.times(began, threads), [array.copy() for array in arrays]
        finally:
            for region in regions:
                self.agent.deregister(region)

    def receiver(self, cargo: ImageCargo, arenas: Arenas, throttle: Throttle) -> Receiver:
        """Return what brings chunks of an image in."""
        givers: dict[int, tuple[Giver, ...]] = {part: givers_of(own) for part, own in self.request.origins.items()}
        place = Place(arenas.regions, arenas.arrays)
        return Receiver(
            self.agent, cargo, place, self.request.version, self.request.digests, givers, self.deadline, self.stop,
            lambda chunk: names_in(cargo, chunk), throttle,
        )  # fmt: skip


def mend(receiver: Receiver, chunk: int) -> None:
    """Bring a chunk in whole if a delta has not made it right: its base may lie in tensors that the engine changed."""
    if not receiver.is_whole(chunk):
        receiver.from_origin(chunk)


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

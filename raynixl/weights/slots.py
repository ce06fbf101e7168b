"""Slots: the memory of a target in which versions lie whole: one that is served, those that are kept, one to fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.weights.arenas import Arenas
from raynixl.weights.digest import version_digest
from raynixl.weights.protocol import Holder
from raynixl.weights.space import HOST, Space
from raynixl.weights.targeting import Held

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.layout import Layout


@dataclass(slots=True, eq=False)
class Slot:
    """Arenas for one version, and which one lies in them, verified, if any."""

    arenas: Arenas
    version: int = 0
    chunk_nbytes: int = 0
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))

    @property
    def digest(self) -> str:
        """What names the version's bytes."""
        return version_digest(self.digests)

    def fill(self, version: int, digests: NDArray[np.uint64], chunk_nbytes: int) -> None:
        """Note that a version lies here whole."""
        self.digests, self.chunk_nbytes = digests, chunk_nbytes
        self.version = version  # last: others look without waiting

    def holder(self, agent: Agent) -> Holder:
        """Say where it lies."""
        regions = tuple(region.record() for region in self.arenas.regions)
        return Holder(name=agent.name, incarnation=agent.incarnation, regions=regions)


@dataclass(frozen=True, slots=True)
class Ready:
    """A verified version in a slot, until its push is over."""

    push: str
    version: int
    slot: Slot
    until: float
    digests: NDArray[np.uint64]
    chunk_nbytes: int


class Slots:
    """The slots of one target: at most `limit`. Not safe in threads: one phase of a push at a time uses them."""

    def __init__(self, agent: Agent, limit: int, spaces: Sequence[Space] = (HOST,)) -> None:
        self.active: Slot | None = None
        """The slot that the model's tensors lie in, where they are repointed."""
        self._agent = agent
        self._limit = limit
        self._spaces = spaces
        self._slots: list[Slot] = []

    def __repr__(self) -> str:
        return f"Slots({[slot.version for slot in self._slots]} of {self._limit})"

    @property
    def versions(self) -> list[int]:
        """The versions that lie here whole, oldest first."""
        return sorted({slot.version for slot in self._slots if slot.version})

    def find(self, version: int) -> Slot | None:
        """Return the slot of a version, if there is one."""
        return next((slot for slot in self._slots if slot.version == version and version), None)

    def fill(self, slot: Slot, version: int, digests: NDArray[np.uint64], chunk_nbytes: int) -> None:
        """Note that a version lies whole in a slot, and in no other: a push of that number may have failed before."""
        for other in self._slots:
            if other is not slot and other.version == version:
                other.version = 0
        slot.fill(version, digests, chunk_nbytes)

    def held(self) -> tuple[Held, ...]:
        """Describe the versions that lie here to others."""
        return tuple(
            Held(
                version=slot.version, image=slot.arenas.layout.digest, digest=slot.digest,
                chunk_nbytes=slot.chunk_nbytes, holder=slot.holder(self._agent),
            )
            for slot in self._slots
            if slot.version
        )  # fmt: skip

    def make(self, layout: Layout) -> Slot:
        """Make room for one more version.

        Raises:
            RangeError: the host has too little memory.
        """
        slot = Slot(Arenas(self._agent, layout, spaces=self._spaces))
        self._slots.append(slot)
        return slot

    def take(self, layout: Layout, in_use: Sequence[Slot]) -> Slot:
        """Return a slot to fill: an empty one, else a new one while there may be more, else the oldest version's.

        `in_use` are those that the model's tensors lie in. If nothing else is left, one of them that is not active is
        let go of, whose memory stays with those tensors, and a new one made.
        """
        for slot in [one for one in self._slots if one.arenas.layout != layout and one is not self.active]:
            self._drop(slot)
        free = [slot for slot in self._slots if slot is not self.active and slot not in in_use]
        free.sort(key=lambda slot: slot.version)
        if free and (free[0].version == 0 or len(self._slots) >= self._limit):
            free[0].version = 0
            return free[0]
        if len(self._slots) >= self._limit:
            self.drop_spare(in_use)
        return self.make(layout)

    def has_free(self) -> bool:
        """Whether a version can come without memory being made for it."""
        return len(self._slots) >= self._limit or any(
            slot.version == 0 and slot is not self.active for slot in self._slots
        )

    def drop_spare(self, in_use: Sequence[Slot]) -> None:
        """Let go of slots that the model's tensors lie in but that are not the active one: they cannot be filled."""
        for slot in in_use:
            if slot is not self.active and slot in self._slots:
                self._drop(slot)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(list(self._slots))

    def release(self) -> None:
        """Let go of all of them; idempotent."""
        for slot in list(self._slots):
            self._drop(slot)
        self.active = None

    def _drop(self, slot: Slot) -> None:
        self._slots.remove(slot)
        slot.arenas.release()

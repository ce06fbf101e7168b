"""Filling: how a version gets into a slot of a target: whole, or as the base version with what has changed."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from raynixl.errors import RaynixlError, TransferCancelled, TransferTimeout
from raynixl.weights.cargo import DeltaCargo, ImageCargo
from raynixl.weights.installer import Install, Installer
from raynixl.weights.pulling import Blobs, Pulling
from raynixl.weights.receiver import PullTimes
from raynixl.weights.slots import Slot, Slots
from raynixl.weights.throttle import Throttle
from raynixl.weights.workers import run_workers

if TYPE_CHECKING:
    from raynixl.agents import Agent

logger = logging.getLogger(__name__)


class Filler:
    """Fills the slots of one target. One phase of a push at a time uses it.

    `blobs` are the delta of the last pull: others pull them from here until somebody flips.
    """

    def __init__(self, agent: Agent, installer: Installer, slots: Slots, throttle: Throttle) -> None:
        self.blobs = Blobs()
        self._agent = agent
        self._installer = installer
        self._slots = slots
        self._throttle = throttle
        self._threads = agent.config.copy_threads

    def bring(self, work: Pulling, cargo: ImageCargo) -> tuple[Slot, PullTimes]:
        """Bring a version into a slot, by what changed since its base where that lies here, else whole.

        Raises:
            RaynixlError: it did not come.
        """
        base = self._slots.find(work.request.base)
        if base is not None and base.arenas.layout == cargo.layout:
            try:
                slot, times = self._bring_delta(work, cargo, base)
            except (TransferTimeout, TransferCancelled):
                raise
            except RaynixlError as exc:
                logger.info("no delta of version %d at %r: %s", work.request.version, self._agent.name, exc)
            else:
                return slot, self._mended(work, cargo, slot, times)
        if work.request.base:  # what it would change is not here any more, or the delta did not come: everything does
            work = replace(work, request=replace(work.request, base=0))
        slot = self._slot(cargo)
        return slot, work.image(cargo, slot, self._throttle, slot.arenas.bank.threads(self._threads))

    def _bring_delta(self, work: Pulling, cargo: ImageCargo, base: Slot) -> tuple[Slot, PullTimes]:
        threads, throttle = self._threads, self._throttle
        times = work.delta(DeltaCargo(work.request.blobs, cargo.chunk_nbytes), throttle, threads, self.blobs)
        slot = self._slot(cargo)  # the base's own, where there may be no other
        if slot is not base:
            slot.arenas.bank.take(base.arenas.bank)
        slot.arenas.bank.apply(self.blobs.arrays, threads=threads)
        return slot, times

    def _mended(self, work: Pulling, cargo: ImageCargo, slot: Slot, times: PullTimes) -> PullTimes:
        """Bring in what a delta has not made right: its base may lie in tensors that the engine has changed."""
        threads, whole = slot.arenas.bank.threads(self._threads), work.receiver(cargo, slot.arenas, self._throttle)
        wrong: list[int] = []

        def check(chunk: int) -> None:
            if not whole.is_whole(chunk):
                wrong.append(chunk)

        run_workers(check, len(cargo.chunks), threads=threads)
        if wrong:
            work.mend(whole, slot, wrong, threads)
        return times.plus(whole)

    def _slot(self, cargo: ImageCargo) -> Slot:
        """Return a slot to fill. Those that the model's own tensors lie in stay as they are."""
        in_use = [slot for slot in self._slots if self._installer.lies_in(slot.arenas)]
        if self._installer.way is Install.COPY:
            self._slots.drop_spare(in_use)
        return self._slots.take(cargo.layout, in_use)

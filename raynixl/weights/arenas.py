"""Arenas: the registered memory that carries one version of a model."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from raynixl import cuda
from raynixl.errors import AgentClosed, BackendUnavailable, ConfigError, RangeError, RegionStale
from raynixl.weights.bank import HostBank, holds_any
from raynixl.weights.device_bank import bank_of
from raynixl.weights.reads import Reads
from raynixl.weights.space import HOST, Space

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from raynixl.agents import Agent
    from raynixl.region import Region
    from raynixl.weights.layout import Entry, Layout

logger = logging.getLogger(__name__)


class Arenas:
    """Fresh registered memory for a layout, in the first of some spaces that has room. Views outlive `release`.

    Raises:
        RangeError: none has room.
        ConfigError: the name is taken.
    """

    def __init__(self, agent: Agent, layout: Layout, *, name: str = "", spaces: Sequence[Space] = (HOST,)) -> None:
        self.layout = layout
        self.regions: list[Region] = []
        self.reads = Reads()
        """What is read into it, for whoever does that again and again."""
        self._agent = agent
        self.space = self._fill(name, spaces)
        self._unpin = weakref.finalize(self, _unpin, self._pin() if self.space.is_pinned else [], os.getpid())
        self._unpin.atexit = False  # what is left then goes with the process
        self.bank = bank_of(self.space, self.regions, agent.native)

    def __repr__(self) -> str:
        return f"Arenas({self.layout}, {len(self.regions)} registered, {self.space.name})"

    @property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The bytes, of what lies in host memory."""
        assert isinstance(self.bank, HostBank)
        return self.bank.arrays

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Return a view of one tensor."""
        return self.bank.tensor(entry)

    def holds_any(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether one of these tensors lies in this memory."""
        return holds_any(self.bank, tensors)

    def _fill(self, name: str, spaces: Sequence[Space]) -> Space:
        for space in spaces:
            try:
                for number, nbytes in enumerate(self.layout.arenas):
                    self.regions.append(space.empty(self._agent, nbytes, name=f"{name}/{number}" if name else ""))
                return space
            except (RangeError, BackendUnavailable) as exc:
                self._deregister()
                if space is spaces[-1]:
                    raise
                # as text: who keeps records would keep this memory by the error's traceback
                logger.warning("weights of %r lie in the memory of another device: %s", self._agent.name, str(exc))
            except BaseException:
                self._deregister()
                raise
        raise AssertionError("there is a space to lie in")

    def _pin(self) -> list[cuda.Pin]:
        """Pin host memory, as a GPU copies to it and from it several times as fast then; it goes without, too."""
        pins: list[cuda.Pin] = []
        if not cuda.has_driver():
            return pins
        try:
            with cuda.on(self.space.near):
                pins.extend(cuda.pin(region.memory.address, region.nbytes) for region in self.regions)
        except (RangeError, BackendUnavailable, ConfigError) as exc:
            logger.info("weights of %r are not pinned: %s", self._agent.name, str(exc))
        return pins

    def release(self) -> None:
        """Withdraw the memory from peers and let go of it, save where views of it live on; idempotent."""
        self.bank = HostBank(())
        self.reads.clear()
        self._unpin()
        self._deregister()

    def _deregister(self) -> None:
        while self.regions:
            region = self.regions.pop()
            try:
                self._agent.deregister(region)
            except (AgentClosed, RegionStale):
                continue  # the agent was closed before us and has withdrawn it


def _unpin(pins: Sequence[cuda.Pin], pid: int) -> None:
    """Unpin memory before it is unmapped; a fork has no part in it."""
    if os.getpid() == pid:
        for pin in pins:
            pin.close()

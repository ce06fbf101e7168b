"""Arenas: the registered memory that carries one version of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, RegionStale
from raynixl.weights.tensors import view_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from raynixl.agents import Agent
    from raynixl.region import Region
    from raynixl.weights.layout import Entry, Layout


class Arenas:
    """Fresh registered memory for a layout. Views of it stay valid after `release`.

    Raises:
        RangeError: the host has too little memory.
        ConfigError: the name is taken.
    """

    def __init__(self, agent: Agent, layout: Layout, *, name: str = "") -> None:
        self.layout = layout
        self.regions: list[Region] = []
        self.arrays: list[NDArray[np.uint8]] = []
        self._agent = agent
        try:
            for number, nbytes in enumerate(layout.arenas):
                self.regions.append(agent.empty(nbytes, name=f"{name}/{number}" if name else ""))
        except BaseException:
            self.release()
            raise
        self.arrays = [region.array() for region in self.regions]

    def __repr__(self) -> str:
        return f"Arenas({self.layout}, {len(self.regions)} registered)"

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Return a view of one tensor."""
        return view_of(self.arrays, entry)

    def holds_any(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether one of these tensors lies in this memory."""
        spans = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in self.arrays]
        addresses = (one.data_ptr() for one in tensors if one.device.type == "cpu" and one.numel())
        return any(first <= address < last for address in addresses for first, last in spans)

    def release(self) -> None:
        """Withdraw the memory from peers and let go of it, save where views of it live on; idempotent."""
        self.arrays = []
        while self.regions:
            region = self.regions.pop()
            try:
                self._agent.deregister(region)
            except (AgentClosed, RegionStale):
                continue  # the agent was closed before us and has withdrawn it

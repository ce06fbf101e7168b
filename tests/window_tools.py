"""Two processes whose agents know each other, over one backend: for the tests of windows and of what goes over them."""

from __future__ import annotations

from typing import Any

import numpy as np
from lane_tools import CMA, config_for
from liveness_tools import QUICK, World

from raynixl import Agent
from raynixl.agents.window import Window
from raynixl.backends.shm import ShmBackend
from raynixl.backends.ucx import UcxBackend
from raynixl.testing.places import FarProcess

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Couple(World):
    """Near and the victim; no bystander."""

    def __init__(self, backend: str, tls: str = CMA, **changes: Any) -> None:
        self.backend = backend
        if backend == "ucx":
            super().__init__(UcxBackend, config_for(tls, **changes))
        else:
            super().__init__(ShmBackend, QUICK.model_copy(update=changes))

    def open(self, far: FarProcess, name: str) -> None:
        """Start an agent in a process, and hand the records around by the pipes."""
        if far is not self.bystander:
            far.open(name)
            self.near.peer(far.ask("record"))
            far.ask("meet", self.near.record())

    def content(self, name: str) -> Bytes:
        """The bytes of a region of the victim, as it sees them."""
        return np.frombuffer(self.victim.ask("content", name), np.uint8)


def store(agent: Agent, window: Window, offset: int, data: Bytes) -> int:
    """Store bytes through a window as native calls do: within its gates; return the code of one that refused."""
    for gate in window.gates:
        code = gate.enter()
        if code:
            return code
    try:
        agent.native.copy(window.address + offset, data.ctypes.data, data.nbytes)
    finally:
        for gate in window.gates:
            gate.leave()
    return 0


def table(*rows: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Rows of (offset here, offset there, nbytes)."""
    return np.array(rows, np.uint64).reshape(-1, 3)

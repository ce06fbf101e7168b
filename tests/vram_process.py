"""An agent of another process whose GPUs are made up; run as a script it is that process. See agent_process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cuda_fake
import cuda_kernels
import numpy as np
from agent_process import LEAVE_SECONDS, FarAgent, Served, far_agent, main
from agent_tools import random_bytes

from raynixl import Agent, RaynixlError
from raynixl.testing.contents import get, put

BACKENDS = ("shm", "nvlink")
FAKES: list[cuda_fake.FakeCuda] = []


@contextmanager
def far_vram(name: str, **settings: Any) -> Iterator[FarAgent]:
    """A far agent that has nvlink and made-up GPUs."""
    with far_agent(name, script=__file__, **settings) as far:
        yield far


class ServedVram(Served):
    """What the far end does besides."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        self.transfers: list[Any] = []

    def region(self, name: str, nbytes: int, memory: str = "vram", seed: int = 0, device: int = 0) -> None:
        """Register memory: of a GPU, an arena or plain; random bytes of a seed, or zeros."""
        if memory == "user":
            region = self.agent.register(bytearray(nbytes), name=name)
        else:
            region = self.agent.empty(nbytes, kind="vram" if memory == "vram" else "dram", device=device, name=name)
        self.regions[name] = region
        put(region.memory, random_bytes(nbytes, seed) if seed else np.zeros(nbytes, np.uint8))

    def drop(self) -> None:
        """Withdraw all that is left."""
        for name in list(self.regions):
            self.agent.deregister(self.regions.pop(name))

    def carve(self, name: str, of: str, offset: int, nbytes: int) -> None:
        """Register part of a region's memory as a region of its own."""
        from vram_tools import Piece

        self.regions[name] = self.agent.register(Piece(self.regions[of], offset, nbytes), name=name)

    def hear(self) -> str:
        """Wait for a notification."""
        return self.agent.wait_notification(LEAVE_SECONDS).payload.decode()

    def content(self, name: str) -> str:
        """The bytes of a region, in hexadecimal digits."""
        return get(self.regions[name].memory).tobytes().hex()

    def fill(self, name: str, value: int) -> None:
        """Set every byte."""
        memory = self.regions[name].memory
        put(memory, np.full(memory.nbytes, value, np.uint8))

    def values(self, name: str) -> list[int]:
        """Which byte values occur."""
        return sorted(np.unique(get(self.regions[name].memory)).tolist())

    def copy(self, op: str, mine: str, record: str, theirs: str) -> None:
        """Read or write a whole region of another agent."""
        self.start(op, mine, record, theirs)
        self.transfers.pop().wait(LEAVE_SECONDS)

    def try_copy(self, op: str, mine: str, record: str, theirs: str) -> str:
        """The same; say how it failed, or ''."""
        try:
            self.copy(op, mine, record, theirs)
        except RaynixlError as exc:
            return f"{type(exc).__name__}: {exc}"
        return ""

    def start(self, op: str, mine: str, record: str, theirs: str, count: int = 1) -> None:
        """Start that, so many times, and wait for none of it."""
        ours, remote = self.regions[mine], self.agent.peer(record.encode())[theirs]
        plan = self.agent.prepare(op, *((remote, ours) if op == "read" else (ours, remote)))
        self.transfers += [plan.post() for _ in range(count)]

    def hold(self) -> None:
        """Have the GPUs do nothing from now on."""
        FAKES[0].work.mode = cuda_fake.Mode.HELD

    def leave(self) -> None:
        """Close the agent; the process goes on."""
        self.agent.close()

    def ends(self) -> list[str]:
        """How the transfers that were started have ended: the class of each one's error, or ''."""
        ends = []
        for transfer in self.transfers:
            try:
                transfer.wait(LEAVE_SECONDS)
                ends.append("")
            except RaynixlError as exc:
                ends.append(type(exc).__name__)
        self.transfers.clear()
        return ends

    def busy(self, seconds: float) -> None:
        """Keep Python busy."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            continue


if __name__ == "__main__":
    FAKES.append(cuda_fake.install())
    cuda_kernels.register(FAKES[0])
    main(ServedVram, BACKENDS)

"""A backend without messages that carries memory said to be a GPU's; in truth it is host memory of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from agent_tools import make_config

from raynixl import Agent, BackendUnavailable, MemoryKind
from raynixl.backends.base import Binding, Capabilities, Link, Local, Request
from raynixl.backends.shm import addresses
from raynixl.backends.silent_link import SilentLink
from raynixl.backends.table import offered
from raynixl.memory import Memory
from raynixl.native import COPY, Program
from raynixl.record import AgentRecord
from raynixl.region import RemoteRegion

DRAM, VRAM = MemoryKind.DRAM, MemoryKind.VRAM


class OnGpu:
    """Host memory that says it is a GPU's."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.zeros(nbytes, np.uint8)
        self.__cuda_array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (self.bytes.ctypes.data, False),
        }  # fmt: skip


class SilentBackend:
    """Copies by address; knows no messages. `refuses` are the sizes of regions that it does not bind."""

    name = "silent"
    capabilities = Capabilities(kinds=frozenset({(VRAM, VRAM), (VRAM, DRAM), (DRAM, VRAM)}), messages=False)

    def __init__(self, local: Local) -> None:
        self.local = local
        self.links: list[SilentLink] = []
        self.bound: list[Binding] = []
        self.refuses: set[int] = set()
        self.cannot_prepare = False
        self.tries = 0

    def local_metadata(self) -> dict[str, str | int]:
        return {}

    def reaches(self, record: AgentRecord) -> str:
        return "" if self.name in record.backends else f"{record.name!r} does not offer it"

    def register(self, region_id: int, memory: Memory) -> dict[str, str | int]:
        return {"address": memory.address}

    def deregister(self, region_id: int) -> None:
        return

    def connect(self, record: AgentRecord, deadline: float) -> Link:
        self.links.append(SilentLink(self.local, record, backend=self.name))
        return self.links[-1]

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        self.tries += 1
        if remote.nbytes in self.refuses:
            raise BackendUnavailable(f"{remote.label} is refused")
        address = int(remote.record.keys[self.name]["address"])
        self.bound.append(Binding(remote, link, self.local.native.Gate(), "by address", address))
        return self.bound[-1]

    def prepare(self, request: Request) -> list[Program]:
        if self.cannot_prepare:
            raise BackendUnavailable("these two do not reach each other")
        return [self.local.engine.program(COPY, 0, addresses(request), request.gates)]

    def close(self) -> None:
        for link in self.links:
            link.close()


class OtherBackend(SilentBackend):
    """The same once more, as a second choice."""

    name = "other"


@contextmanager
def silent_agents(*names: str, backends: Sequence[str] = ("shm", "silent", "other"), **settings: Any) -> Iterator[Any]:
    """Agents of this process that have these backends, and know each other."""
    with ExitStack() as stack:
        with offered("silent", SilentBackend), offered("other", OtherBackend):
            agents = [
                stack.enter_context(Agent(name, config=make_config(backends=tuple(backends), **settings)))
                for name in names
            ]
        for one in agents:
            for other in agents:
                if one is not other:
                    one.peer(other.record())
        yield agents

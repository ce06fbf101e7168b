"""The scene of a conformance check: an agent near, one far, and memory that both have registered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from raynixl import cuda
from raynixl.agents import Agent, Transfer
from raynixl.backends.base import Backend
from raynixl.backends.table import Factory
from raynixl.config import AgentConfig
from raynixl.errors import BackendUnavailable, RaynixlError
from raynixl.memory import MemoryKind
from raynixl.record import AgentRecord
from raynixl.region import Region, RemoteRegion
from raynixl.testing.contents import put
from raynixl.testing.far import PATIENCE, make_agent, make_region, pattern
from raynixl.testing.places import Far

MEMORIES = ("arena", "user", "vram", "arena-vram", "user-vram", "vram-arena")
"""Sorts of memory, ours and theirs where these differ."""
_KINDS = {"arena": MemoryKind.DRAM, "user": MemoryKind.DRAM, "vram": MemoryKind.VRAM}


class Unreached(Exception):
    """The backend does not reach this place, or has nothing to check there; says why."""


def expect(condition: Any, message: str) -> None:
    """Fail the check unless the condition holds."""
    if not condition:
        raise AssertionError(message)


@dataclass
class Scene:
    """An agent near and one far that know each other. Enter it; it is closed at the end."""

    factory: Factory
    config: AgentConfig
    far: Far
    near: Agent = field(init=False)
    memories: list[str] = field(init=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __enter__(self) -> Scene:
        self.near = make_agent("near", self.factory, self.config)
        self.near.serve("echo", lambda _peer, payload: payload, threaded=False)
        try:
            self.open_far()
            link = self.near.connector.connect("far", time.monotonic() + PATIENCE).link
            if self.backend.capabilities.messages:
                expect(link.backend == self.backend.name, f"its links say {link.backend!r}, not {self.backend.name!r}")
            named = [memory for memory in MEMORIES if kinds_of(memory) in self.backend.capabilities.kinds]
            self.memories = [memory for memory in named if self._carries(memory)]
            if not self.memories:
                raise Unreached("it carries neither memory of agent.empty() nor other memory")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.near.close()
        self.far.close_agent()

    @property
    def backend(self) -> Backend:
        """The near agent's backend under test."""
        return self.near.backends[0]

    def open_far(self) -> None:
        """Start a far agent, also after the last one ended, and make both known to each other."""
        self.far.open("far")
        record: bytes = self.far.ask("record")
        reason = self.backend.reaches(AgentRecord.from_bytes(record))
        if reason:
            raise Unreached(reason)
        self.near.peer(record)
        self.far.ask("meet", self.near.record())

    def pair(self, nbytes: int, memory: str, *, seed: int = 0) -> tuple[Region, RemoteRegion]:
        """Return a near region and the far one of the same size and sort; they hold different patterns."""
        mine = self.region(nbytes, memory, seed=seed)
        return mine, self.remote(nbytes, memory, seed=seed + 1)

    def region(self, nbytes: int, memory: str, *, seed: int = 0) -> Region:
        """Return a region of the near agent."""
        region = make_region(self.near, f"near-{next(self._numbers)}", nbytes, split(memory)[0])
        put(region.memory, pattern(nbytes, seed))
        return region

    def remote(self, nbytes: int, memory: str, *, seed: int = 0) -> RemoteRegion:
        """Return a region of the far agent."""
        name = f"far-{next(self._numbers)}"
        self.far.ask("make", name, nbytes, split(memory)[1], seed)
        return self.near.peer("far")[name]

    def content(self, remote: RemoteRegion) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the bytes of a far region as the far side sees them."""
        return np.frombuffer(self.far.ask("content", remote.name), np.uint8)

    @property
    def mutual(self) -> list[str]:
        """The sorts of memory with which the far side can do what the near one can."""
        swapped = ["-".join(reversed(memory.split("-"))) for memory in self.memories]
        return [memory for memory, other in zip(self.memories, swapped, strict=True) if other in self.memories]

    def _carries(self, memory: str) -> bool:
        if MemoryKind.VRAM in kinds_of(memory) and not cuda.has_driver():
            return False
        try:
            mine, theirs = self.pair(1, memory)
            self.near.read(theirs, mine).wait(PATIENCE)
        except BackendUnavailable:
            return False
        return True


def split(memory: str) -> tuple[str, str]:
    """Return the sort of our memory and that of theirs."""
    ours, _, theirs = memory.partition("-")
    return ours, theirs or ours


def kinds_of(memory: str) -> tuple[MemoryKind, MemoryKind]:
    """Return the (local, remote) kinds that sorts of memory are of."""
    ours, theirs = split(memory)
    return _KINDS[ours], _KINDS[theirs]


def expect_equal(seen: Any, wanted: Any, what: str) -> None:
    """Fail the check, naming the first byte that differs."""
    wrong = np.flatnonzero(np.asarray(seen) != np.asarray(wanted))
    if len(wrong):
        at = int(wrong[0])
        raise AssertionError(f"{what}: {len(wrong)} bytes are wrong, first at {at}: {seen[at]} is not {wanted[at]}")


def expect_error(action: Callable[[], Any], *kinds: type[RaynixlError], what: str) -> RaynixlError:
    """Fail the check unless the action, or the transfer or reply that it returns, ends with such an error in time."""
    began = time.monotonic()
    try:
        result = action()
        if isinstance(result, Transfer):
            result.wait(PATIENCE)
        elif hasattr(result, "wait"):
            result.wait()
    except kinds as exc:
        expect(time.monotonic() - began < PATIENCE, f"{what}: the error came only after {PATIENCE:g} s")
        return exc
    except RaynixlError as exc:
        raise AssertionError(f"{what}: ended with {exc!r}, not {' or '.join(k.__name__ for k in kinds)}") from exc
    raise AssertionError(f"{what}: succeeded, though {' or '.join(kind.__name__ for kind in kinds)} was due")

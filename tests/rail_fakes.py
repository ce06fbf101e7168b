"""Fakes for what stands on rails of UCX: rails that note what they map, links, and a reactor whose clock stands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from raynixl import PeerLost, RaynixlError

INCARNATION = "ab" * 16


class FakeMapping:
    """A mapping of a fake rail."""

    def __init__(self, rail: FakeRail, span: tuple[int, int, int]) -> None:
        self._rail = rail
        self.span = span
        self.is_mapped = True

    @property
    def key(self) -> bytes:
        """A key that tells rail and address."""
        if self._rail.packs_no_key:
            raise RuntimeError("no key")
        return f"{self._rail.name}:{self.span[0]}".encode()

    def unmap(self) -> None:
        """Note it."""
        self.is_mapped = False


class FakeRail:
    """A rail that maps whatever it is given, unless told to fail; `hold` has it wait before it does."""

    def __init__(self, name: str = "rail") -> None:
        self.name = name
        self.made: list[FakeMapping] = []
        self.fails = False
        self.packs_no_key = False
        self.entered = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def map(self, address: int, nbytes: int, memory_type: int) -> FakeMapping:
        """Map, or fail."""
        self.entered.set()
        assert self.may_go_on.wait(20.0)
        if self.fails:
            raise RuntimeError("Cannot allocate memory")
        self.made.append(FakeMapping(self, (address, nbytes, memory_type)))
        return self.made[-1]

    @property
    def mapped(self) -> int:
        """How many mappings there are at the moment."""
        return sum(one.is_mapped for one in self.made)


@dataclass(eq=False)
class FakeLink:
    """What exports and answers see of a link. `pid` 0: the peer is on another host."""

    peer: str = "bob"
    pid: int = 0
    lost: RaynixlError | None = None
    has_hung_up: bool = False
    sent: list[bytes] = field(default_factory=list)

    def send_control(self, body: bytes) -> None:
        """Note it, or raise why not."""
        if self.lost is not None:
            raise self.lost
        self.sent.append(body)

    def die(self, *, has_hung_up: bool) -> None:
        """Be lost: because the other end said that it is over, or because it was given up."""
        self.has_hung_up = has_hung_up
        self.lost = PeerLost("gone")


class FakeReactor:
    """Calls later what the test lets come."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, action: Callable[[], None]) -> None:
        """Note it."""
        self._timers.append((self.now + delay, action))

    def pass_seconds(self, seconds: float) -> None:
        """Let the time pass, and call what is due."""
        self.now += seconds
        due = [action for when, action in self._timers if when <= self.now]
        self._timers = [one for one in self._timers if one[0] > self.now]
        for action in due:
            action()


def fake_local(reactor: FakeReactor | None = None) -> Any:
    """What exports and answers see of their agent."""
    return SimpleNamespace(name="alice", incarnation=INCARNATION, reactor=reactor)

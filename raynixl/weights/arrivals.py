"""Arrivals: targets that come while a push is under way, until it takes them in or is too far."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from raynixl.weights.targets import Targets


class Stage(enum.Enum):
    """How far a push is, for those who want to take part."""

    EARLY = enum.auto()  # it is not known yet what is pulled
    OPEN = enum.auto()
    CLOSED = enum.auto()


@dataclass(slots=True, eq=False)
class Arrival:
    """Targets that have said what they need, and were told what to pull: the image of each."""

    targets: Targets
    image_of: Mapping[str, int]
    is_taken: bool = False


@dataclass(slots=True)
class Arrivals:
    """The door of one push. Those who come wait in their own threads; the push looks whom it can take in."""

    _changed: threading.Condition = field(default_factory=threading.Condition)  # protects all below
    _stage: Stage = Stage.EARLY
    _waiting: list[Arrival] = field(default_factory=list)
    _is_over: bool = False

    def is_open(self, deadline: float) -> bool:
        """Wait until targets can be taken in; return whether they can."""
        with self._changed:
            self._changed.wait_for(lambda: self._stage is not Stage.EARLY, max(0.0, deadline - time.monotonic()))
            return self._stage is Stage.OPEN

    def enter(self, arrival: Arrival, deadline: float) -> bool:
        """Be taken in, and wait until the push is over; False if it could take nobody in any more."""
        with self._changed:
            if self._stage is not Stage.OPEN:
                return False
            self._waiting.append(arrival)
            self._changed.wait_for(
                lambda: self._is_over or (self._stage is Stage.CLOSED and not arrival.is_taken),
                max(0.0, deadline - time.monotonic()),
            )
            return arrival.is_taken

    # The push's side

    def open(self) -> None:
        """Let targets in from now on."""
        with self._changed:
            self._stage = Stage.OPEN
            self._changed.notify_all()

    def take(self, *, is_last: bool) -> list[Arrival]:
        """Return who has come since the last time. If nobody has, and this is the last time, nobody else gets in."""
        with self._changed:
            found, self._waiting = self._waiting, []
            if is_last and not found:
                self._stage = Stage.CLOSED
                self._changed.notify_all()
            return found

    def end(self) -> None:
        """The push is over."""
        with self._changed:
            self._stage, self._is_over = Stage.CLOSED, True
            self._changed.notify_all()

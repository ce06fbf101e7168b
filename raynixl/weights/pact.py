"""The pact: how far a rank is with a flip of its whole replica, and how its ranks end it if nobody else does; pure."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from raynixl.conditions import Condition

_FLIP_SECONDS = 1.0  # for which another rank's question waits while a version is being installed here


class Stage(enum.StrEnum):
    """How far a rank is."""

    HELD = "held"  # its readers are out; nothing has changed
    FLIPPING = "flipping"  # or going back
    FLIPPED = "flipped"
    BACK = "back"  # it serves the old version, again or still
    UNKNOWN = "unknown"  # it has never held for that flip, or long ago


def ending(mine: Stage, others: Collection[Stage]) -> Stage:
    """Return how a rank ends a flip that nobody leads any more: FLIPPED or BACK.

    Who has gone back cannot go forward, as the version may be gone. So one that is back takes all back; else one
    that has flipped takes all forward; and if nobody has, nobody does.
    """
    if Stage.BACK in others:
        return Stage.BACK
    return Stage.FLIPPED if Stage.FLIPPED in (mine, *others) else Stage.BACK


@dataclass(frozen=True, slots=True)
class Terms:
    """What a pact is about: the flip's name, the push at this rank, who leads it, in which life, and until when.

    `before` is the version that this rank served before it.
    """

    name: str
    push: str
    leader: tuple[str, str]
    others: tuple[str, ...]
    until: float
    before: int


class Pact:
    """One flip of a replica at one of its ranks. Safe in threads.

    Whoever pushes leads it, until it is gone, or until another rank asks: from then on the ranks settle it (`is_ours`),
    and what whoever pushes says of it counts no more.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._changed = Condition()  # protects all below
        self._stage = Stage.HELD
        self._is_ours = False
        self._is_over = False
        self._must_flip = False

    def __repr__(self) -> str:
        return f"Pact({self._stage}, with {', '.join(self.terms.others)})"

    @property
    def stage(self) -> Stage:
        """How far this rank is."""
        with self._changed:
            return self._stage

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to be settled any more."""
        with self._changed:
            return self._is_over

    def wait(self, seconds: float) -> bool:
        """Wait until there is nothing to be led any more: it is over, or to be settled among the ranks."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over or self._is_ours, seconds)

    def wait_over(self, seconds: float) -> bool:
        """Wait until it is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over, seconds)

    def begin(self) -> bool:
        """Begin to flip because whoever pushes says so; False if that does not count any more."""
        with self._changed:
            if self._is_ours or self._stage is not Stage.HELD:
                return False
            self._stage = Stage.FLIPPING
            return True

    def begin_back(self) -> bool:
        """Begin to go back because whoever pushes says so; False if that does not count any more."""
        with self._changed:
            if self._is_ours:
                return False
            if self._stage is Stage.FLIPPED:
                self._stage = Stage.FLIPPING  # between the two: who asks now is told how it ends
            return True

    def reach(self, stage: Stage) -> None:
        """Note how far this rank is now."""
        with self._changed:
            self._stage = stage
            self._changed.notify_all()

    def end(self) -> None:
        """Note that nothing is to be settled any more; one that only held goes back."""
        with self._changed:
            if self._stage is Stage.HELD:
                self._stage = Stage.BACK
            self._is_over = True
            self._changed.notify_all()

    def asked(self, stage: Stage) -> Stage:
        """Return how far this rank is to another, which is at `stage` and settles it: this one does so, too."""
        with self._changed:
            self._is_ours = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stage is not Stage.FLIPPING, _FLIP_SECONDS)
            if stage is Stage.FLIPPED and self._stage is Stage.HELD:
                self._must_flip = True  # the other relies on it
            return self._stage

    def claim(self) -> Stage:
        """Have the ranks settle it, and return how far this one is."""
        with self._changed:
            self._is_ours = True
            self._changed.wait_for(lambda: self._stage is not Stage.FLIPPING, _FLIP_SECONDS)
            return self._stage

    def settle(self, others: Collection[Stage]) -> Stage:
        """Return how it ends here, by what others say; one that is to flip begins with that."""
        with self._changed:
            said = [*others, Stage.FLIPPED] if self._must_flip else others
            end = ending(self._stage, said)
            if self._stage is Stage.HELD:
                self._stage = Stage.FLIPPING if end is Stage.FLIPPED else Stage.BACK
                self._changed.notify_all()
            return end

"""Patience: until when a rank waits for others in one phase, so that it returns by its deadline whoever is lost.

Who has said nothing is given up first; who has told that it waits for another rank in the phase before, and so comes
once that one is given up, is waited for a while longer. All that wait tell each other until when: the earliest decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

LEAST: Final = 0.04
"""Seconds that a phase has at the very least, though its deadline has passed."""

SHARE: Final = 0.2
MOST: Final = 2.0
"""The share of an operation's time, and the seconds at most, that are kept for what comes once ranks are given up."""

_PHASES: Final = (1 << 39) - 1
_TICKS: Final = (1 << 24) - 1
_SECONDS_A_TICK: Final = 1e-3

_MASKED: Final = 1 << 63


def reserve(began: float, deadline: float, needed: float = 0.0) -> float:
    """Return the seconds to be kept for the next phase, which needs at least so many: not more than a third of all."""
    seconds = max(0.0, deadline - began)
    return min(seconds / 3, max(needed, min(MOST, seconds * SHARE)))


def notice_number(phase: int, remaining: float) -> int:
    """Return the number of a notice: it says all that is acted on, since a number alone is never torn; and it grows."""
    ticks = min(_TICKS, max(0, int(remaining / _SECONDS_A_TICK)))
    return (phase & _PHASES) << 24 | _TICKS - ticks


def masked_number(phase: int) -> int:
    """Return the number of a notice that only says who is masked, as of a phase: higher than all others."""
    return _MASKED | phase


def says_masked(notice: int, first: int) -> bool:
    """Whether a notice's number says who is masked, as of this phase or a later one."""
    return notice >= _MASKED + first


@dataclass(slots=True)
class Patience:
    """Until when to wait, in one phase; times are those of the clock that stands while we are frozen."""

    number: int
    """Of the phase."""
    silent: float
    """Until when those are waited for that have said nothing."""
    end: float
    """Until when anybody is."""
    reserve: float
    _excused: int = 0
    _here: int = 0
    _heard: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def of(number: int, now: float, deadline: float, kept: float) -> Patience:
        """Begin a phase that has until the deadline, less what is kept for those that are excused."""
        end = max(deadline, now + LEAST)
        return Patience(number, max(end - kept, (now + end) / 2), end, kept)

    def hear(self, rank: int, notice: int, now: float) -> None:
        """Take in the number of a rank's notice, once."""
        if not 0 < notice < _MASKED or self._heard.get(rank) == notice:
            return
        self._heard[rank] = notice
        phase = (notice >> 24) - (self.number & _PHASES)
        until = now + (_TICKS - (notice & _TICKS)) * _SECONDS_A_TICK
        if phase == -1:
            self._excused |= 1 << rank
        elif phase == 0:  # it waits as we do
            self.silent = min(self.silent, until)
            self.end = min(self.end, until + self.reserve)
        elif phase == 1:  # it waits for us, and has heard all others: nobody is behind, and we must come by its end
            self.silent = min(self.silent, until)
            self.end = min(self.end, until)

    def is_here(self, rank: int) -> None:
        """Note that a rank has begun this phase: that it was late in the one before says nothing any more."""
        self._here |= 1 << rank

    def until(self, rank: int) -> float:
        """Return until when a rank is waited for."""
        return self.end if (self._excused & ~self._here) >> rank & 1 else self.silent


@dataclass(slots=True)
class Waiting:
    """A phase in which a rank waits for longer than a moment."""

    patience: Patience
    began: float
    told: set[int] = field(default_factory=set)

    def slice(self, now: float, most: float) -> float:
        """Return for how long to sleep before it looks again."""
        return max(1e-3, min(most, self.patience.silent - now))

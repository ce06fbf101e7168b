"""The holds: which push each copy of a publication is kept for, and how many pushes may have one at once."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raynixl.conditions import Condition
from raynixl.errors import TransferTimeout

_LOOK_SECONDS = 0.2
"""How often who waits looks whether the one who pushes is gone."""


class WhileBusy(enum.Enum):
    """What becomes of a push that comes while another one has the weights."""

    WAIT = "wait"
    REFUSE = "refuse"
    COPY = "copy"


def _never() -> bool:
    return False


@dataclass(slots=True)
class _Place:
    push: str = ""
    until: float = 0.0
    is_gone: Callable[[], bool] = _never

    @property
    def is_taken(self) -> bool:
        return bool(self.push) and time.monotonic() < self.until and not self.is_gone()


class Holds:
    """Numbered places, each taken by one push until that releases it, its time is over, or who pushes is gone.

    At most `at_once` of them are taken at a time.
    """

    def __init__(self, places: int, *, at_once: int = 1) -> None:
        self._changed = Condition()  # protects the places
        self._places = [_Place() for _ in range(places)]
        self._at_once = at_once

    def take(
        self,
        push: str,
        seconds: float,
        *,
        is_gone: Callable[[], bool] = _never,
        order: Sequence[int] = (),
        waits: bool = True,
    ) -> int:
        """Take a place for `seconds`, the first in `order` that is free; wait for the pushes that have them.

        Raises:
            TransferTimeout: none became free in time, or none is free and it does not wait.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while (place := self._free(order or range(len(self._places)))) is None:
                left = until - time.monotonic()
                if not waits:
                    raise TransferTimeout(
                        "an earlier version of these weights is still being pulled",
                        hint="push again once that is over, or publish with while_busy='wait' or 'copy'",
                    )
                if left <= 0:
                    raise TransferTimeout("another push of these weights is not over", hint="push again later")
                self._changed.wait(min(left, _LOOK_SECONDS))
            self._places[place] = _Place(push, until, is_gone)
            return place

    def release(self, push: str) -> bool:
        """End a push; False if nothing is, or no more, kept for it."""
        with self._changed:
            mine = [number for number, place in enumerate(self._places) if place.push == push]
            for number in mine:
                self._places[number] = _Place()
            if mine:
                self._changed.notify_all()
            return bool(mine)

    def has(self, push: str) -> bool:
        """Whether a place is still kept for a push."""
        with self._changed:
            return any(place.push == push and place.is_taken for place in self._places)

    def wait_free(self, timeout: float) -> bool:
        """Wait until no push has a place; return whether that came in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while any(place.is_taken for place in self._places):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _LOOK_SECONDS))
            return True

    def _free(self, order: Sequence[int]) -> int | None:
        if sum(place.is_taken for place in self._places) >= self._at_once:
            return None
        return next((number for number in order if not self._places[number].is_taken), None)

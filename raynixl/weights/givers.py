"""Givers: the sources that one pull reads from, whom of a part's to ask, and who has failed so far."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raynixl.errors import IntegrityError, PeerLost, RaynixlError

if TYPE_CHECKING:
    from raynixl.weights.cargo import Giver


class Givers:
    """Who gives each part of a pull's bytes. Safe in threads. `turn` spreads receivers over the replicas of a part."""

    def __init__(self, by_part: Mapping[int, Sequence[Giver]], turn: int) -> None:
        self._by_part = by_part
        self._turn = turn
        self._lock = threading.Lock()  # protects _failures
        self._failures: dict[str, RaynixlError] = {}

    @property
    def failures(self) -> tuple[RaynixlError, ...]:
        """How sources failed, at most one error for each, of those that others stood in for."""
        with self._lock:
            return tuple(self._failures.values())

    def note(self, name: str, error: RaynixlError) -> None:
        """Note how a source failed; others are asked before it from now on. That it lied outweighs all else."""
        with self._lock:
            if isinstance(error, IntegrityError) or name not in self._failures:
                self._failures[name] = error

    def choose(self, part: int, chunk: int, tried: Mapping[str, int], gone: set[str]) -> Giver:
        """Return whom to ask for a part: who was not tried yet and has not failed, if there is one.

        Raises:
            PeerLost: all are gone.
        """
        here = self._here(part, gone)
        if not here:
            raise PeerLost(f"nobody gives part {part} any more", hint="push again")
        with self._lock:
            ranks = [self._rank(giver.name, tried) for giver in here]
        best = [giver for giver, rank in zip(here, ranks, strict=True) if rank == min(ranks)]
        return best[(self._turn + chunk) % len(best)]

    def is_alone(self, part: int, gone: set[str]) -> bool:
        """Whether nobody else could be asked."""
        return len(self._here(part, gone)) <= 1

    def _here(self, part: int, gone: set[str]) -> list[Giver]:
        return [giver for giver in self._by_part.get(part, ()) if giver.name not in gone]

    def _rank(self, name: str, tried: Mapping[str, int]) -> tuple[bool, int]:
        error = self._failures.get(name)
        return isinstance(error, IntegrityError), tried.get(name, 0) + (error is not None)

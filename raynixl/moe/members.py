"""Members: which ranks take part, who is masked, who is ready to come back; one owner thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raynixl.moe.lines import ranks_of


@dataclass(slots=True)
class Members:
    """Sets of ranks as bits of integers. `mask` are those that do not take part, for whatever reason."""

    me: int
    limit: int
    mask: int
    names: dict[int, str] = field(default_factory=dict)
    view: int = 0
    """The ranks that lines have told to all that they do not take part: `mask` but for what is found in this phase."""
    ready: int = 0
    """Ranks that we have met again, and would admit."""
    renewed: int = 0
    """Ranks that have begun anew since they were masked: only those can take part again."""
    barred: int = 0
    """Ranks that only `unmask` lets in again."""
    admitted: int = 0
    """Ranks that every active rank would admit, as of the last phase: they take part in the next dispatch."""
    fresh: int = 0
    """Ranks that we have let in, and have not heard since: perhaps not all did, and they have not begun."""
    lost: dict[int, str] = field(default_factory=dict)
    """Ranks that were lost in this operation, and why."""
    lost_at: dict[int, float] = field(default_factory=dict)
    """By rank, when it was lost, or left, the last time: what it asked before says nothing any more."""
    _others: tuple[int, npt.NDArray[np.int64], list[int], list[int]] = (-1, np.zeros(0, np.int64), [], [])

    @property
    def active(self) -> tuple[int, ...]:
        """Return the ranks that take part, ascending, ours among them."""
        return ranks_of(~self.mask & ((1 << self.limit) - 1))

    @property
    def others_mask(self) -> int:
        """Return the active ranks but ours, 1 bit each."""
        return ~self.mask & ((1 << self.limit) - 1) & ~(1 << self.me)

    @property
    def others(self) -> npt.NDArray[np.int64]:
        """Return the active ranks but ours, ascending."""
        return self._known()[1]

    @property
    def ranks(self) -> list[int]:
        """Return the same as a list, which nobody changes."""
        return self._known()[2]

    @property
    def in_turn(self) -> list[int]:
        """Return the other active ranks in the order in which we write to them: all start with another one."""
        return self._known()[3]

    def _known(self) -> tuple[int, npt.NDArray[np.int64], list[int], list[int]]:
        if self._others[0] != self.mask:
            ranks = [rank for rank in self.active if rank != self.me]
            turn = [rank for rank in ranks if rank > self.me] + [rank for rank in ranks if rank < self.me]
            self._others = (self.mask, np.array(ranks, np.int64), ranks, turn)
        return self._others

    def is_active(self, rank: int) -> bool:
        """Whether a rank takes part."""
        return 0 <= rank < self.limit and not self.mask >> rank & 1

    def lose(self, rank: int, why: str) -> None:
        """Mask a rank that was lost in this operation."""
        self._take_out(rank)
        self.lost.setdefault(rank, why)

    def dismiss(self, rank: int) -> None:
        """Mask a rank that leaves."""
        self._take_out(rank)
        self.view |= 1 << rank
        self.barred |= 1 << rank

    def _take_out(self, rank: int) -> None:
        self.mask |= 1 << rank
        self.ready &= ~(1 << rank)
        self.renewed &= ~(1 << rank)
        self.admitted &= ~(1 << rank)
        self.fresh &= ~(1 << rank)
        self.lost_at[rank] = time.monotonic()

    def admit(self, ranks: int) -> None:
        """Let ranks in, 1 bit each."""
        self.mask &= ~ranks
        self.view &= ~ranks
        self.ready &= ~ranks
        self.fresh |= ranks

    def put_off(self, rank: int) -> None:
        """Take back that a rank was let in: others have not, so that it waits still."""
        self.mask |= 1 << rank
        self.view |= 1 << rank
        self.fresh &= ~(1 << rank)
        self.admit_later(rank)

    def admit_later(self, rank: int) -> None:
        """Note that a rank wants to take part, and would be let in here, unless that needs an `unmask`."""
        self.renewed |= 1 << rank
        if not self.barred >> rank & 1:
            self.ready |= 1 << rank

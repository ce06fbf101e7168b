"""Statistics: what a rank has counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raynixl.moe.session import Session


@dataclass(frozen=True, slots=True)
class PeerCounts:
    """What went to one rank: lines and puts, as its channel has counted them, and the seconds that we waited for it."""

    rank: int
    lines: int
    puts: int
    waited: float


@dataclass(frozen=True, slots=True)
class MoEStatistics:
    """One rank's operations so far, its phases, its slots, and what went to each peer."""

    dispatches: int
    combines: int
    rows: int
    phases: int
    slots: int
    slot_nbytes: int
    quarantined: int
    peers: tuple[PeerCounts, ...]


def statistics_of(session: Session, *, dispatches: int, combines: int, rows: int) -> MoEStatistics:
    """Collect what a session has counted."""
    slots = session.pool.slots
    peers = tuple(
        PeerCounts(rank, channel.lines, channel.puts, float(session.waited[rank]))
        for rank, channel in sorted(session.channels.items())
    )
    return MoEStatistics(
        dispatches, combines, rows, session.phase, len(slots), sum(slot.nbytes for slot in slots),
        len(session.pool.quarantined), peers,
    )  # fmt: skip

"""Statistics: what a rank has counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raynixl.moe.session import Session


@dataclass(frozen=True, slots=True)
class PeerCounts:
    """What went to one rank, as its channel has counted it, and the seconds that we waited for it.

    lines: those of phases, one for each: two of a dispatch (counts; rows), one of a combine, one of a dispatch by a
    handle, into fixed slots, or of few bytes. puts: writes of rows, all fields in one, at most one of an operation; the
    line of its phase follows it. asides: other lines: who waits for long says so, who overflows asks for room, who
    joins is told.
    """

    rank: int
    lines: int
    puts: int
    asides: int
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
        PeerCounts(rank, channel.lines, channel.puts, channel.asides, float(session.waited[rank]))
        for rank, channel in sorted(session.channels.items())
    )
    return MoEStatistics(
        dispatches, combines, rows, session.phase, len(slots), sum(slot.nbytes for slot in slots),
        len(session.pool.quarantined), peers,
    )  # fmt: skip

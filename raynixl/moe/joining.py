"""Joining: how a session begins, among founders or beside those that run, and how others are let in."""

from __future__ import annotations

import time
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from raynixl.errors import TransferTimeout
from raynixl.moe.lines import Cell, ranks_of

if TYPE_CHECKING:
    from raynixl.moe.channel import Channel
    from raynixl.moe.hello import Hello
    from raynixl.moe.meeting import Meeting
    from raynixl.moe.session import Session

PAUSE: Final = 0.002
"""Seconds between two attempts to meet those who are not there yet; they double up to MOST."""

MOST: Final = 0.05
STEP: Final = 0.01
Met = dict[int, "tuple[Channel, Hello]"]


@dataclass(frozen=True, slots=True)
class Welcome:
    """How a rank was let in: who runs, and under which placement."""

    running: tuple[int, ...]
    mask: int
    placement: int


def start(session: Session, meeting: Meeting, deadline: float) -> Welcome | None:
    """Begin with all others that begin, or join those that run: then return how they let us in.

    Raises:
        ConfigError: another rank was made otherwise.
        TransferTimeout: not all came, or we were not let in, in time.
    """
    me, limit = session.members.me, session.members.limit
    session.pool.announce(session.landing, ((1 << limit) - 1) & ~(1 << me))
    pause, welcome = PAUSE, None
    while True:
        others = [rank for rank in session.members.names if rank != me]  # they tell of more
        met = meeting.meet(others, deadline)
        _take_in(session, met)
        is_running = any(hello.is_running for _, hello in met.values())
        if not is_running and len(met) == len(others):
            session.members.mask &= ~sum(1 << rank for rank in [*others, me])
            break
        if is_running and (welcome := _welcome(session, met, meeting.gone)) is not None:
            break
        if time.monotonic() > deadline:
            raise _late(session, meeting, is_running)
        session.watch()
        pause = STEP if is_running else min(MOST, 2 * pause)
        session.board.wait(Cell.WELCOME, np.array([me]), 1, timeout=pause, spin=0.0)
    session.members.view = session.members.mask if welcome is None else welcome.mask
    for rank in range(limit):
        if not session.members.is_active(rank):
            session.pool.gone(rank)  # nobody has come, or was told that we take part
    meeting.run({rank: hello.token for rank, (_, hello) in met.items()})
    return welcome


def _take_in(session: Session, met: Met) -> None:
    for rank, (channel, hello) in met.items():
        session.channels[rank] = channel
        session.slots[rank] = hello.slot


def _late(session: Session, meeting: Meeting, is_running: bool) -> TransferTimeout:
    me, names = session.members.me, session.members.names
    if is_running:
        return TransferTimeout(
            f"rank {me} ({names[me]!r}) was not let in in time",
            hint="the active ranks let others in between two operations: they must call dispatch or combine, "
            "and join() or unmask() for ranks that are new or were masked by hand",
        )
    missing = {names[rank]: why for rank, why in meeting.missing.items()}
    return TransferTimeout(
        f"not all ranks of {meeting.name!r} came: {missing}",
        hint="make ExpertParallel on every member at the same time, with the same group",
    )


def _welcome(session: Session, met: Met, gone: Set[int]) -> Welcome | None:
    """Take the place that we were given, if all that run have given the same one; those that ended since need not."""
    members, board = session.members, session.board
    lines = {rank: board.read(rank, Cell.WELCOME) for rank in met}
    lines = {
        rank: line for rank, line in lines.items() if line.number and line.number == line.phase
    }  # else amid another
    if not lines:
        return None
    first = max(lines.values(), key=lambda line: line.number)
    if first.mask >> members.me & 1 or not first.ready >> members.me & 1:
        return None
    active = ranks_of(~first.mask & ((1 << members.limit) - 1))
    running = [rank for rank in active if not first.ready >> rank & 1]
    alike = [
        rank for rank in running
        if rank in lines and (lines[rank].phase, lines[rank].mask) == (first.phase, first.mask)
    ]  # fmt: skip
    others = [rank for rank in active if rank != members.me and rank not in alike]
    ended = [rank for rank in others if rank in gone or (rank in session.channels and session.is_gone(rank))]
    if any(rank not in [*alike, *ended] for rank in running):
        return None
    if any(rank not in met for rank in active if rank not in [members.me, *ended]):
        return None
    members.mask = first.mask
    session.phase = session.first = first.phase - 1  # who has masked us before that has let us in since
    for rank in alike:
        session.slots[rank] = lines[rank].slot
    for rank in ended:
        members.lose(rank, "its process has ended")
    return Welcome(tuple(alike), first.mask, first.signature)


def let_in(session: Session, meeting: Meeting) -> None:
    """Between two operations: hear of those who want to join."""
    members = session.members
    for rank, arrival in meeting.arrivals().items():
        if members.is_active(rank):
            members.lose(rank, "it has started anew")
        session.replace(rank, arrival.channel)
        session.slots[rank] = arrival.slot
        members.admit_later(rank)
    waiting = members.mask & ~members.renewed
    for rank in members.names:
        is_known = rank in session.channels and waiting >> rank & 1
        if is_known and meeting.asks_since(rank, members.lost_at.get(rank, 0.0)):
            members.admit_later(rank)


def admit(session: Session, placement: int) -> None:
    """Before a dispatch: let those take part whom all would let in."""
    members = session.members
    admitted = members.admitted & ~members.barred
    if not admitted:
        return
    members.admit(admitted)
    session.pool.announce(session.landing, admitted)
    session.welcome(admitted, placement)

"""Joining: how a session begins, among founders or beside those that run, and how others are let in."""

from __future__ import annotations

import time
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


def start(session: Session, meeting: Meeting, deadline: float) -> None:
    """Begin with all others that begin, or join those that run.

    Raises:
        ConfigError: another rank was made otherwise.
        TransferTimeout: not all came, or we were not let in, in time.
    """
    me = session.members.me
    others = [rank for rank in session.members.names if rank != me]
    session.pool.announce(session.landing, sum(1 << rank for rank in others))
    pause = PAUSE
    while True:
        met = meeting.meet(others)
        _take_in(session, met)
        is_running = any(hello.is_running for _, hello in met.values())
        if not is_running and len(met) == len(others):
            session.members.mask &= ~sum(1 << rank for rank in [*others, me])
            break
        if is_running and _welcome(session, met):
            break
        if time.monotonic() > deadline:
            raise _late(session, meeting, is_running)
        pause = STEP if is_running else min(MOST, 2 * pause)
        session.board.wait(Cell.WELCOME, np.array([me]), 1, timeout=pause, spin=0.0)
    meeting.run({rank: hello.token for rank, (_, hello) in met.items()})


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


def _welcome(session: Session, met: Met) -> bool:
    """Take the place that we were given, if all that run have given the same one."""
    members, board = session.members, session.board
    lines = {rank: line for rank in met if (line := board.read(rank, Cell.WELCOME)).number}
    if not lines:
        return False
    first = max(lines.values(), key=lambda line: line.number)
    if first.mask >> members.me & 1 or not first.ready >> members.me & 1:
        return False
    active = ranks_of(~first.mask & ((1 << members.limit) - 1))
    running = [rank for rank in active if not first.ready >> rank & 1]
    for rank in running:
        if rank not in lines or (lines[rank].phase, lines[rank].mask) != (first.phase, first.mask):
            return False
    if any(rank not in met for rank in active if rank != members.me):
        return False
    members.mask = first.mask
    session.phase = first.phase - 1
    for rank in running:
        session.slots[rank] = lines[rank].slot
    for rank in members.names:
        if rank != members.me and not members.is_active(rank):
            session.pool.gone(rank)  # it was never told of a slot of ours
    return True


def let_in(session: Session, meeting: Meeting) -> None:
    """Between two operations: hear of those who want to join, and let in those whom all would."""
    members = session.members
    for rank, (channel, slot) in meeting.arrivals().items():
        if members.is_active(rank):
            members.lose(rank, "it has started anew")
        session.channels[rank] = channel
        session.slots[rank] = slot
        session.board.clear(rank)
        session.pool.gone(rank)  # a session that begins anew writes for the former one no more
        members.renewed |= 1 << rank
        if not members.barred >> rank & 1:
            members.ready |= 1 << rank
    admitted, members.admitted = members.admitted, 0
    admitted &= ~members.barred
    if not admitted:
        return
    members.mask &= ~admitted
    members.ready &= ~admitted
    session.pool.announce(session.landing, admitted)
    session.welcome(admitted)

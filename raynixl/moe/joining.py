"""Joining: how a session begins, among founders or beside those that run, and how others are let in."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from raynixl.errors import TransferTimeout
from raynixl.moe.lines import Cell, from_words, ranks_of

if TYPE_CHECKING:
    from raynixl.moe.channel import Channel
    from raynixl.moe.hello import Hello
    from raynixl.moe.meeting import Meeting
    from raynixl.moe.session import Session

STEP = 0.01
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
    met = meeting.meet(others, deadline, _has_running)
    if _has_running(met):
        _join(session, meeting, met, deadline)
        return
    _take_in(session, met)
    session.members.mask &= ~sum(1 << rank for rank in [*others, me])
    meeting.run({rank: hello.token for rank, (_, hello) in met.items()})


def _has_running(met: Met) -> bool:
    return any(hello.is_running for _, hello in met.values())


def _take_in(session: Session, met: Met) -> None:
    for rank, (channel, hello) in met.items():
        session.channels[rank] = channel
        session.slots[rank] = hello.slot


def _join(session: Session, meeting: Meeting, met: Met, deadline: float) -> None:
    """Wait to be let in: by all that run, at the same phase, with the same ranks."""
    meeting.is_joining = True
    me = session.members.me
    while True:
        _take_in(session, met)
        welcomed = _welcome(session)
        if welcomed and all(rank in met for rank in session.members.others.tolist()):
            break
        session.members.mask = (1 << session.members.limit) - 1
        if time.monotonic() > deadline:
            raise TransferTimeout(
                f"rank {me} ({session.members.names[me]!r}) was not let in in time",
                hint="the active ranks let others in between two operations: they must call dispatch or combine, "
                "and join() or unmask() for ranks that are new or were masked by hand",
            )
        missing = [rank for rank in session.members.names if rank != me and rank not in met]
        met |= meeting.meet(missing, time.monotonic(), lambda _: True) if missing else {}
        cells = session.board.cells["number"][:, Cell.WELCOME]
        number = int(cells.max()) + 1
        session.board.wait(Cell.WELCOME, np.array([me]), number, timeout=STEP, spin=0.0)
    meeting.run({rank: hello.token for rank, (_, hello) in met.items()})


def _welcome(session: Session) -> bool:
    """Take the place that we were given, if all that run have given the same one."""
    cells = session.board.cells[:, Cell.WELCOME]
    number = int(cells["number"].max())
    if not number:
        return False
    first = cells[int(cells["number"].argmax())]
    mask, new, phase = from_words(first["mask"]), from_words(first["ready"]), int(first["phase"])
    members = session.members
    running = [rank for rank in ranks_of(~mask & ~new & ((1 << members.limit) - 1))]
    if mask >> members.me & 1 or not new >> members.me & 1:
        return False
    for rank in running:
        if (
            int(cells["phase"][rank]) != phase
            or from_words(cells["mask"][rank]) != mask
            or rank not in session.channels
        ):
            return False
    members.mask = mask
    session.phase = phase - 1
    session.slots[running] = cells["slot"][running]
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
        session.board.cells[rank] = np.zeros((), session.board.cells.dtype)
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

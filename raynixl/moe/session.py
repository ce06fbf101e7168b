"""The session: one rank's part in the exchanges of lines, from when it joins until it is masked or leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raynixl.errors import ConfigError, Masked, RangeError, RaynixlError
from raynixl.moe.board import Board
from raynixl.moe.channel import Channel
from raynixl.moe.lines import Cell, Status, from_words, line_dtype, mask_words, ranks_of, to_words
from raynixl.moe.members import Members

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.landing import Landing
    from raynixl.moe.pool import Pool, Slot

SLICE: Final = 0.005
"""Seconds after which who waits looks whether anybody is gone; nothing of the usual course depends on it."""

SPIN: Final = 5e-5
NOTICE_AFTER: Final = 0.02
GRACE: Final = 0.04
ANY: Final = 0
"""The signature of a call that is wrong."""

_ERRORS = {Status.RANGE: RangeError, Status.CONFIG: ConfigError}


class Session:
    """Exchanges lines with the other active ranks, phase by phase, and knows who is gone. One thread at a time."""

    def __init__(self, agent: Agent, members: Members, board: Board, pool: Pool) -> None:
        self.agent = agent
        self.members = members
        self.board = board
        self.pool = pool
        self.channels: dict[int, Channel] = {}
        self.phase = 0
        self.landing: Slot = pool.take()
        """The slot that was announced for the next phase."""
        self.slots = np.full(members.limit, -1, np.int64)
        """By rank, the slot that it announced for the next phase."""
        self.waited = np.zeros(members.limit)
        """By rank, the seconds that we have waited for it."""
        self._dtype = line_dtype(members.limit)
        self._words = mask_words(members.limit)
        self._notices = 0
        self._ready_sent = 0
        self._mask_sent = 0
        self._patience: dict[int, tuple[int, float]] = {}

    def turn(self) -> Slot:
        """Return the slot that was announced for the coming phase, and announce another one for that after it."""
        landing, self.landing = self.landing, self.pool.take()
        self.pool.announce(self.landing, ~self.members.mask & ((1 << self.members.limit) - 1) & ~(1 << self.members.me))
        return landing

    # Lines

    def line(self, signature: int, *, phase: int | None = None) -> np.ndarray[Any, Any]:
        """Return a line of the next phase with what every line says."""
        line = np.zeros((), self._dtype)
        line["number"] = self.phase + 1 if phase is None else phase
        line["signature"] = signature
        line["slot"] = self.landing.number
        line["posted"] = time.monotonic()
        line["mask"] = to_words(self.members.mask, self._words)
        line["ready"] = to_words(self.members.ready, self._words)
        self._mask_sent, self._ready_sent = self.members.mask, self.members.ready
        return line

    def post(self, rank: int, line: np.ndarray[Any, Any]) -> None:
        """Write this phase's line to a rank, which is masked if it is gone."""
        if not self.channels[rank].post(Cell(int(line["number"]) & 1), line):
            self.lose(rank, "its process has ended")

    def tell(self, rank: int, cell: Cell, line: np.ndarray[Any, Any]) -> None:
        """Write a line into another cell."""
        if not self.channels[rank].post(cell, line):
            self.lose(rank, "its process has ended")

    def lose(self, rank: int, why: str) -> None:
        """Mask a rank, and tell it if it still listens."""
        self.members.lose(rank, why)
        channel = self.channels.get(rank)
        if channel is not None and not self.is_gone(rank):
            self._notify(rank)

    def sweep(self) -> None:
        """Free the slots of ranks whose processes have ended since they were masked."""
        for slot in self.pool.quarantined:
            for rank in ranks_of(slot.writers & self.members.mask):
                if rank in self.channels and self.channels[rank].has_ended():
                    self.pool.gone(rank)

    def is_gone(self, rank: int) -> bool:
        """Whether a rank's process is known to be out of reach, or another than it was."""
        channel = self.channels.get(rank)
        if channel is None:
            return True
        connection = self.agent.connector.current(channel.name)
        return connection is not None and (connection.lost is not None or connection.incarnation != channel.incarnation)

    def welcome(self, admitted: int) -> None:
        """Tell ranks that they take part in the next operation, and with whom."""
        for rank in ranks_of(admitted):
            line = self.line(0)
            line["phase"] = self.phase + 1
            line["ready"] = to_words(admitted, self._words)
            self.tell(rank, Cell.WELCOME, line)

    # Waiting

    def gather(
        self, signature: int, deadline: float, *, landing: Landing | None = None, error: RaynixlError | None = None
    ) -> tuple[np.ndarray[Any, Any], list[int], bool]:
        """End a phase: wait for its lines, and learn from them; with a landing, of whose rows the lines tell.

        Returns a copy of the lines by rank, the ranks whose lines came, and whether all did and all masks agree.

        Raises:
            Masked: the others have gone on without us.
            RangeError, ConfigError: a rank's call was wrong; all ranks raise it.
        """
        for rank in self.members.others.tolist():
            if not self.channels[rank].is_direct and not self.channels[rank].finish(deadline):
                self.lose(rank, "rows could not be put into its memory")
        self.phase += 1
        number, cell = self.phase, Cell(self.phase & 1)
        expected = self.members.others
        began = time.monotonic()
        if len(expected) and not self.board.wait(cell, expected, number, timeout=SLICE, spin=SPIN):
            self._wait_on(cell, number, deadline, None if landing is None else landing.serve)
        lines: np.ndarray[Any, Any] = self.board.cells[:, cell].copy()
        came = [rank for rank in expected.tolist() if lines["number"][rank] >= number]
        self.waited[came] += np.maximum(0.0, lines["posted"][came] - began)
        agreed = self._learn(lines, came, number, len(came) == len(expected))
        if landing is not None:
            landing.answered(came)
        if error is not None:
            raise error
        self._refuse(lines, came, signature)
        return lines, came, agreed

    def wait_place(self, rank: int, number: int, deadline: float, idle: Callable[[], None]) -> Any:
        """Wait for a rank's answer where rows go; None if it is lost meanwhile."""
        ranks = np.array([rank])
        while not self.board.wait(Cell.PLACE, ranks, number, timeout=SLICE, spin=SPIN):
            idle()
            self._check_notices()
            if not self.members.is_active(rank):
                return None
            if self.is_gone(rank):
                self.lose(rank, "its process has ended")
            elif time.monotonic() > deadline:
                self.lose(rank, "it gave no place in time")
        return self.board.cells[rank, Cell.PLACE].copy()

    def _wait_on(self, cell: Cell, number: int, deadline: float, idle: Callable[[], None] | None) -> None:
        """Wait for longer than a moment: look who is gone, who is late, and tell that we wait."""
        began, has_noticed = time.monotonic(), False
        while True:
            if idle is not None:
                idle()
            missing = [rank for rank in self.members.others.tolist() if self.board.cells["number"][rank, cell] < number]
            self._take_masks(cell, number)
            now = time.monotonic()
            for rank in missing:
                if not self.members.is_active(rank):
                    continue
                if self.is_gone(rank):
                    self.lose(rank, "its process has ended")
                elif now > self._deadline_of(rank, number, deadline, now):
                    self.lose(rank, "it did not come in time")
            missing = [rank for rank in missing if self.members.is_active(rank)]
            if not missing:
                return
            if not has_noticed and now - began > NOTICE_AFTER:
                has_noticed = True
                self._notice(number, deadline - now)
            self.board.wait(
                cell, np.array(missing), number, timeout=max(0.0, min(SLICE, deadline - now + 1e-4)), spin=SPIN
            )

    def _deadline_of(self, rank: int, number: int, deadline: float, now: float) -> float:
        """Return until when we wait for a rank: longer if it told that it waits for somebody else in an earlier phase."""
        cell = self.board.cells[rank, Cell.NOTICE]
        told = int(cell["number"])
        if told and int(cell["phase"]) < number:
            seen, until = self._patience.get(rank, (0, 0.0))
            if seen != told:
                until = now + min(max(float(cell["remaining"]), 0.0), 1e4) + max(0.0, deadline - now)
                self._patience[rank] = (told, until)
            return max(deadline, until)
        return deadline

    def _take_masks(self, cell: Cell, number: int) -> None:
        """Learn from lines that came early whom others have masked: those need not be waited for."""
        heads = self.board.cells
        for rank in self.members.others.tolist():
            line = heads[rank, cell]
            if int(line["number"]) >= number:
                self._heed(from_words(line["mask"]))
        self._check_notices()

    def _check_notices(self) -> None:
        """Raise if a rank has told that we are masked."""
        for rank in self.members.others.tolist():
            notice = self.board.cells[rank, Cell.NOTICE]
            if int(notice["number"]) and from_words(notice["mask"]) >> self.members.me & 1:
                raise self._masked(rank)

    def _heed(self, mask: int) -> None:
        for rank in range(self.members.limit):
            if mask >> rank & 1 and rank != self.members.me and self.members.is_active(rank):
                self.members.lose(rank, "others have masked it")

    def _learn(self, lines: np.ndarray[Any, Any], came: list[int], number: int, is_whole: bool) -> bool:
        masks = [from_words(lines["mask"][rank]) for rank in came]
        for rank, mask in zip(came, masks, strict=True):
            if mask >> self.members.me & 1 or int(lines["number"][rank]) > number:
                raise self._masked(rank)
        agreed = all(mask == self._mask_sent for mask in masks) and is_whole
        self.members.merge(masks)
        ready = self._ready_sent
        for rank in came:
            ready &= from_words(lines["ready"][rank])
        self.members.admitted = ready & self.members.mask if agreed else 0
        self.slots[came] = lines["slot"][came]
        return agreed

    def _refuse(self, lines: np.ndarray[Any, Any], came: list[int], signature: int) -> None:
        """Raise what a rank says that is wrong with its call, or that it called something else."""
        for rank in came:
            status = int(lines["status"][rank])
            if status:
                text = bytes(lines["text"][rank]).decode(errors="replace")
                kind = _ERRORS.get(status, RaynixlError)  # type: ignore[call-overload]
                raise kind(f"rank {rank} ({self.members.names.get(rank)!r}): {text}", hint="mend that rank's call")
        for rank in came:
            if signature != ANY and int(lines["signature"][rank]) != signature:
                raise ConfigError(
                    f"rank {rank} ({self.members.names.get(rank)!r}) calls something else than rank {self.members.me}",
                    hint="call the same operations with the same options, dtypes and placement on every rank",
                )

    def _masked(self, by: int) -> Masked:
        return Masked(
            f"rank {self.members.me} ({self.members.names.get(self.members.me)!r}) was masked by rank {by}: "
            "it did not come in time",
            hint="rejoin() brings it back",
        )

    # Notices

    def _notice(self, number: int, remaining: float) -> None:
        for rank in self.members.others.tolist():
            if self.board.cells["number"][rank, number & 1] >= number:
                self._notify(rank, number, remaining)

    def _notify(self, rank: int, number: int = 0, remaining: float = 0.0) -> None:
        self._notices += 1
        line = np.zeros((), self._dtype)
        line["number"] = self._notices
        line["phase"] = number
        line["remaining"] = remaining
        line["mask"] = to_words(self.members.mask, self._words)
        self.channels[rank].post(Cell.NOTICE, line)


def status_of(error: RaynixlError) -> Status:
    """Return how a line names an error."""
    return Status.RANGE if isinstance(error, RangeError) else Status.CONFIG


def spin_seconds(ranks: int) -> float:
    """Return for how long looking pays before sleeping: not at all where ranks share cores."""
    return SPIN if ranks <= len(os.sched_getaffinity(0)) else SPIN / 2

"""The session: one rank's part in the exchanges of lines, from when it joins until it is masked or leaves."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from raynixl.errors import ConfigError, Masked, RaynixlError
from raynixl.moe.board import Board
from raynixl.moe.channel import Channel
from raynixl.moe.lines import NOWHERE, PHASES, Cell, Heard, Line, Status, ranks_of
from raynixl.moe.members import Members
from raynixl.moe.patience import Patience, Waiting, masked_number, notice_number, reserve, says_masked

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.landing import Landing
    from raynixl.moe.pool import Pool
    from raynixl.moe.slot import Slot

logger = logging.getLogger(__name__)
SLICE: Final = 0.005
"""Seconds after which who waits looks whether anybody is gone; nothing of the usual course depends on it."""

SPIN: Final = 1e-4
"""Seconds for which who waits looks before it sleeps; it yields each time, which pays where ranks share cores, too."""

STOOD_STILL: Final = 0.5
"""Seconds between two looks after which we were frozen ourselves, and that time does not count against the others."""

OUT_OF_REACH: Final = "rows could not be put into its memory"
REFUSED: Final = "its memory is out of reach: it has ended, or begun anew, or closed its layer"
NOTICE_AFTER: Final = 0.02
HEED_AFTER: Final = 0.1
"""Seconds for which the line of a rank that another one has masked is waited for."""

ANY: Final = 0
"""The signature of a call that is wrong."""


class Session:
    """Exchanges lines with the other active ranks, phase by phase, and knows who is gone. One thread at a time."""

    def __init__(
        self, agent: Agent, members: Members, board: Board, pool: Pool, watch: Callable[[], None] | None = None
    ) -> None:
        self.agent = agent
        self.watch = watch or (lambda: None)
        """Called now and then by who waits: what it raises ends the wait."""
        self.members = members
        self.board = board
        self.pool = pool
        self.channels: dict[int, Channel] = {}
        self.phase = self.first = 0
        self.is_amid = False
        """Whether an operation is under way: what ends it now ends it here alone, and other ranks go on."""
        self.landing: Slot = pool.take()
        """The slot that was announced for the next phase."""
        self.slots = np.full(members.limit, -1, np.int64)
        """By rank, the slot that it announced for the next phase."""
        self.key = secrets.randbits(63)
        """What handles are known by that were made in this session."""
        self.waited = np.zeros(members.limit)
        """By rank, the seconds that we have waited for it."""
        self._line, self._aside = Line(board.form), Line(board.form)
        self._ready_sent = 0
        self._mask_sent = 0
        self._former: dict[int, Channel] = {}  # of processes that were replaced while they lived, by number
        self._replaced = 0
        self._looked, self._stood = 0.0, 0.0  # when we looked last, and for how long this operation stood still
        self._began = 0.0
        self._waiting: Waiting | None = None
        self.siblings: tuple[Session, ...] = ()
        """Those of other groups in which this rank takes part by turns: who waits for it there must hear why."""

    def turn(self) -> Slot:
        """Return the slot that was announced for the coming phase, and announce another one for that after it."""
        landing, self.landing = self.landing, self.pool.take()
        self.pool.announce(self.landing, self.members.others_mask)
        return landing

    def begin(self) -> None:
        """Begin an operation, in which nobody was lost yet."""
        self.members.lost.clear()
        self._began = self._looked = time.monotonic()
        self._stood = 0.0

    # Lines

    def line(self, signature: int, error: RaynixlError | None) -> Line:
        """Return the line of the next phase with what all ranks are told; it is one object, filled anew each time."""
        members, line = self.members, self._line
        self._mask_sent, self._ready_sent = members.mask, members.ready
        line.fill(
            self.phase + 1, posted=time.monotonic(), signature=signature, slot=self.landing.number, mask=members.mask,
            ready=members.ready,
        )  # fmt: skip
        if error is not None:
            line.refuse(Status.of(error), str(error))
        return line

    def post(self, rank: int, line: Line) -> None:
        """Write this phase's line to a rank, which is masked if it is gone."""
        if not self.channels[rank].post(PHASES[line.number & 1], line):
            self.lose(rank, REFUSED)

    def tell(
        self, rank: int, cell: Cell, number: int, *, place: int = NOWHERE, offset: int = 0, count: int = 0
    ) -> None:
        """Write a line of rows into another cell."""
        self._aside.fill(number)
        self._aside.rows(self.landing.number, place=place, offset=offset, count=count)
        if not self.channels[rank].post(cell, self._aside):
            self.lose(rank, REFUSED)

    def lose(self, rank: int, why: str) -> None:
        """Mask a rank, and tell it if it still listens; unless it has told that it is we who are masked.

        So it is where we were frozen: its memory is out of reach since it has gone on without us.
        """
        self._check_notice(rank)
        self.members.lose(rank, why)
        if not self.members.others_mask:
            logger.warning("rank %d goes on alone: %s", self.members.me, self.members.lost)
        channel = self.channels.get(rank)
        if channel is not None and not self.is_gone(rank):
            self._notify(rank)

    def replace(self, rank: int, channel: Channel) -> None:
        """Reach a rank that has begun anew; its former process, if that is another one and lives, may still write."""
        former = self.channels.get(rank)
        self.channels[rank] = channel
        is_other = former is not None and former.is_direct and former.incarnation != channel.incarnation
        if former is None or not is_other or former.has_ended():
            self.pool.gone(rank)  # it writes for its former session no more, or cannot
            return
        number = self.members.limit + self._replaced
        self._replaced += 1
        self._former[number] = former
        self.pool.rename(rank, number)

    def sweep(self) -> None:
        """Free the slots of ranks whose processes have ended since they were masked, or replaced."""
        for number, former in list(self._former.items()):
            if former.has_ended():
                self.pool.gone(number)
                del self._former[number]
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

    def welcome(self, admitted: int, placement: int) -> None:
        """Tell ranks that they take part in the next operation, with whom, and under which placement."""
        line, number, mask = self._aside, self.phase + 1, self.members.mask
        for rank in ranks_of(admitted):
            line.fill(number, phase=number, slot=self.landing.number, mask=mask, ready=admitted, signature=placement)
            if not self.channels[rank].post(Cell.WELCOME, line):
                self.lose(rank, REFUSED)

    # Waiting

    def gather(
        self, signature: int, deadline: float, *, landing: Landing | None = None, error: RaynixlError | None = None,
        kept: float | None = None,
    ) -> tuple[dict[int, Heard], bool]:  # fmt: skip
        """End a phase: wait for its lines, and learn from them; with a landing, of whose rows the lines tell.

        Ranks of which nothing is heard are given up earlier than at the deadline, by the seconds that are `kept`.
        Returns by rank the lines that came, and whether all did and all masks agree.

        Raises:
            Masked: the others have gone on without us.
            RangeError, ConfigError: a rank's call was wrong; all ranks raise it.
        """
        for rank in self.members.ranks:
            if not self.channels[rank].is_direct and not self.channels[rank].finish(deadline - self.kept(deadline)):
                self.lose(rank, OUT_OF_REACH)
        self.phase += 1
        number, cell = self.phase, self.phase & 1
        expected, ranks = self.members.others, self.members.ranks
        began = self._look()
        if ranks and not self.board.wait(cell, expected, number, timeout=SLICE, spin=SPIN):
            waiting = self._wait_in(number, deadline, kept)
            self._wait_on(cell, waiting, None if landing is None else landing.serve)
        heard = self.board.heard(ranks, cell, number)
        agreed = self._learn(heard, number, began, len(heard) == len(ranks))
        if landing is not None:
            landing.answered(heard)
        self.is_amid = False  # what is raised from here on all ranks raise, and all begin the next operation together
        if error is not None:
            raise error
        self._refuse(heard, cell, signature)
        self.is_amid = landing is None  # behind counts come rows
        return heard, agreed

    def wait_places(
        self, ranks: list[int], number: int, deadline: float, idle: Callable[[], None]
    ) -> Iterator[tuple[int, Heard]]:
        """Wait for ranks' answers where rows go, and yield them as they come; not those of who is lost meanwhile."""
        left, waiting = list(ranks), self._wait_in(number, deadline)
        while left:
            idle()
            self._look_around(waiting, Cell(number & 1))
            answers = {rank: self.board.read(rank, Cell.PLACE) for rank in left if self.members.is_active(rank)}
            came = {
                rank: line
                for rank, line in answers.items()
                if line.number >= number and self.channels[rank].is_ready(line.place)
            }
            left = [rank for rank in answers if rank not in came]
            yield from came.items()
            self._give_up(left, waiting, "it gave no place in time")
            if left and not came and self.board.wait(Cell.PLACE, np.array(left), number, timeout=SLICE, spin=0.0):
                time.sleep(1e-3)  # all have answered, and been asked where those slots are

    def _wait_on(self, cell: int, waiting: Waiting, idle: Callable[[], None] | None) -> None:
        """Wait for longer than a moment: look who is gone, who is late, and tell that we wait."""
        number = waiting.patience.number
        while True:
            if idle is not None:
                idle()
            self._look_around(waiting, cell)
            self._give_up(self._missing(cell, number), waiting, "it did not come in time")
            missing = self._missing(cell, number)
            if not missing:
                return
            self.board.wait(cell, np.array(missing), number, timeout=waiting.slice(self._awake(), SLICE), spin=0.0)

    def kept(self, deadline: float, needed: float = 0.0) -> float:
        """Return the seconds of this operation that are kept for what comes once ranks are given up."""
        return reserve(self._began, deadline, needed)

    def _wait_in(self, number: int, deadline: float, kept: float | None = None) -> Waiting:
        """Return what is known of this phase's waits, which begin now if there was none yet."""
        waiting = self._waiting
        if waiting is None or waiting.patience.number != number:
            now = self._awake()
            patience = Patience.of(number, now, deadline, self.kept(deadline) if kept is None else kept)
            waiting = self._waiting = Waiting(patience, now)
        return waiting

    def _look_around(self, waiting: Waiting, cell: int) -> None:
        """Hear who is masked, and who waits for whom; tell that we wait."""
        now = self._awake()
        self._take_masks(cell, waiting.patience.number, is_late=now - waiting.began > HEED_AFTER)
        patience, board = waiting.patience, self.board
        for rank in self.members.ranks:
            patience.hear(rank, board.number(rank, Cell.NOTICE), now)
            if max(board.number(rank, Cell.WANT), board.number(rank, Cell.PLACE)) >= patience.number:
                patience.is_here(rank)
        if now - waiting.began > NOTICE_AFTER:
            self._notice(waiting, now)

    def _give_up(self, ranks: list[int], waiting: Waiting, why: str) -> None:
        """Lose those of these ranks that are gone, or for which we have waited for long enough."""
        now = self._awake()
        for rank in ranks:
            if not self.members.is_active(rank):
                continue
            if self.is_gone(rank):
                self.lose(rank, "its process has ended")
            elif now > waiting.patience.until(rank):
                self.lose(rank, why)

    def _awake(self) -> float:
        """Return the time by a clock that stands while we are frozen: others may have been, too, and lose no time."""
        return self._look() - self._stood

    def _look(self) -> float:
        """Return the time, and note whether we were frozen since we looked last."""
        now = time.monotonic()
        if now - self._looked > STOOD_STILL:
            self._stood += now - self._looked
        self._looked = now
        return now

    def _missing(self, cell: int, number: int) -> list[int]:
        return [rank for rank in self.members.ranks if self.board.number(rank, cell) < number]

    def _take_masks(self, cell: int, number: int, *, is_late: bool) -> None:
        """Learn from lines that came early whom others have masked: those need not be waited for.

        But for a moment, in which the line of one comes that has masked the other in turn.
        """
        if is_late:
            lines = self.board.heard(self.members.ranks, cell, number)
            self._settle({rank: line.mask for rank, line in lines.items()})
        self._check_notices()

    def _check_notices(self) -> None:
        """Raise if a rank has told that we are masked."""
        self.watch()
        for rank in self.members.ranks:
            self._check_notice(rank)

    def _check_notice(self, rank: int) -> None:
        notice = self.board.read(rank, Cell.NOTICE)
        if says_masked(notice.number, self.first) and notice.mask >> self.members.me & 1:
            raise self._masked(rank)

    def _heed(self, mask: int) -> None:
        for rank in ranks_of(mask & ~self.members.mask & ~(1 << self.members.me)):
            if self.members.fresh >> rank & 1:
                self.members.put_off(rank)
            else:
                self.lose(rank, "others have masked it")

    def _settle(self, masks: dict[int, int]) -> None:
        """Learn whom others have masked. Of two that have masked each other the lower one stays, on all ranks alike."""
        for rank, mask in masks.items():
            spared = sum(1 << other for other, its in masks.items() if other < rank and its >> rank & 1)
            self._heed(mask & ~spared)

    def _learn(self, heard: dict[int, Heard], number: int, began: float, is_whole: bool) -> bool:
        members, ready = self.members, self._ready_sent
        agreed = is_whole and members.mask == self._mask_sent  # else our table is another one than that of the others
        now = time.monotonic()
        for rank, line in heard.items():
            if line.mask >> members.me & 1 or line.number > number:
                raise self._masked(rank)
            agreed = agreed and line.mask == self._mask_sent
            ready &= line.ready
            self.slots[rank] = line.slot
            came = line.posted if self.channels[rank].is_direct else now  # another host has another clock
            if came > began:
                self.waited[rank] += came - began
            if members.fresh >> rank & 1:  # what it was told of before it began, it has not used
                members.fresh &= ~(1 << rank)
                self.pool.begun(rank, self.landing)
        told = self._mask_sent
        if not agreed:
            masks = {rank: line.mask for rank, line in heard.items()}
            self._settle(masks)
            for mask in masks.values():
                told |= mask
        members.view |= told & members.mask
        members.admitted = ready & members.mask if agreed else 0
        return agreed

    def _refuse(self, heard: dict[int, Heard], cell: int, signature: int) -> None:
        """Raise what a rank says that is wrong with its call, or that it called something else."""
        for line in heard.values():
            if line.status or signature not in (ANY, line.signature):
                break
        else:
            return
        for rank, line in heard.items():
            if line.status:
                text = f"rank {rank} ({self.members.names.get(rank)!r}): {self.board.text(rank, cell)}"
                raise Status.kind(line.status)(text, hint="mend that rank's call")
        for rank, line in heard.items():
            if signature not in (ANY, line.signature):
                raise ConfigError(
                    f"rank {rank} ({self.members.names.get(rank)!r}) calls something else than rank {self.members.me}",
                    hint="call the same operations with the same options, handles, dtypes and placement on every rank",
                )

    def _masked(self, by: int) -> Masked:
        return Masked(
            f"rank {self.members.me} ({self.members.names.get(self.members.me)!r}) was masked by rank {by}: "
            "it did not come in time",
            hint="rejoin() brings it back",
        )

    # Notices

    def _notice(self, waiting: Waiting, now: float) -> None:
        """Tell all ranks until when we wait for those that say nothing, once."""
        remaining = waiting.patience.silent - now
        for rank in self.members.ranks:
            if rank not in waiting.told:
                waiting.told.add(rank)
                self._notify(rank, notice_number(waiting.patience.number, remaining))
        if self.members.me not in waiting.told:
            waiting.told.add(self.members.me)
            for sibling in self.siblings:  # their others wait for us, who wait for somebody in this group
                for rank in sibling.members.ranks:
                    sibling._notify(rank, notice_number(sibling.phase, remaining))

    def _notify(self, rank: int, number: int = 0) -> None:
        self._aside.fill(number or masked_number(self.phase), mask=self.members.mask)
        self.channels[rank].post(Cell.NOTICE, self._aside)

"""Ranks: one rank of an expert-parallel group, its session, and who takes part beside it."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, Masked
from raynixl.moe.board import Board
from raynixl.moe.fields import RowFormat
from raynixl.moe.joining import admit, let_in, start
from raynixl.moe.layer_rank import LayerRank
from raynixl.moe.lines import ranks_of
from raynixl.moe.meeting import Meeting
from raynixl.moe.members import Members
from raynixl.moe.placement import Placement
from raynixl.moe.pool import Pool
from raynixl.moe.session import Session
from raynixl.moe.statistics import MoEStatistics, statistics_of
from raynixl.record import check_name

if TYPE_CHECKING:
    from raynixl.collectives import Group

EAGER_NBYTES: Final = 4 << 20
"""Bytes of rows that a rank may get at most for which a copy more costs less than to hear of counts first."""


class OnLost(enum.Enum):
    """What becomes of a token when an expert of its is out of reach: a term is missing, or the rest makes up for it."""

    DROP = "drop"
    RENORMALISE = "renormalise"


class Rank(LayerRank):
    """One rank of a group: its sizes, its session with the others, and who takes part. Operations are built on it."""

    def __init__(  # noqa: PLR0913 - the sizes of a layer
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int,
        dtype: torch.dtype = torch.bfloat16, placement: Placement | Sequence[int] | None = None, name: str = "moe",
        capacity: int | None = None, deadline: float | None = None, on_lost: OnLost = OnLost.DROP,
        max_ranks: int | None = None, eager_nbytes: int = EAGER_NBYTES, watch: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            group, experts=experts, hidden=hidden, topk=topk, max_tokens=max_tokens, dtype=dtype, placement=placement,
            name=name, deadline=deadline, max_ranks=max_ranks,
        )  # fmt: skip
        self.on_lost = OnLost(on_lost)
        row_nbytes = self.hidden * self.dtype.itemsize
        self.is_eager = self._limit * self.max_tokens * row_nbytes <= eager_nbytes
        """Whether rows of a dispatch go to fixed places at once, and no counts before them."""
        self._names = dict(enumerate(group.members))
        self._capacity = capacity
        self._watch = watch
        self._masked: Masked | None = None
        self._counts = {"dispatches": 0, "combines": 0, "rows": 0}
        self._open(self.deadline)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, rank {self.rank}, active {self.active}, {self.experts} experts)"

    # What it is

    @property
    def world(self) -> int:
        """How many members there are, masked ones among them."""
        return max(self._names) + 1

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that take part, ascending, as far as this one knows; another may hear of a death a phase later."""
        return self._session.members.active

    @property
    def agreed(self) -> tuple[int, ...]:
        """The ranks that take part as all of them know, alike on all behind the same operation: what to place by.

        A rank that is lost amid an exchange is in it until the next one, whose lines tell all. Only if the sole rank
        that knows is itself lost amid that one may some be a step ahead of others.
        """
        members = self._session.members
        return ranks_of(~members.view & ((1 << members.limit) - 1))

    # Who takes part

    def place(self, placement: Placement | Sequence[int]) -> None:
        """Use another placement from the next dispatch on; every rank calls it between the same two operations.

        Raises:
            ConfigError: another number of experts, or ranks that cannot be.
        """
        given = placement if isinstance(placement, Placement) else Placement(placement)

        def place() -> None:
            given.check(experts=self.experts, ranks=self.world)
            self.placement = given

        self._submit(place)

    def mask(self, rank: int) -> None:
        """Go on without a rank until `unmask`. What one rank masks, all do one phase later.

        A rank that is amid an operation may raise `Masked` there: have all ranks call it between the same two.
        """
        self._check_rank(rank)
        if rank == self.rank:
            raise ConfigError("a rank cannot mask itself", hint="leave() takes this rank out")

        def mask() -> None:
            self._session.members.barred |= 1 << rank
            if self._session.members.is_active(rank):
                self._session.lose(rank, "it was masked by hand")
            self._session.members.view |= 1 << rank

        self._submit(mask)

    def unmask(self, rank: int) -> None:
        """Let a rank in again once it has rejoined, and all active ranks have met it."""
        self._check_rank(rank)

        def unmask() -> None:
            members = self._session.members
            members.barred &= ~(1 << rank)
            if members.renewed >> rank & 1 and not members.is_active(rank):
                members.ready |= 1 << rank

        self._submit(unmask)

    def join(self, members: Sequence[str]) -> tuple[int, ...]:
        """Expect new members, whose ranks are returned; they are let in before a dispatch, once all have met them.

        The new ones make their ExpertParallel with a group that has all members in order of their ranks.

        Raises:
            ConfigError: a member is there already, or there would be more than max_ranks.
        """
        return self._submit(lambda: tuple(self._expect(member) for member in members))

    def _expect(self, member: str) -> int:
        check_name(member, "member")
        if member in self._names.values() or len(self._names) >= self._limit:
            raise ConfigError(
                f"{member!r} cannot join {sorted(self._names.values())}",
                hint="join() takes new names; who was masked calls rejoin(); max_ranks is for good",
            )
        rank = self.world
        self._names[rank] = member
        return rank

    def leave(self, ranks: Sequence[int]) -> None:
        """Take ranks out, ours perhaps among them; every rank calls it between the same two operations."""
        for rank in ranks:
            self._check_rank(rank)

        def leave() -> None:
            members = self._session.members
            for rank in ranks:
                if rank == self.rank:
                    continue
                if members.is_active(rank):
                    self._session.pool.gone(rank)  # it has done what it was told, and does nothing more
                members.dismiss(rank)

        self._submit(leave)
        if self.rank in ranks:
            self.close()

    def rejoin(self, *, deadline: float | None = None) -> None:
        """Come back after having been masked: begin anew, and wait until the active ranks let this one in.

        Raises:
            TransferTimeout: they did not.
        """

        def rejoin() -> None:
            self._check_open()
            seconds = check_timeout(deadline, self.deadline, what="deadline")
            self._masked = self._masked or Masked(
                f"rank {self.rank} ({self.agent.name!r}) has not come back", hint="rejoin() tries again"
            )
            self._shut()
            self._open(seconds)
            self._masked = None

        self._submit(rejoin)

    def beside(self, others: Sequence[Rank]) -> None:
        """Know the other groups in which this rank takes part by turns: while it waits in one, none gives it up."""
        self._session.siblings = tuple(other._session for other in others)

    def statistics(self) -> MoEStatistics:
        """Return what was counted so far."""
        return statistics_of(self._session, **self._counts)

    # Within

    def _open(self, deadline: float) -> None:
        until = time.monotonic() + deadline
        if self.agent.control.serves(Meeting.topic(self.name)):
            raise ConfigError(
                f"agent {self.agent.name!r} takes part in a group {self.name!r} already",
                hint="give each layer a name= of its own, or close the former one",
            )
        members = Members(me=self.rank, limit=self._limit, mask=(1 << self._limit) - 1, names=self._names)
        with contextlib.ExitStack() as made:
            board = Board(self.agent, self._limit)
            made.callback(board.close)
            pool = Pool(self.agent, self._slot_nbytes(), name=self.name)
            made.callback(pool.close)
            session = Session(self.agent, members, board, pool, self._watch)
            meeting = Meeting(
                self.agent, self.name, rank=self.rank, names=self._names, board=board, pool=pool,
                first=session.landing, scene=self._scene_text(), placement=lambda: self.placement,
            )  # fmt: skip
            made.callback(meeting.close)
            welcome = start(session, meeting, until)
            if welcome is not None and welcome.placement != self.placement.digest:
                self.placement = meeting.placement_at(welcome.running, welcome.placement, until)
            self._session, self._meeting, self._made = session, meeting, made.pop_all()

    def _scene_text(self) -> str:
        return (
            f"experts={self.experts}, hidden={self.hidden}, topk={self.topk}, max_tokens={self.max_tokens}, "
            f"dtype={self.dtype}, on_lost={self.on_lost.value}, eager={self.is_eager}"
        )

    def _slot_nbytes(self) -> int:
        """Return the size of a slot: what even routing needs and a quarter more; eager, or if less, what can come."""
        world = len(self._names)
        spread = self.topk * self.max_tokens
        most, likely = world * self.max_tokens, max(spread + spread // 4, self.max_tokens)
        rows = self._capacity or (most if self.is_eager else min(most, likely))
        form = RowFormat((self.hidden * self.dtype.itemsize, 4 * self.topk, 4 * self.topk, 4))
        return form.slot_nbytes(rows)

    def _shut(self) -> None:
        """Withdraw what the session has, whatever part of it fails; idempotent."""
        self._made.close()

    def _begin(self, *, is_start: bool) -> None:
        """Begin an operation. Where it may be the first of ranks that join, a dispatch of tokens, let them in."""
        self._check_active()
        session = self._session
        session.begin()
        let_in(session, self._meeting)
        if is_start:
            admit(session, self.placement.digest)
        if session.members.lost_at and session.pool.quarantined:  # nobody else has left slots that he may write into
            session.sweep()

    def _check_active(self) -> None:
        self._check_open()
        if self._masked is not None:
            raise self._masked.afresh()

    def _check_rank(self, rank: int) -> None:
        self._check_open()
        if rank not in self._names:
            raise ConfigError(f"there is no rank {rank}", hint=f"members are {self._names}")

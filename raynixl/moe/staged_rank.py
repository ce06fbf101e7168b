"""Ranks of two stages: one rank's stages in the present view, and how operations are done again in the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, Masked, RangeError, RaynixlError, TransferTimeout
from raynixl.moe.council import Council, Regrouped
from raynixl.moe.grid import Grid
from raynixl.moe.layer_rank import LayerRank
from raynixl.moe.placement import Placement
from raynixl.moe.rank import EAGER_NBYTES, OnLost
from raynixl.moe.seat import Charter
from raynixl.moe.stages import Sizes, Stages

if TYPE_CHECKING:
    from raynixl.collectives import Group

T = TypeVar("T")


class StagedRank(LayerRank):
    """One rank of a layer of two stages, and who takes part beside it. Operations are built on it."""

    def __init__(  # noqa: PLR0913 - those of ExpertParallel
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int,
        dtype: torch.dtype = torch.bfloat16, placement: Placement | Sequence[int] | None = None, name: str = "moe",
        capacity: int | None = None, deadline: float | None = None, on_lost: OnLost = OnLost.DROP,
        grid: Grid | None = None, max_ranks: int | None = None, eager_nbytes: int = EAGER_NBYTES,
    ) -> None:  # fmt: skip
        super().__init__(
            group, experts=experts, hidden=hidden, topk=topk, max_tokens=max_tokens, dtype=dtype, placement=placement,
            name=name, deadline=deadline, max_ranks=max_ranks,
        )  # fmt: skip
        if grid is not None and grid.world != group.world:
            raise ConfigError(f"{grid} for {group.world} members", hint="give each member a place in the grid")
        self.on_lost = OnLost(on_lost)
        self._stages: Stages | None = None
        self._before: tuple[int, ...] = ()  # who took part when the last operation ended
        self._droppers: list[threading.Thread] = []
        self._sizes = Sizes(
            self.name, self.experts, self.hidden, self.topk, self.max_tokens, self.dtype, capacity, self.deadline,
            eager_nbytes, self.on_lost,
        )  # fmt: skip
        if self.agent.control.serves(Council.topic(self.name)):
            raise ConfigError(
                f"agent {self.agent.name!r} takes part in a group {self.name!r} already",
                hint="give each layer a name= of its own, or close the former one",
            )
        charter = Charter(
            self.name, self.rank, list(group.members), self._scene(), self.deadline, self._limit, grid,
            holders=lambda: tuple(self.placement.holders.tolist()),
        )  # fmt: skip
        self._council = Council(self.agent, charter)
        try:
            self._begin(self.deadline)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        grid = "no grid" if self._stages is None else self._stages.grid
        return f"TwoLevel({self.name!r}, rank {self.rank}, active {self.active}, {grid}, {self.experts} experts)"

    # What it is

    @property
    def world(self) -> int:
        """How many members there are, masked ones among them."""
        return len(self._council.names)

    @property
    def grid(self) -> Grid:
        """The grid of those that take part, each numbered by its place in `active`."""
        stages = self._stages
        if stages is None:
            raise ConfigError(f"rank {self.rank} has no grid: it was masked", hint="rejoin() brings it back")
        return stages.grid

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return self._council.active

    # Who takes part

    def place(self, placement: Placement | Sequence[int]) -> None:
        """Use another placement from the next dispatch on; every rank calls it between the same two operations.

        Raises:
            ConfigError: another number of experts, or ranks that cannot be.
        """

        def place() -> None:
            self.placement = self._checked(placement, self.world)
            if self._stages is not None:
                self._stages.place(self.placement)

        self._submit(place)

    def mask(self, rank: int) -> None:
        """Go on without a rank until `unmask`. What one rank masks, all do: the next operation is made without it."""
        self._check_rank(rank)
        if rank == self.rank:
            raise ConfigError("a rank cannot mask itself", hint="leave() takes this rank out")
        self._submit(lambda: self._council.bar(rank))

    def unmask(self, rank: int) -> None:
        """Let a rank in again once it has rejoined."""
        self._check_rank(rank)
        self._submit(lambda: self._council.unbar(rank))

    def join(self, members: Sequence[str]) -> tuple[int, ...]:
        """Expect new members, whose ranks are returned; they are let in before a dispatch of tokens.

        The new ones make their TwoLevel with a group that has all members in order of their ranks. They come into the
        group of their host; where the grid was given, into the smallest group.

        Raises:
            ConfigError: a member is there already.
        """
        return self._submit(lambda: tuple(self._council.expect(member) for member in members))

    def leave(self, ranks: Sequence[int]) -> None:
        """Take ranks out, ours perhaps among them; every rank calls it between the same two operations."""
        for rank in ranks:
            self._check_rank(rank)

        def leave() -> None:
            for rank in ranks:
                if rank != self.rank:
                    self._council.bar(rank)

        self._submit(leave)
        if self.rank in ranks:
            self.close()

    def rejoin(self, *, deadline: float | None = None) -> None:
        """Come back after having been masked: begin anew, and wait until the active ranks let this one in.

        Raises:
            TransferTimeout: they did not.
        """

        def rejoin() -> None:
            seconds = check_timeout(deadline, self.deadline, what="deadline")
            self._begin(seconds)

        self._submit(rejoin)

    # Within

    def _shut(self) -> None:
        self._council.close()
        stages, self._stages = self._stages, None
        if stages is not None:
            stages.close()
        for thread in self._droppers:
            thread.join()

    def _carry_out(self, work: Callable[[Stages], T], *, is_fresh: bool) -> tuple[T, tuple[int, ...]]:
        """Do an operation in the present view, and again for as long as ranks are lost in it.

        Returns what came of it, and who was lost since the last one.
        """
        with self._turn:
            council, before = self._council, self._before
            try:
                council.enter(is_fresh=is_fresh)
                while True:
                    result, error = self._attempt(work)
                    if result is not None or error is not None:
                        break
            except Masked as exc:
                council.give_up(exc.message)
                raise
            except BaseException as exc:
                council.give_up(f"rank {self.rank} has left an operation amid its exchanges: {exc!r:.200}")
                raise
            self._before = self.active
            if error is not None:
                raise error
            assert result is not None
            return result, tuple(rank for rank in before if rank not in self._before)

    def _attempt(self, work: Callable[[Stages], T]) -> tuple[T | None, RaynixlError | None]:
        """Try it once; return neither result nor error if it is to be done again."""
        result, error = None, None
        try:
            stages = self._regroup(time.monotonic() + 2 * self.deadline)
            try:
                result = work(stages)
            except (ConfigError, RangeError) as exc:
                error = exc
            if self._council.end(stages.gone()):
                return result, error
        except Regrouped:
            pass
        except Masked:  # by a rank that waits for us, as we do for another one
            if not self._council.awaits_view(self.deadline):
                raise
        return None, None

    def _begin(self, seconds: float) -> None:
        """Become another session, and take part as soon as we are let in."""
        until = time.monotonic() + seconds
        while True:
            self._drop_stages()
            self._council.restart()
            try:
                view = self._council.begin(max(0.0, until - time.monotonic()))
                self._council.adopt(view)
                self._regroup(until)
            except (Masked, Regrouped):
                continue  # until it is too late, which the council says
            except BaseException:
                self._council.withdraw()
                raise
            self._before = self.active
            return

    def _regroup(self, until: float) -> Stages:
        """Make the stages of the present view, if they are not there."""
        council = self._council
        while self._stages is None or council.due is not None:
            view = council.due or council.adopted
            assert view is not None
            self._drop_stages()
            council.adopt(view)
            try:
                self._stages = Stages(
                    self.agent, self._sizes, view, self.rank, placement=self.placement,
                    building=council.watch_building, working=council.watch,
                )  # fmt: skip
                holders = council.learn(view)
                if holders is not None:
                    self.placement = Placement(holders)
                    self._stages.place(self.placement)
            except TransferTimeout:
                absent = council.absent(view)
                if not absent or time.monotonic() > until:
                    raise
                council.suspect(absent, "it has not begun to work in the present view", view)
                council.go_on()
            except Regrouped:
                council.go_on()
        return self._stages

    def _drop_stages(self) -> None:
        """Withdraw the memory of a former view in a thread: peers that are frozen would hold us up."""
        stages, self._stages = self._stages, None
        self._droppers = [thread for thread in self._droppers if thread.is_alive()]
        if stages is not None:
            thread = threading.Thread(target=stages.close, name="raynixl-moe-drop", daemon=True)
            self._droppers.append(thread)
            thread.start()

    def _scene(self) -> str:
        return (
            f"two-level, experts={self.experts}, hidden={self.hidden}, topk={self.topk}, "
            f"max_tokens={self.max_tokens}, dtype={self.dtype}, max_ranks={self._limit}, "
            f"on_lost={self.on_lost.value}, eager_nbytes={self._sizes.eager_nbytes}"
        )

    def _check_rank(self, rank: int) -> None:
        self._check_open()
        if not 0 <= rank < self.world:
            raise ConfigError(f"there is no rank {rank}", hint=f"members are {self._council.names}")

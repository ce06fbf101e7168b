"""Expert parallelism in two stages: rows go to the hosts that hold their experts, and there to the holders.

A dispatch first goes along the column, the ranks with this one's local index, one in each group (see `grid`): once to
each group that has an expert of the token. The member that receives a row there, its forwarder, sends it on inside the
group, once to each holder. So a rank writes to the members of its column and of its group alone, and a row goes over
the network once for each host. A combine is the mirror: holders to forwarder to source.

**The recipe.** With the weights at the holder, sums are rounded three times: each holder's partial sum once, the sum of
a group's holders in float32 by ascending rank once, and the sum over groups in float32, with biases, once. Flat
expert parallelism rounds twice, so that its last bits may be others. With the weights at the source all pairs travel
back as they are, and the bits are those of flat.

**The order of rows** at a receiver: by the local index of the source among those of its group that take part, then by
its group, then by token. Where a group has no member of a column, rows of two columns come through one forwarder: they
are ordered by its local index first. Fixed slots lie by source, as in flat.

**Who takes part** all ranks agree on (see `council`). When one is lost, columns and groups are made anew of those that
are left, so that others forward in its place, and the operation in which it was lost is done again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, Masked, RangeError, RaynixlError, TransferTimeout
from raynixl.moe.checks import dtype_of, positive
from raynixl.moe.council import Council, Regrouped
from raynixl.moe.grid import Grid
from raynixl.moe.pending import Pending
from raynixl.moe.placement import Placement
from raynixl.moe.rank import EAGER_NBYTES, default_limit
from raynixl.moe.renewing import as_before, fresh, hollow, renewed
from raynixl.moe.result import Dispatched
from raynixl.moe.stages import Sizes, Stages
from raynixl.moe.staging import Made, Returning, Sending, TwoLevelDispatched, TwoLevelHandle
from raynixl.record import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.collectives import Group
    from raynixl.moe.parallel import ExpertParallel

T = TypeVar("T")


class TwoLevel:
    """One rank of an expert-parallel group that is arranged as a grid; its operations are those of `ExpertParallel`.

    Every member makes one, with the same arguments, at the same time; where the others run already, it joins them
    before one of their dispatches of tokens, and takes over their placement and their grid.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came, or the others did not let this one in.
    """

    def __init__(  # noqa: PLR0913 - those of ExpertParallel
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int,
        dtype: torch.dtype = torch.bfloat16, placement: Placement | Sequence[int] | None = None, name: str = "moe",
        capacity: int | None = None, deadline: float | None = None, grid: Grid | None = None,
        max_ranks: int | None = None, eager_nbytes: int = EAGER_NBYTES,
    ) -> None:  # fmt: skip
        self.agent, self.name, self.rank = group.agent, check_name(name, "name of an expert-parallel group"), group.rank
        self.experts, self.hidden = positive(experts, "experts"), positive(hidden, "hidden")
        self.topk, self.max_tokens = positive(topk, "topk"), positive(max_tokens, "max_tokens")
        self.dtype = dtype_of(dtype)
        self.deadline = check_timeout(deadline, self.agent.config.transfer_timeout, what="deadline")
        if grid is not None and grid.world != group.world:
            raise ConfigError(f"{grid} for {group.world} members", hint="give each member a place in the grid")
        self._limit = default_limit(group.world) if max_ranks is None else positive(max_ranks, "max_ranks")
        if group.world > self._limit:
            raise ConfigError(f"{group.world} members with max_ranks={max_ranks}", hint="raise max_ranks")
        given = Placement.even(self.experts, group.world) if placement is None else placement
        self.placement = self._checked(given, group.world)
        self._turn = threading.RLock()  # held through each operation: they are carried out one after another
        self._worker: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._stages: Stages | None = None
        self._before: tuple[int, ...] = ()  # who took part when the last operation ended
        self._droppers: list[threading.Thread] = []
        self._sizes = Sizes(
            self.name, self.experts, self.hidden, self.topk, self.max_tokens, self.dtype, capacity, self.deadline,
            eager_nbytes,
        )  # fmt: skip
        if self.agent.control.serves(Council.topic(self.name)):
            raise ConfigError(
                f"agent {self.agent.name!r} takes part in a group {self.name!r} already",
                hint="give each layer a name= of its own, or close the former one",
            )
        self._council = Council(
            self.agent, self.name, rank=self.rank, names=list(group.members), scene=self._scene(), grid=grid,
            deadline=self.deadline, most=self._limit, holders=lambda: tuple(self.placement.holders.tolist()),
        )  # fmt: skip
        try:
            self._begin(self.deadline)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        grid = "no grid" if self._stages is None else self._stages.grid
        return f"TwoLevel({self.name!r}, rank {self.rank}, active {self.active}, {grid}, {self.experts} experts)"

    def __enter__(self) -> TwoLevel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The physical experts that this rank holds; their place here is their local id."""
        return self.placement.experts_of(self.rank)

    # Operations

    def dispatch(  # noqa: PLR0913 - those of ExpertParallel
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, *,
        handle: TwoLevelHandle | None = None, layout: str | None = None, alignment: int | None = None,
        weights_at: str | None = None, extra: Sequence[Tensor] = (), async_: bool = False,
        deadline: float | None = None, stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Send each token's row to the ranks that hold its experts; see `ExpertParallel.dispatch`."""
        sending = Sending(x, topk_idx, topk_weights, tuple(extra), handle, layout, alignment, weights_at)

        def work(stages: Stages) -> tuple[Dispatched, Any]:
            counted = stats.clone() if isinstance(stats, torch.Tensor) else stats
            return self._dispatch(stages, sending, deadline, counted), counted

        def dispatch() -> Dispatched:
            (r, counted), lost = self._carry_out(work, is_fresh=handle is None)
            if stats is not None:
                stats.copy_(counted)
            return TwoLevelDispatched.of(r, lost=lost)

        return self._submit(dispatch, async_)

    def combine(
        self, y: Tensor, handle: TwoLevelHandle, *, bias: Tensor | Sequence[Tensor] | None = None,
        out: Tensor | None = None, summed: bool = True, async_: bool = False, deadline: float | None = None,
        stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Bring back what the experts made of the rows, and return each token's sum; see `ExpertParallel.combine`.

        With the weights at the holder the sum is rounded once more than flat: for each group.
        """
        returning = Returning(y, None, handle, bias, out, summed, stats)
        return self._submit(lambda: self._combined(returning, deadline)[0], async_)

    def combine_weights(
        self, y: Tensor, weights: Tensor, handle: TwoLevelHandle, *, bias: Any = None, out: Tensor | None = None,
        async_: bool = False, deadline: float | None = None,
    ) -> Any:  # fmt: skip
        """Combine, and bring back what the holders say of each row's weights; see `ExpertParallel.combine_weights`."""
        returning = Returning(y, weights, handle, bias, out, True, None)
        return self._submit(lambda: self._combined(returning, deadline), async_)

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
        ranks: tuple[int, ...] = self._submit(lambda: tuple(self._council.expect(member) for member in members))
        return ranks

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

    def close(self) -> None:
        """Withdraw this rank's memory; idempotent. Results that live keep theirs."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._turn:
            if self._is_closed:
                return
            self._is_closed = True
            self._council.close()
            stages, self._stages = self._stages, None
            if stages is not None:
                stages.close()
            for thread in self._droppers:
                thread.join()

    # Within

    def _submit(self, operation: Callable[[], T], async_: bool = False) -> Any:
        self._check_open()
        if self._worker is None and not async_:
            with self._turn:
                return operation()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="raynixl-moe")
        pending = Pending(self._worker.submit(operation))
        return pending if async_ else pending.wait()

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
        return None, None

    def _begin(self, seconds: float) -> None:
        """Become another session, and take part as soon as we are let in."""
        until = time.monotonic() + seconds
        while True:
            self._drop_stages()
            self._council.restart()
            view = self._council.begin(max(0.0, until - time.monotonic()))
            try:
                self._council.adopt(view)
                self._regroup(until)
            except (Masked, Regrouped):
                continue  # until it is too late, which the council says
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

    def _dispatch(self, stages: Stages, sending: Sending, deadline: float | None, stats: Any) -> Dispatched:
        """Dispatch; by a handle of before others took part as a dispatch of its ids."""
        if not isinstance(sending.handle, TwoLevelHandle) or sending.handle.made.view == stages.view.order:
            return self._dispatch_now(stages, sending, deadline, stats)
        with self._alike([*stages.across, stages.inside], is_combine=False) as left:
            sending.check(self.placement.digest)
            again = fresh(sending)
            left.clear()
        r = self._dispatch_now(stages, again, deadline, stats)
        return as_before(sending, r, len(self.local_experts))

    def _dispatch_now(
        self, stages: Stages, sending: Sending, deadline: float | None, stats: Any = None
    ) -> TwoLevelDispatched:
        with self._alike([*stages.across, stages.inside], is_combine=False) as left:
            shares = stages.shares(check_timeout(deadline, self.deadline, what="deadline"))
            sending.check(stages.placement.digest)
            came: list[Dispatched] = []
            for number, ep in enumerate(stages.across):
                options = sending.across(number, self.rank)
                left.remove(ep)
                came.append(ep.dispatch(**options, deadline=shares.left(shares.order[number])))
                self._council.pause(stages.gone())
            options = sending.inside(came, stages.physical)
            left.clear()
            r: Dispatched = stages.inside.dispatch(**options, deadline=shares.left(shares.count - 1), stats=stats)
            made = Made(stages.view.order, stages.placement, (self.world, self.max_tokens))
            return sending.result(r, tuple(one.handle for one in came), made)

    def _combined(self, returning: Returning, deadline: float | None) -> tuple[Tensor, Tensor | None]:
        """Combine, and add to the caller's statistics once that has succeeded."""

        def work(stages: Stages) -> tuple[tuple[Tensor, Tensor | None], list[Tensor]]:
            return self._combine(stages, returning, deadline)

        (made, waited), _ = self._carry_out(work, is_fresh=False)
        if returning.stats is not None and self._stages is not None:
            for each, (_, ranks) in zip(waited, self._stages.parts(), strict=True):
                returning.stats[list(ranks)] += each
        return made

    def _combine(
        self, stages: Stages, returning: Returning, deadline: float | None
    ) -> tuple[tuple[Tensor, Tensor | None], list[Tensor]]:
        handle, r = returning.handle, None
        if isinstance(handle, TwoLevelHandle) and handle.made.view != stages.view.order:
            r = self._renew(stages, handle, deadline)
        with self._alike([stages.inside, *stages.across], is_combine=True) as left:
            shares = stages.shares(check_timeout(deadline, self.deadline, what="deadline"))
            returning = returning.checked(self.hidden, self.world)
            if r is not None:
                returning = renewed(returning, r)
            waited = [torch.zeros(len(ranks), dtype=torch.float64) for _, ranks in stages.parts()]
            left.remove(stages.inside)
            came = returning.inside(stages.inside, shares.left(0), waited[-1])
            self._council.pause(stages.gone())
            outs = []
            for number, ep in enumerate(stages.across):
                left.remove(ep)
                seconds = shares.left(1 + shares.order[number])
                outs.append(returning.across(ep, number, came, seconds, waited[number]))
                self._council.pause(stages.gone())
            return outs[0], waited

    def _renew(self, stages: Stages, handle: TwoLevelHandle, deadline: float | None) -> TwoLevelDispatched:
        """Find the present ways of the rows of a handle of before others took part."""
        stages.place(handle.made.placement)
        try:
            return self._dispatch_now(stages, hollow(handle, self.hidden), deadline)
        finally:
            stages.place(self.placement)

    @contextmanager
    def _alike(self, parts: list[ExpertParallel], *, is_combine: bool) -> Iterator[list[ExpertParallel]]:
        """Have all ranks raise what one of them does wrong: those that have yet to take part are told.

        Whoever is in no group of ranks with the culprit shares one with somebody who is.
        """
        try:
            yield parts
        except (ConfigError, RangeError) as exc:
            for ep in parts:
                ep.fail(exc, is_combine=is_combine)
            raise

    def _checked(self, given: Placement | Sequence[int], ranks: int) -> Placement:
        placement = given if isinstance(given, Placement) else Placement(given)
        placement.check(experts=self.experts, ranks=ranks)
        return placement

    def _scene(self) -> str:
        return (
            f"two-level, experts={self.experts}, hidden={self.hidden}, topk={self.topk}, "
            f"max_tokens={self.max_tokens}, dtype={self.dtype}, max_ranks={self._limit}, "
            f"eager_nbytes={self._sizes.eager_nbytes}"
        )

    def _check_rank(self, rank: int) -> None:
        self._check_open()
        if not 0 <= rank < self.world:
            raise ConfigError(f"there is no rank {rank}", hint=f"members are {self._council.names}")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError(f"the TwoLevel {self.name!r} is closed", hint="make a new one on every rank")

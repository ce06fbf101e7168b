"""Expert parallelism: the object that each rank has, its operations, and who takes part in them."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from raynixl.errors import ConfigError, Masked, RaynixlError
from raynixl.moe.board import Board
from raynixl.moe.checks import combine_call, dispatch_call, dtype_of, positive
from raynixl.moe.combining import Combine
from raynixl.moe.dispatching import Dispatch, Scene
from raynixl.moe.fields import RowFormat
from raynixl.moe.joining import let_in, start
from raynixl.moe.meeting import Meeting
from raynixl.moe.members import Members
from raynixl.moe.pending import Pending
from raynixl.moe.placement import Placement
from raynixl.moe.pool import Pool
from raynixl.moe.result import Combined, Dispatched, Handle
from raynixl.moe.routing import Routing, route
from raynixl.moe.session import Session
from raynixl.moe.statistics import MoEStatistics, statistics_of
from raynixl.record import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.collectives import Group

T = TypeVar("T")
_NO_DISPATCH: dict[str, Any] = {
    "x": None, "topk_idx": None, "topk_weights": None, "handle": None, "layout": None, "alignment": None,
    "weights_at": None, "extra": (),
}  # fmt: skip
_NO_COMBINE: dict[str, Any] = {
    "y": None, "handle": None, "weights": None, "bias": None, "out": None, "summed": True,
}  # fmt: skip


class OnLost(enum.Enum):
    """What becomes of a token of whose experts one is out of reach: its term is missing, or the others make up for it."""

    DROP = "drop"
    RENORMALISE = "renormalise"


class ExpertParallel:
    """One rank of an expert-parallel group: sends tokens to the ranks that hold their experts, and brings sums back.

    Every member of the group makes one, with the same arguments, at the same time; it returns when all have met.
    Where the others run already, it joins them between two of their operations. All active ranks call the same
    operations in the same order. One thread at a time; `async_` operations go on behind the caller, in order.

    Results are views of registered memory, which is used again once the last of them is gone: keep them as long as
    you like, and no longer. A rank that does not come by the deadline is masked, and named in `lost`; who finds
    itself masked raises `Masked`, and `rejoin` brings it back.

    experts: how many physical experts there are. placement: by expert its rank, -1 for nobody; even by default.
    hidden, topk, max_tokens: columns of a row, experts of a token, and tokens of one dispatch at most.
    dtype: that of the rows which buffers are made for; any may be sent. capacity: rows of one slot (they grow).
    max_ranks: so many members there can be, with those that join later.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came.
    """

    def __init__(
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int,
        dtype: torch.dtype = torch.bfloat16, placement: Placement | Sequence[int] | None = None, name: str = "moe",
        capacity: int | None = None, deadline: float | None = None, on_lost: OnLost = OnLost.DROP,
        max_ranks: int | None = None,
    ) -> None:  # fmt: skip
        self.agent = group.agent
        self.name = check_name(name, "name of an expert-parallel group")
        self.rank = group.rank
        self.experts, self.hidden = positive(experts, "experts"), positive(hidden, "hidden")
        self.topk, self.max_tokens = positive(topk, "topk"), positive(max_tokens, "max_tokens")
        self.dtype = dtype_of(dtype)
        self.on_lost = OnLost(on_lost)
        self.deadline = self.agent.config.transfer_timeout if deadline is None else deadline
        self._limit = _limit(len(group.members)) if max_ranks is None else positive(max_ranks, "max_ranks")
        if len(group.members) > self._limit:
            raise ConfigError(f"{len(group.members)} members with max_ranks={max_ranks}", hint="raise max_ranks")
        self._names = dict(enumerate(group.members))
        self._capacity = capacity
        self._turn = threading.RLock()  # held through each operation: they are carried out one after another
        self._worker: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._masked: Masked | None = None
        self._held: tuple[tuple[int, int], np.ndarray[Any, Any]] = ((-1, -1), np.zeros(0, np.int32))
        self._counts = {"dispatches": 0, "combines": 0, "rows": 0}
        given = Placement.even(self.experts, len(group.members)) if placement is None else placement
        self.placement = given if isinstance(given, Placement) else Placement(given)
        self.placement.check(experts=self.experts, ranks=len(group.members))
        self._open()

    def __repr__(self) -> str:
        return f"ExpertParallel({self.name!r}, rank {self.rank}, active {self.active}, {self.experts} experts)"

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it is

    @property
    def world(self) -> int:
        """How many members there are, masked ones among them."""
        return max(self._names) + 1

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return self._session.members.active

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The physical experts that this rank holds; their place here is their local id."""
        return self.placement.experts_of(self.rank)

    # Operations

    def dispatch(
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, *,
        handle: Handle | None = None, layout: str | None = None, alignment: int | None = None,
        weights_at: str | None = None,
        extra: Sequence[Tensor] = (), async_: bool = False, deadline: float | None = None, stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Send each token's row to the ranks that hold its experts, once to each; return the rows that came here.

        x: [tokens, hidden], or (x in FP8, float32 scales [tokens, hidden / 128]). topk_idx: int32 or int64
        [tokens, topk], -1 for none. topk_weights: [tokens, topk]. With `handle`, of an earlier dispatch of as many
        tokens, rows go the same way without ids; weights may come along anew.

        layout: "tokens" (default), "experts" (each expert's rows together, `alignment` rows at least and a multiple
        of it), "slots" (fixed places by source: one exchange instead of two; what is beyond a source's rows is
        undefined). weights_at: "holder" (default; weights travel) or "source" (combine weighs what comes back by
        expert). extra: tensors [tokens, ...] that travel beside. stats: int64 [local experts], counts are added.
        The arguments may be changed once it has returned. With `async_`, returns a `Pending`.

        Raises:
            RangeError: too many tokens, or ids out of range. ConfigError: anything else that is wrong with the
                arguments, or that differs from other ranks'. All ranks raise alike.
            Masked: the others have gone on without this rank.
        """
        arguments = dict(
            x=x, topk_idx=topk_idx, topk_weights=topk_weights, handle=handle, layout=layout, alignment=alignment,
            weights_at=weights_at, extra=tuple(extra),
        )  # fmt: skip
        return self._submit(lambda: self._dispatch(arguments, deadline, stats), async_)

    def combine(
        self, y: Tensor, handle: Handle, *, bias: Tensor | Sequence[Tensor] | None = None, out: Tensor | None = None,
        summed: bool = True, async_: bool = False, deadline: float | None = None, stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Bring back what the experts made of the rows, and return the sum for each token, [tokens, hidden].

        y: as the handle's layout and weights want it. "tokens" with the weights at the holder: [rows, hidden], the
        weighted sum of the row's local experts. "experts": [padded rows, hidden], one for each pair; weighted and
        summed here if the weights are at the holder. "slots": [world, max_tokens, hidden], like "tokens". With the
        weights at the source, "tokens" and "slots" want one row for each pair, in order of `topk_idx >= 0`.

        The sum is made in float32 (float64 of float64), over holders by ascending rank, or over a token's experts in
        its own order; then `bias`, up to two; then it is rounded once, to nearest even. `out` receives it.
        stats: float64 [world], seconds that we waited for each rank are added.
        With summed=False (weights at the source) the pairs come back as they are, [pairs, hidden].

        Raises:
            ConfigError: y, bias or out do not fit; all ranks raise it. Masked: see `dispatch`.
        """
        arguments = dict(y=y, handle=handle, weights=None, bias=bias, out=out, summed=summed)
        return self._submit(lambda: self._combine(arguments, deadline, stats).out, async_)

    def combine_weights(
        self, y: Tensor, weights: Tensor, handle: Handle, *, bias: Any = None, out: Tensor | None = None,
        summed: bool = True, async_: bool = False, deadline: float | None = None,
    ) -> Any:  # fmt: skip
        """Combine, and bring back beside what the holders say of each row's weights, [rows, topk] here.

        Returns (out, [tokens, topk]): for each token and expert what its holder said.
        """
        arguments = dict(y=y, handle=handle, weights=weights, bias=bias, out=out, summed=summed)

        def both() -> tuple[Tensor, Tensor]:
            combined = self._combine(arguments, deadline, None)
            assert combined.topk_weights is not None
            return combined.out, combined.topk_weights

        return self._submit(both, async_)

    def fail(self, error: RaynixlError, *, is_combine: bool = False, deadline: float | None = None) -> None:
        """Take part in the next dispatch, or combine, with nothing but an error, which all other ranks raise."""
        with self._turn:
            self._begin()
            until = time.monotonic() + (self.deadline if deadline is None else deadline)
            try:
                if is_combine:
                    back, _ = combine_call(self._limit, renormalises=False, hidden=self.hidden, **_NO_COMBINE)
                    self._guarded(lambda: Combine(self._session, back, error, until).run())
                else:
                    out, _ = dispatch_call(self.topk, self.max_tokens, hidden=self.hidden, placement=0, **_NO_DISPATCH)
                    nothing = _no_routing(self._limit, self.topk)
                    self._guarded(lambda: Dispatch(self._session, self._scene(), out, nothing, error, until).run())
            except type(error) as exc:
                if exc is not error:
                    raise

    def beside(self, others: Sequence[ExpertParallel]) -> None:
        """Know in which other groups this rank takes part by turns: while it waits in one, nobody gives it up in these."""
        self._session.siblings = tuple(other._session for other in others)

    # Who takes part

    def place(self, placement: Placement | Sequence[int]) -> None:
        """Use another placement from the next dispatch on; every rank calls it between the same two operations.

        Raises:
            ConfigError: another number of experts, or ranks that cannot be.
        """
        with self._turn:
            given = placement if isinstance(placement, Placement) else Placement(placement)
            given.check(experts=self.experts, ranks=self.world)
            self.placement = given

    def mask(self, rank: int) -> None:
        """Go on without a rank, from the next operation on, until `unmask`. What one rank masks, all do one phase later."""
        with self._turn:
            self._check_rank(rank)
            if rank == self.rank:
                raise ConfigError("a rank cannot mask itself", hint="leave() takes this rank out")
            self._session.members.barred |= 1 << rank
            if self._session.members.is_active(rank):
                self._session.lose(rank, "it was masked by hand")

    def unmask(self, rank: int) -> None:
        """Let a rank in again once it has rejoined, and all active ranks have met it."""
        with self._turn:
            self._check_rank(rank)
            members = self._session.members
            members.barred &= ~(1 << rank)
            if members.renewed >> rank & 1 and not members.is_active(rank):
                members.ready |= 1 << rank

    def join(self, members: Sequence[str]) -> tuple[int, ...]:
        """Expect new members, whose ranks are returned; they are let in between two operations, once all have met them.

        The new ones make their ExpertParallel with a group that has all members in order of their ranks.

        Raises:
            ConfigError: a member is there already, or there would be more than max_ranks.
        """
        with self._turn:
            ranks = []
            for member in members:
                check_name(member, "member")
                if member in self._names.values() or len(self._names) >= self._limit:
                    raise ConfigError(
                        f"{member!r} cannot join {sorted(self._names.values())}",
                        hint="join() takes new names; who was masked calls rejoin(); max_ranks is for good",
                    )
                rank = self.world
                self._names[rank] = member
                ranks.append(rank)
            return tuple(ranks)

    def leave(self, ranks: Sequence[int]) -> None:
        """Take ranks out, ours perhaps among them; every rank calls it between the same two operations."""
        with self._turn:
            for rank in ranks:
                self._check_rank(rank)
            members = self._session.members
            for rank in ranks:
                if rank != self.rank:
                    members.barred |= 1 << rank
                    members.mask |= 1 << rank
                    members.ready &= ~(1 << rank)
                    members.renewed &= ~(1 << rank)
            if self.rank in ranks:
                self.close()

    def rejoin(self, *, deadline: float | None = None) -> None:
        """Come back after having been masked: begin anew, and wait until the active ranks let this one in.

        Raises:
            TransferTimeout: they did not.
        """
        with self._turn:
            self._check_open()
            self._shut()
            self._masked = None
            self._open(deadline)

    def statistics(self) -> MoEStatistics:
        """Return what was counted so far."""
        return statistics_of(self._session, **self._counts)

    def close(self) -> None:
        """Withdraw this rank's memory; idempotent. Results that live keep theirs."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                self._shut()

    # Within

    def _open(self, deadline: float | None = None) -> None:
        until = time.monotonic() + (self.deadline if deadline is None else deadline)
        members = Members(me=self.rank, limit=self._limit, mask=(1 << self._limit) - 1, names=self._names)
        board = Board(self.agent, self._limit)
        pool = Pool(self.agent, self._slot_nbytes(), name=self.name)
        self._session = Session(self.agent, members, board, pool)
        self._meeting = Meeting(
            self.agent, self.name, rank=self.rank, names=self._names, board=board, pool=pool,
            first=self._session.landing, scene=self._scene_text(),
        )  # fmt: skip
        try:
            start(self._session, self._meeting, until)
        except BaseException:
            self._shut()
            raise

    def _scene_text(self) -> str:
        return (
            f"experts={self.experts}, hidden={self.hidden}, topk={self.topk}, max_tokens={self.max_tokens}, "
            f"dtype={self.dtype}, on_lost={self.on_lost.value}"
        )

    def _slot_nbytes(self) -> int:
        """Return the size of a slot: what even routing needs and a quarter more, or what can come at all if that is less."""
        world = len(self._names)
        spread = self.topk * self.max_tokens
        rows = self._capacity or min(world * self.max_tokens, max(spread + spread // 4, self.max_tokens))
        form = RowFormat((self.hidden * self.dtype.itemsize, 4 * self.topk, 4 * self.topk, 4))
        return form.slot_nbytes(rows)

    def _shut(self) -> None:
        self._meeting.close()
        self._session.pool.close()
        self._session.board.close()

    def _submit(self, operation: Callable[[], T], async_: bool) -> T | Pending[T]:
        if self._worker is None and not async_:
            return operation()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="raynixl-moe")
        pending = Pending(self._worker.submit(operation))
        return pending if async_ else pending.wait()

    def _begin(self) -> None:
        self._check_open()
        if self._masked is not None:
            raise self._masked.afresh()
        session = self._session
        session.members.lost.clear()
        let_in(session, self._meeting)
        if session.members.mask and session.pool.quarantined:
            session.sweep()

    def _dispatch(self, arguments: dict[str, Any], deadline: float | None, stats: Tensor | None) -> Dispatched:
        with self._turn:
            self._begin()
            until = time.monotonic() + (self.deadline if deadline is None else deadline)
            call, error = dispatch_call(
                self.topk, self.max_tokens, hidden=self.hidden, placement=self.placement.digest, **arguments
            )
            routing = _no_routing(self._limit, self.topk)
            if error is None:
                try:
                    routing = self._route(call)
                except RaynixlError as exc:
                    error = exc
            result = self._guarded(lambda: Dispatch(self._session, self._scene(), call, routing, error, until).run())
            self._counts["dispatches"] += 1
            self._counts["rows"] += result.handle.rows
            if stats is not None:
                stats += result.counts
            return result

    def _combine(self, arguments: dict[str, Any], deadline: float | None, stats: Tensor | None) -> Combined:
        with self._turn:
            self._begin()
            until = time.monotonic() + (self.deadline if deadline is None else deadline)
            before = self._session.waited.copy()
            call, error = combine_call(
                self._limit, renormalises=self.on_lost is OnLost.RENORMALISE, hidden=self.hidden, **arguments
            )
            combined = self._guarded(lambda: Combine(self._session, call, error, until).run())
            self._counts["combines"] += 1
            if stats is not None:
                stats += torch.from_numpy((self._session.waited - before)[: len(stats)])
            return combined

    def _guarded(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except Masked as exc:
            self._masked = exc
            raise

    def _route(self, call: Any) -> Routing:
        if call.handle is not None:
            return call.handle.routing_with(call.weights if call.sends_weights else None)
        holders = self._holders()
        weights = call.weights if call.sends_weights else None
        return route(
            self.agent.native, call.ids, weights, holders=holders, local=self.placement.local, ranks=self._limit
        )

    def _holders(self) -> np.ndarray[Any, Any]:
        """Return by expert the rank that holds it and takes part, or -1."""
        key = (self.placement.digest, self._session.members.mask)
        if self._held[0] != key:
            holders = self.placement.holders
            gone = [rank for rank in range(self._limit) if not self._session.members.is_active(rank)]
            self._held = (key, np.where(np.isin(holders, gone), np.int32(-1), holders))
        return self._held[1]

    def _scene(self) -> Scene:
        return Scene(self.topk, self.max_tokens, self.world, self.placement.digest, len(self.local_experts))

    def _check_rank(self, rank: int) -> None:
        self._check_open()
        if rank not in self._names:
            raise ConfigError(f"there is no rank {rank}", hint=f"members are {self._names}")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError(f"the ExpertParallel {self.name!r} is closed", hint="make a new one on every rank")


def _limit(members: int) -> int:
    """Return how many ranks there may be by default: some more than there are."""
    limit = 16
    while limit < members + 4:
        limit *= 2
    return limit


def _no_routing(ranks: int, topk: int) -> Routing:
    """Return the routing of no tokens."""
    return Routing(
        0, np.zeros(0, np.int32), np.zeros(ranks, np.int64), np.zeros(ranks + 1, np.int64), np.zeros(1, np.int64),
        np.zeros(0, np.int32), np.zeros((0, topk), np.int32), None,
    )  # fmt: skip

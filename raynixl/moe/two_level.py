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

**Tensors on a GPU** go through memory of the host (see `cuda_staged`): forwarders join there what columns bring, for
whichever ranks forward in the present view, and views, which change amid operations, have no kernels to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, RangeError
from raynixl.moe.cuda_staged import brought, gpu_of_call, host_handle, put_added, put_dispatched, put_out
from raynixl.moe.renewing import as_before, fresh, hollow, renewed
from raynixl.moe.result import Dispatched
from raynixl.moe.staged_rank import StagedRank
from raynixl.moe.staged_result import Made, TwoLevelDispatched, TwoLevelHandle, handle_of
from raynixl.moe.stages import Stages
from raynixl.moe.staging import Returning, Sending

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.cuda_device import Gpu
    from raynixl.moe.parallel import ExpertParallel


class TwoLevel(StagedRank):
    """One rank of an expert-parallel group that is arranged as a grid; its operations are those of `ExpertParallel`.

    Every member makes one, with the same arguments, at the same time; where the others run already, it joins them
    before one of their dispatches of tokens, and takes over their placement and their grid.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came, or the others did not let this one in.
    """

    _gpu: int | None = None
    """That of the last tensors that were on one."""

    # Operations

    def dispatch(  # noqa: PLR0913 - those of ExpertParallel
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, *,
        handle: TwoLevelHandle | None = None, layout: str | None = None, alignment: int | None = None,
        weights_at: str | None = None, extra: Sequence[Tensor] = (), async_: bool = False,
        deadline: float | None = None, stats: Tensor | None = None, waited: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Send each token's row to the ranks that hold its experts; see `ExpertParallel.dispatch`."""
        sending = Sending(
            x, topk_idx, topk_weights, tuple(extra), host_handle(handle), layout, alignment, weights_at, stats, waited
        )  # fmt: skip
        return self._submit(self._within(x, lambda: self._dispatched(sending, deadline), async_), async_)

    def combine(
        self, y: Tensor, handle: TwoLevelHandle, *, bias: Tensor | Sequence[Tensor] | None = None,
        out: Tensor | None = None, summed: bool = True, async_: bool = False, deadline: float | None = None,
        stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Bring back what the experts made of the rows, and return each token's sum; see `ExpertParallel.combine`.

        With the weights at the holder the sum is rounded once more than flat: for each group.
        """
        returning = Returning(y, None, host_handle(handle), bias, out, summed, stats)
        return self._submit(self._within(y, lambda: self._combined(returning, deadline)[0], async_), async_)

    def combine_weights(
        self, y: Tensor, weights: Tensor, handle: TwoLevelHandle, *, bias: Any = None, out: Tensor | None = None,
        async_: bool = False, deadline: float | None = None,
    ) -> Any:  # fmt: skip
        """Combine, and bring back what the holders say of each row's weights; see `ExpertParallel.combine_weights`."""
        returning = Returning(y, weights, host_handle(handle), bias, out, True, None)
        return self._submit(self._within(y, lambda: self._combined(returning, deadline), async_), async_)

    def explain(self) -> str:
        """Say which way rows go, and why."""
        ways = "rows go once to each host that has experts of theirs, and there to the holders"
        if self._gpu is None:
            return f"{ways}; no tensors on a GPU so far"
        return f"{ways}, those on GPU {self._gpu} through memory of the host: what other hosts send is joined there"

    # Within

    def _dispatched(self, sending: Sending, deadline: float | None) -> Dispatched:
        """Dispatch, and add to the caller's statistics once that has succeeded."""
        gpu = self._gpu_of(sending.x)
        given = sending if gpu is None else sending.fetched(gpu)

        def work(stages: Stages) -> tuple[TwoLevelDispatched, Any, list[Tensor]]:
            counted = given.stats.clone() if isinstance(given.stats, torch.Tensor) else given.stats
            waits = stages.waits()
            return self._dispatch(stages, replace(given, stats=counted), deadline, waits), counted, waits

        (r, counted, waits), lost = self._carry_out(work, is_fresh=sending.handle is None)
        if sending.stats is not None:
            sending.stats.detach().copy_(counted)
        self._add_waits(given.waited, waits)
        if gpu is not None:
            put_added(sending, given, ["waited"])
        r = TwoLevelDispatched.of(r, lost=lost, handle=replace(handle_of(r), lost=lost))
        return r if gpu is None else put_dispatched(r, gpu)

    def _gpu_of(self, given: Any) -> Gpu | None:
        gpu = gpu_of_call(given)
        self._gpu = self._gpu if gpu is None else gpu.number
        return gpu

    def _dispatch(
        self, stages: Stages, sending: Sending, deadline: float | None, waits: list[Tensor]
    ) -> TwoLevelDispatched:
        """Dispatch; by a handle of before others took part as a dispatch of its ids."""
        if not isinstance(sending.handle, TwoLevelHandle) or sending.handle.made.view == stages.view.order:
            return self._dispatch_now(stages, sending, deadline, waits)
        with self._alike([*stages.across, stages.inside], is_combine=False) as left:
            sending.check(self.placement, self.rank, self.world)
            again = fresh(sending)
            left.clear()
        r = self._dispatch_now(stages, again, deadline, waits)
        return as_before(sending, r, len(self.local_experts))

    def _dispatch_now(
        self, stages: Stages, sending: Sending, deadline: float | None, waits: list[Tensor]
    ) -> TwoLevelDispatched:
        with self._alike([*stages.across, stages.inside], is_combine=False) as left:
            shares = stages.shares(check_timeout(deadline, self.deadline, what="deadline"))
            sending.check(stages.placement, self.rank, self.world)
            came: list[Dispatched] = []
            for number, ep in enumerate(stages.across):
                options = sending.across(number, self.rank)
                left.remove(ep)
                seconds = shares.left(shares.order[number])
                came.append(ep.dispatch(**options, deadline=seconds, waited=waits[number]))
                self._council.pause(stages.gone())
            options = sending.inside(came, stages.physical)
            left.clear()
            seconds = shares.left(shares.count - 1)
            r: Dispatched = stages.inside.dispatch(
                **options, deadline=seconds, stats=sending.stats, waited=waits[-1]
            )  # fmt: skip
            made = Made(stages.view.order, stages.placement, (self.world, self.max_tokens))
            return sending.result(r, tuple(one.handle for one in came), made)

    def _combined(self, returning: Returning, deadline: float | None) -> tuple[Tensor, Tensor | None]:
        """Combine, and add to the caller's statistics once that has succeeded."""
        gpu = self._gpu_of(returning.y)
        given = returning if gpu is None else returning.fetched(gpu)

        def work(stages: Stages) -> tuple[tuple[Tensor, Tensor | None], list[Tensor]]:
            return self._combine(stages, given, deadline)

        (made, waits), _ = self._carry_out(work, is_fresh=False)
        self._add_waits(given.stats, waits)
        if gpu is None:
            return made
        put_added(returning, given, ["stats"])
        return put_out(made[0], returning.out if returning.summed else None, gpu), brought(made[1], gpu)

    def _add_waits(self, waited: Tensor | None, waits: list[Tensor]) -> None:
        """Add the seconds that each part was waited for, where the caller wants them."""
        if waited is not None and self._stages is not None:
            for each, (_, ranks) in zip(waits, self._stages.parts(), strict=True):
                waited[list(ranks)] += each.to(waited.dtype)

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
            waits = stages.waits()
            left.remove(stages.inside)
            came = returning.inside(stages.inside, shares.left(0), waits[-1])
            self._council.pause(stages.gone())
            outs = []
            for number, ep in enumerate(stages.across):
                left.remove(ep)
                seconds = shares.left(1 + shares.order[number])
                outs.append(returning.across(ep, number, came, seconds, waits[number]))
                self._council.pause(stages.gone())
            return outs[0], waits

    def _renew(self, stages: Stages, handle: TwoLevelHandle, deadline: float | None) -> TwoLevelDispatched:
        """Find the present ways of the rows of a handle of before others took part."""
        stages.place(handle.made.placement)
        try:
            return self._dispatch_now(stages, hollow(handle, self.hidden), deadline, stages.waits())
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

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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from raynixl.config import check_timeout
from raynixl.errors import ConfigError, RangeError
from raynixl.moe.renewing import as_before, fresh, hollow, renewed
from raynixl.moe.result import Dispatched
from raynixl.moe.staged_rank import StagedRank
from raynixl.moe.stages import Stages
from raynixl.moe.staging import Made, Returning, Sending, TwoLevelDispatched, TwoLevelHandle

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.parallel import ExpertParallel


class TwoLevel(StagedRank):
    """One rank of an expert-parallel group that is arranged as a grid; its operations are those of `ExpertParallel`.

    Every member makes one, with the same arguments, at the same time; where the others run already, it joins them
    before one of their dispatches of tokens, and takes over their placement and their grid.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came, or the others did not let this one in.
    """

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

"""Expert parallelism: the object that each rank has, and its operations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from raynixl.errors import RaynixlError
from raynixl.moe.checks import CombineArguments, DispatchArguments, combine_call, dispatch_call
from raynixl.moe.combining import Combine
from raynixl.moe.cuda_rank import GpuRank
from raynixl.moe.dispatching import Dispatch, Scene
from raynixl.moe.rank import OnLost
from raynixl.moe.result import Combined, Dispatched, Handle
from raynixl.moe.routing import Routing, route

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.calls import DispatchCall

T = TypeVar("T")


class ExpertParallel(GpuRank):
    """One rank of an expert-parallel group: sends tokens to the ranks that hold their experts, and brings sums back.

    Every member of the group makes one, with the same arguments, at the same time; it returns when all have met.
    Where the others run already, it joins them before one of their dispatches without a handle, and takes over their
    placement. All active ranks call the same
    operations in the same order. One thread at a time; `async_` operations go on behind the caller, in order.

    Results are views of registered memory, which is used again once the last of them is gone: keep them as long as
    you like, and no longer. A rank that does not come by the deadline is masked, and named in `lost`; who finds
    itself masked raises `Masked`, and `rejoin` brings it back.

    experts: how many physical experts there are. placement: by expert its rank, -1 for nobody; even by default.
    hidden, topk, max_tokens: columns of a row, experts of a token, and tokens of one dispatch at most.
    dtype: that of the rows which buffers are made for; any may be sent. capacity: rows of one slot (they grow).
    max_ranks: so many members there can be, with those that join later. eager_nbytes: where the rows of all that a
    rank can get have no more bytes than this, they are sent at once, without an exchange of counts first, and copied
    together by the receiver; 0 for never.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came.
    """

    _held: tuple[tuple[int, int], np.ndarray[Any, Any]] = ((-1, -1), np.zeros(0, np.int32))

    def dispatch(  # noqa: PLR0913 - the options of a user
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, *,
        handle: Handle | None = None, layout: str | None = None, alignment: int | None = None,
        weights_at: str | None = None,
        extra: Sequence[Tensor] = (), async_: bool = False, deadline: float | None = None, stats: Tensor | None = None,
        waited: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Send each token's row to the ranks that hold its experts, once to each; return the rows that came here.

        x: [tokens, hidden], or (x in FP8, float32 scales [tokens, hidden / 128]). topk_idx: int32 or int64
        [tokens, topk], -1 for none. topk_weights: [tokens, topk]. With `handle`, of an earlier dispatch of as many
        tokens on this layer, rows go the same way without ids; weights may come along anew, and what is not said of
        layout, alignment and weights_at is as it was.

        layout: "tokens" (default), "experts" (each expert's rows together, `alignment` rows at least and a multiple
        of it), "slots" (fixed places by source: one exchange instead of two; what is beyond a source's rows is
        undefined). weights_at: "holder" (default; weights travel) or "source" (combine weighs what comes back by
        expert). extra: tensors [tokens, ...] that travel beside. stats: int64 [local experts], counts are added.
        waited: float64 [world], seconds that we waited for each rank are added.
        The arguments may be changed once it has returned. With `async_`, returns a `Pending`.

        Raises:
            RangeError: too many tokens, or ids out of range. ConfigError: anything else that is wrong with the
                arguments, or that differs from other ranks'. All ranks raise alike.
            Masked: the others have gone on without this rank.
        """
        arguments = DispatchArguments(
            x, topk_idx, topk_weights, handle, layout, alignment, weights_at, extra, stats, waited
        )  # fmt: skip
        return self._submit(self._within(x, lambda: self._dispatch(arguments, deadline), async_), async_)

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
        its own order; then `bias`, up to two; then it is rounded once, to nearest even. `out` receives it, in memory
        that nothing it is made of lies in.
        stats: float64 [world], seconds that we waited for each rank are added.
        With summed=False (weights at the source) the pairs come back as they are, [pairs, hidden].

        Raises:
            ConfigError: y, bias or out do not fit; all ranks raise it. Masked: see `dispatch`.
        """
        arguments = CombineArguments(y, handle, None, bias, out, summed, stats)
        return self._submit(self._within(y, lambda: self._combine(arguments, deadline).out, async_), async_)

    def combine_weights(
        self, y: Tensor, weights: Tensor, handle: Handle, *, bias: Any = None, out: Tensor | None = None,
        summed: bool = True, async_: bool = False, deadline: float | None = None,
    ) -> Any:  # fmt: skip
        """Combine, and bring back beside what the holders say of each row's weights, [rows, topk] here.

        Returns (out, [tokens, topk]): for each token and expert what its holder said.
        """
        arguments = CombineArguments(y, handle, weights, bias, out, summed)

        def both() -> tuple[Tensor, Tensor]:
            combined = self._combine(arguments, deadline)
            assert combined.topk_weights is not None
            return combined.out, combined.topk_weights

        return self._submit(self._within(y, both, async_), async_)

    def fail(self, error: RaynixlError, *, is_combine: bool = False, deadline: float | None = None) -> None:
        """Take part in the next dispatch, or combine, with nothing but an error, which all other ranks raise."""

        def fail() -> None:
            try:
                if is_combine:
                    self._combine(CombineArguments(), deadline, error)
                else:
                    self._dispatch(DispatchArguments(), deadline, error)
            except type(error) as exc:
                if exc is not error:
                    raise

        self._submit(fail)

    # Within

    def _dispatch(
        self, arguments: DispatchArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Dispatched:
        gpu = self._gpu_of(arguments.x, failed)
        if gpu is not None:
            return self._dispatch_on_gpu(gpu, arguments, deadline, failed)
        return self._dispatch_on_host(arguments, deadline, failed)

    def _combine(
        self, arguments: CombineArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Combined:
        gpu = self._gpu_of(arguments.y, failed)
        if gpu is not None:
            return self._combine_on_gpu(gpu, arguments, deadline, failed)
        return self._combine_on_host(arguments, deadline, failed)

    def _dispatch_on_host(
        self, arguments: DispatchArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Dispatched:
        with self._turn:
            self._begin(is_start=arguments.handle is None)
            before = self._session.waited.copy()
            call, error = dispatch_call(arguments, self._sizes())
            until, late = self._until(deadline)
            error = failed or error or late
            routing = _no_routing(self._limit, self.topk)
            if error is None:
                try:
                    routing = self._route(call)
                except RaynixlError as exc:
                    error = exc
            result = self._guarded(lambda: Dispatch(self._session, self._scene(), call, routing, error, until).run())
            self._counts["dispatches"] += 1
            self._counts["rows"] += result.handle.rows
            if arguments.stats is not None:
                arguments.stats.add_(result.counts)
            self._add_waits(arguments.waited, before)
            return result

    def _combine_on_host(
        self, arguments: CombineArguments, deadline: float | None, failed: RaynixlError | None = None
    ) -> Combined:
        with self._turn:
            self._begin(is_start=False)
            before = self._session.waited.copy()
            renormalises = self.on_lost is OnLost.RENORMALISE
            call, error = combine_call(
                arguments, limit=self._limit, hidden=self.hidden, renormalises=renormalises, session=self._session.key
            )
            until, late = self._until(deadline)
            error = failed or error or late
            combined = self._guarded(lambda: Combine(self._session, call, error, until).run())
            self._counts["combines"] += 1
            self._add_waits(arguments.stats, before)
            return combined

    def _add_waits(self, waited: Tensor | None, before: np.ndarray[Any, Any]) -> None:
        """Add the seconds that we have waited for each rank since then, where the caller wants them."""
        if waited is not None:
            waited.add_(torch.from_numpy((self._session.waited - before)[: len(waited)]))

    def _route(self, call: DispatchCall) -> Routing:
        if call.handle is not None:
            return call.handle.routing_with(call.weights if call.sends_weights else None)
        assert call.ids is not None
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
        placement, local_experts = self.placement.digest, len(self.local_experts)
        return Scene(self.topk, self.max_tokens, self.world, placement, local_experts, self.is_eager)


@functools.lru_cache(8)
def _no_routing(ranks: int, topk: int) -> Routing:
    """Return the routing of no tokens."""
    return Routing(
        0, np.zeros(0, np.int32), np.zeros(ranks, np.int64), np.zeros(ranks + 1, np.int64), np.zeros(1, np.int64),
        np.zeros(0, np.int32), np.zeros((0, topk), np.int32), None,
    )  # fmt: skip

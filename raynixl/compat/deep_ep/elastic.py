"""`ElasticBuffer`: DeepEP's V2 interface on `ExpertParallel`, for tensors in memory of the host, and of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import ELASTIC_ALIGNMENT, align
from raynixl.compat.deep_ep.domains import world_of
from raynixl.compat.deep_ep.ephandle import EPHandle, Request, make_ephandle
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap, wait_for
from raynixl.compat.deep_ep.experimental import Experimental
from raynixl.compat.deep_ep.instances import Instances, Shape
from raynixl.compat.deep_ep.layout import check_own, gpu_of_rows, local_experts, pad
from raynixl.compat.deep_ep.members import join
from raynixl.compat.deep_ep.streams import Streams
from raynixl.compat.deep_ep.worst import at_places
from raynixl.errors import ConfigError
from raynixl.moe import cuda_device

if TYPE_CHECKING:
    from raynixl.agents import Agent

__all__ = ["EPHandle", "ElasticBuffer"]

Rows = Tensor | tuple[Tensor, Tensor]
Event = EventOverlap | EventHandle
_SMS = 4
_WIDEST_TOPK = 32


class ElasticBuffer(Experimental):
    """Dispatch and combine with the arguments, results and order of DeepEP's `ElasticBuffer`.

    `group` is as for `Buffer`. Rows always come in one order, so `deterministic` changes nothing. A rank that is lost
    makes operations raise `PeerLost`; `num_cpu_timeout_secs` is how long a step waits for a rank.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        comm: Any = None,
        agent: Agent | None = None,
    ) -> None:
        if num_bytes is None and (num_max_tokens_per_rank <= 0 or hidden <= 0):
            raise ConfigError("the buffer has no size", hint="give num_max_tokens_per_rank and hidden, or num_bytes")
        members = join(group, comm, agent)
        self.group = comm if group is None else group
        self.rank_idx, self.num_ranks = members.rank, members.world
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_allocated_qps = num_allocated_qps if num_allocated_qps else 17
        self.num_bytes = num_bytes if num_bytes is not None else self.get_buffer_size_hint(
            self.group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
        )  # fmt: skip
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self._members = members
        self._streams = Streams()
        self._instances = Instances(members, deadline=float(num_cpu_timeout_secs), may_shrink=False)

    def __repr__(self) -> str:
        return f"ElasticBuffer(rank {self.rank_idx} of {self.num_ranks})"

    def destroy(self) -> None:
        """Close what the buffer has made; idempotent. Without this it is closed when the buffer is gone."""
        self._instances.close()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Return the bytes of one landing slot that takes all tokens of all ranks, in multiples of 2 MiB.

        It is what one dispatch or combine may take at most. Memory follows use: there are a few slots.
        """
        topk = num_topk if num_topk else _WIDEST_TOPK
        row = (hidden + -(-hidden // 128) * 4 if use_fp8_dispatch else 2 * hidden) + 8 * topk + 4
        return align(world_of(group) * num_max_tokens_per_rank * max(row, 2 * hidden + 4 * topk), ELASTIC_ALIGNMENT)

    @staticmethod
    def capture() -> EventHandle:
        """Return an event behind all that this thread has called, and has put on its current stream of a GPU."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """Return the stream of a GPU that asynchronous operations go on; without one, one of the CPU's, for nothing."""
        return self._streams.beside(cuda_device.used_gpu())

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Return (RDMA ranks, NVLink ranks): all ranks are in one domain."""
        return 1, self.num_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Return (scale-out ranks, scale-up ranks): all ranks are in one domain."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, *args: float, **kwargs: float) -> int:
        """Return the least number that DeepEP returns; nothing depends on it."""
        return _SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return a number of queue pairs; nothing depends on it."""
        return min(num_sms, self.num_allocated_qps)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Return when every rank has come; on a GPU, with all that was on its current stream, and on ours, done."""
        number = cuda_device.used_gpu()
        if number is not None:
            self._streams.finish(number)
        self._members.group.barrier()

    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send each token once to every rank that it goes to; rows come in the order of (source rank, token).

        With do_expand a row comes once for each of its experts here, by expert, then in that order; padding is always
        zero. In memory of the host the rows are there when this returns, also with async_with_compute_stream. On a GPU
        they are on the stream; the host waits until it knows how many come, unless do_cpu_sync is False or there is a
        handle.
        """
        if do_zero_padding and not do_expand:
            raise ConfigError("do_zero_padding pads expanded rows", hint="set do_expand too")
        rows = (x[0].detach(), x[1].detach()) if isinstance(x, tuple) else x.detach()
        if handle is not None:
            check_own(handle, EPHandle, self._instances, gpu_of_rows(rows))
            _check_cached(handle, topk_idx, num_experts, num_max_tokens_per_rank, expert_alignment, do_cpu_sync)
            if do_expand != handle.do_expand:
                raise ConfigError("the handle has the other layout", hint=f"set do_expand={handle.do_expand}")
        request = Request(
            num_experts or 0, expert_alignment or 1, num_max_tokens_per_rank or self.num_max_tokens_per_rank,
            num_sms or _SMS, do_expand, do_cpu_sync is None or do_cpu_sync,
        )  # fmt: skip

        def send() -> tuple[Rows, Tensor | None, Tensor | None, EPHandle]:
            wait_for(previous_event_before_epilogue)
            if handle is not None:
                made = handle, self._again(rows, handle, topk_weights)
            else:
                made = self._first(rows, topk_idx, topk_weights, copies=do_handle_copy, request=request)
            found, arrived = made
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(found.num_unaligned_recv_tokens_per_expert)
            weights = None if topk_weights is None else _weights(arrived, found)
            ids = None if do_expand else pad(arrived.topk_idx.clone(), found.allocated, -1)
            return _rows(arrived, found, use_tma_aligned_col_major_sf), ids, weights, found

        uses = (rows, topk_idx, topk_weights, cumulative_local_expert_recv_stats, handle)
        sent, event = self._streams.put(
            gpu_of_rows(rows), send, uses=uses, after=previous_event, is_async=async_with_compute_stream
        )
        return (*sent, event)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and add them up, in float32 by ascending rank, then the biases.

        Expanded rows are added up by token first, in the order of k, and rounded; with allow_multiple_reduction=False
        each goes back by itself and all are added up at the source, in the order of k. `topk_weights` come back too.
        """
        number = cuda_device.gpu_of(x)
        check_own(handle, EPHandle, self._instances, number)
        if len(x) != handle.allocated:
            raise ConfigError(
                f"x has {len(x)} rows", hint=f"give one for each of the {handle.allocated} that dispatch returned"
            )
        rows = x.detach()[: handle.expanded if handle.do_expand else handle.rows]
        inner, parallel = handle.inner.plain(), handle.parallel

        def bring() -> tuple[Tensor, Tensor | None]:
            wait_for(previous_event_before_epilogue)
            if topk_weights is None:
                return parallel.combine(rows, inner, bias=bias), None
            total, back = parallel.combine_weights(rows, _returned(topk_weights.detach(), handle), inner, bias=bias)
            return total, back

        brought, event = self._streams.put(
            number, lambda: self._instances.done(parallel, bring),
            uses=(rows, topk_weights, bias, handle), after=previous_event, is_async=async_with_compute_stream,
        )  # fmt: skip
        return (*brought, event)

    # Within

    def _first(
        self, rows: Rows, topk_idx: Tensor | None, topk_weights: Tensor | None, *, copies: bool, request: Request
    ) -> tuple[EPHandle, Any]:
        if topk_idx is None or request.experts <= 0 or request.tokens <= 0:
            raise ConfigError(
                "a dispatch without a handle needs topk_idx, num_experts and num_max_tokens_per_rank",
                hint="give them, or a handle",
            )
        local_experts(request.experts, self.num_ranks)
        hidden, number = (rows[0] if isinstance(rows, tuple) else rows).shape[1], gpu_of_rows(rows)
        parallel = self._instances.get(Shape(request.experts, hidden, topk_idx.shape[1]), request.tokens)
        is_fixed = not request.is_synchronous and self._instances.is_direct(parallel, number)
        options: dict[str, Any] = {"topk_weights": topk_weights}
        if request.is_expanded and not self.allow_multiple_reduction:
            given = () if topk_weights is None else (topk_weights.detach(),)
            options = {"weights_at": "source", "extra": given}
        if is_fixed:
            options["layout"] = "slots"
        elif request.is_expanded:
            options |= {"layout": "experts", "alignment": request.alignment}
        kept = topk_idx.detach().clone() if copies else topk_idx
        arrived = self._instances.done(parallel, lambda: parallel.dispatch(rows, kept, **options))
        return make_ephandle(request, arrived, parallel, kept, is_fixed=is_fixed)

    def _again(self, rows: Rows, handle: EPHandle, topk_weights: Tensor | None) -> Any:
        parallel, options = handle.parallel, {"handle": handle.sent, "topk_weights": topk_weights}
        if handle.fixed is None:
            options["alignment"] = handle.expert_alignment
        if handle.inner.weights_at == "source":
            options |= {"topk_weights": None, "extra": () if topk_weights is None else (topk_weights.detach(),)}
        arrived = self._instances.done(parallel, lambda: parallel.dispatch(rows, **options))
        return arrived if handle.fixed is None else handle.fixed.taken(arrived)


def _weights(arrived: Any, handle: EPHandle) -> Tensor:
    if handle.inner.weights_at == "holder":
        return pad(arrived.topk_weights, handle.allocated)
    if handle.fixed is not None:
        weights: Tensor = arrived.extra[0]
        return weights
    places, count = handle.places, handle.expanded
    which = torch.zeros(count + 1, dtype=torch.int64, device=places.device)
    which[torch.where(places >= 0, places, count)] = torch.arange(places.shape[1], device=places.device)
    return pad(arrived.extra[0].gather(1, which[:count, None])[:, 0], handle.allocated)


def _rows(arrived: Any, handle: EPHandle, is_column_major: bool) -> Rows:
    x = pad(arrived.x, handle.allocated)
    if arrived.scales is None:
        return x
    scales = pad(arrived.scales, handle.allocated)
    if is_column_major:
        room = torch.empty((scales.shape[1], align(max(1, len(scales)), 4)), dtype=scales.dtype, device=scales.device)
        scales = room.t()[: len(scales)].copy_(scales)
    return x, scales


def _returned(weights: Tensor, handle: EPHandle) -> Tensor:
    """Return the weights that go back, by row and k."""
    if not handle.do_expand:
        return weights[: handle.rows].masked_fill(handle.recv_ids < 0, 0)
    if handle.inner.weights_at == "source":
        raise ConfigError(
            "weights do not come back where every row does",
            hint="make the buffer with allow_multiple_reduction=True",
        )
    return at_places(weights, handle.places if handle.fixed is None else handle.inner.positions)


def _check_cached(
    handle: EPHandle,
    topk_idx: Tensor | None,
    experts: int | None,
    tokens: int | None,
    alignment: int | None,
    is_synchronous: bool | None,
) -> None:
    if topk_idx is not None or is_synchronous:
        raise ConfigError("a handle comes with its own ids and counts", hint="leave topk_idx and do_cpu_sync out")
    given = (experts, tokens, alignment)
    own = (handle.num_experts, handle.num_max_tokens_per_rank, handle.expert_alignment)
    if any(one is not None and one != other for one, other in zip(given, own, strict=True)):
        raise ConfigError(f"experts, tokens and alignment {given} are not the handle's {own}", hint="leave them out")

"""`Buffer`: DeepEP's V1 interface on `ExpertParallel`, for tensors in memory of the host, and of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import Config, align, low_latency_size
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap, Work, wait_for
from raynixl.compat.deep_ep.instances import Instances, Shape
from raynixl.compat.deep_ep.layout import (
    GivenLayout,
    Handle,
    check_own,
    counts_of,
    gpu_of_rows,
    lay_out,
    local_experts,
    make_handle,
    pad,
)
from raynixl.compat.deep_ep.low_latency import LowLatency
from raynixl.compat.deep_ep.members import join
from raynixl.compat.deep_ep.reuse import Reuse
from raynixl.compat.deep_ep.runtime import Runtime
from raynixl.compat.deep_ep.streams import Streams
from raynixl.compat.deep_ep.worst import SideBySide
from raynixl.errors import ConfigError
from raynixl.moe import cuda_device

if TYPE_CHECKING:
    from raynixl.agents import Agent

Rows = Tensor | tuple[Tensor, Tensor]


class Buffer(LowLatency):
    """Dispatch and combine with the arguments, results and order of DeepEP's `Buffer`.

    `group` is a `raynixl.Group`, a group of torch.distributed, or None with `comm`, an MPI communicator. With the last
    two, agents are made and find each other over it; `agent` gives one that is there. Sizes of memory, queue pairs and
    links are accepted and kept: memory follows use. All ranks call the same operations in the same order.

    A rank that is lost makes each operation that misses its rows raise `PeerLost`; with `enable_shrink` they go on
    without it. `deadline` is how many seconds a step waits for a rank.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
        agent: Agent | None = None,
        deadline: float | None = None,
    ) -> None:
        members = join(group, comm, agent)
        self.group = comm if group is None else group
        self.rank, self.group_size = members.rank, members.world
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Runtime | None = Runtime(members.rank, members.world)
        self._instances = Instances(members, deadline=deadline, may_shrink=enable_shrink)
        self._memory = Reuse()
        self._streams = Streams()
        self._next_buffers: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def __repr__(self) -> str:
        return f"Buffer(rank {self.rank} of {self.group_size}, low_latency_mode={self.low_latency_mode})"

    def destroy(self) -> None:
        """Close what the buffer has made; idempotent. Without this it is closed when the buffer is gone."""
        self._instances.close()
        self.runtime = None

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether rows may come in eight bits: they may."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Keep a number of SMs, which must be even; nothing depends on it."""
        if new_num_sms % 2:
            raise ConfigError(f"{new_num_sms} SMs", hint="DeepEP takes an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event behind all that this thread has called, and has put on its current stream of a GPU."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return what DeepEP would need for its low-latency buffer."""
        return low_latency_size(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return a config for any number of ranks; nothing depends on it."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return a config for any number of ranks; nothing depends on it."""
        return Config(Buffer.num_sms)

    def get_comm_stream(self) -> Any:
        """Return the stream of a GPU that asynchronous operations go on; without one, one of the CPU's, for nothing."""
        return self._streams.beside(cuda_device.used_gpu())

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Refuse: there is no raw buffer to look into.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "there is no raw buffer: rows land in slots that are leased to their tensors",
            hint="use the tensors that dispatch returns; get_next_low_latency_combine_buffer() for zero_copy",
        )

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Return tokens by rank, by node of 8 ranks (None up to 8), pairs by expert, and who goes to which rank.

        They are where topk_idx is; on a GPU nobody waits for it.

        Raises:
            RangeError: an id is no expert. On a GPU dispatch says that.
            ConfigError: experts do not divide among ranks.
        """

        def count() -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
            found = lay_out(topk_idx, num_experts, self.group_size)
            return (
                found.num_tokens_per_rank, found.num_tokens_per_rdma_rank, found.num_tokens_per_expert,
                found.is_token_in_rank,
            )  # fmt: skip

        number = cuda_device.gpu_of(topk_idx)
        counts, event = self._streams.put(number, count, uses=topk_idx, after=previous_event, is_async=async_finish)
        return (*counts, event)

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Send each token once to every rank that it goes to; rows come in the order of (source rank, token).

        Received weights are 0 where the id is -1. In memory of the host the rows are there when this returns, also with
        async_finish. On a GPU they are on the stream; the host waits until it knows how many come, and with
        num_worst_tokens, alike on all ranks, or a handle, for nothing.

        Raises:
            ConfigError: arguments that do not go together; a rank that calls something else.
            RangeError: an id is no expert; more rows than num_worst_tokens.
            PeerLost: a rank is lost, and the buffer was made without enable_shrink.
        """
        rows = (x[0].detach(), x[1].detach()) if isinstance(x, tuple) else x.detach()
        number = gpu_of_rows(rows)

        def send() -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, Handle | None]:
            if handle is not None:
                check_own(handle, Handle, self._instances, number)
                return self._dispatch_again(rows, handle, topk_idx, topk_weights), None, None, None, None
            layout = GivenLayout(num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
            if (topk_idx is None) != (topk_weights is None):
                raise ConfigError("topk_idx comes without topk_weights, or they without it", hint="give both, or none")
            if topk_idx is not None:
                return self._by_expert(
                    rows, layout, topk_idx, topk_weights, alignment=expert_alignment, worst=num_worst_tokens
                )
            if num_worst_tokens:
                raise ConfigError("num_worst_tokens needs topk_idx", hint="give topk_idx and topk_weights too")
            return self._by_rank(rows, layout, expert_alignment)

        uses = (rows, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert, handle)
        sent, event = self._streams.put(number, send, uses=uses, after=previous_event, is_async=async_finish)
        return (*sent, event)

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and add them up: in float32 by ascending rank, then the biases, rounded once.

        `topk_weights` [rows, topk] come back too, added up at [tokens, topk]: the gradient of what dispatch sent.
        With async_finish the sum is there once the event was waited for. On a GPU nobody waits; in memory of the host
        this returns with the weights, if there are any.
        """
        number = cuda_device.gpu_of(x)
        check_own(handle, Handle, self._instances, number)
        if len(x) != handle.padded:
            raise ConfigError(
                f"x has {len(x)} rows", hint=f"give one for each of the {handle.padded} that dispatch returned"
            )
        rows, biases = x.detach()[: handle.rows], None if bias is None else _biases(bias)
        parallel = handle.parallel
        if number is None and topk_weights is None:
            return self._combine_behind(rows, handle, biases, previous_event, async_finish)

        def bring() -> tuple[Tensor, Tensor | None]:
            if topk_weights is None:
                return parallel.combine(rows, handle.inner, bias=biases), None
            weights = topk_weights.detach()[: handle.rows]
            total, back = parallel.combine_weights(rows, weights, handle.inner, bias=biases)
            return total, back

        brought, event = self._streams.put(
            number, lambda: self._instances.done(parallel, bring), uses=(rows, topk_weights, biases, handle),
            after=previous_event, is_async=async_finish,
        )  # fmt: skip
        return (*brought, event)

    def internode_dispatch(self, x: Rows, **options: Any) -> Any:
        """Dispatch; there is one implementation for any number of ranks."""
        return self.dispatch(x, **options)

    def internode_combine(self, x: Tensor, handle: Handle, **options: Any) -> Any:
        """Combine; there is one implementation for any number of ranks."""
        return self.combine(x, handle, **options)

    # Within

    def _by_expert(
        self,
        rows: Rows,
        layout: GivenLayout,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        alignment: int,
        worst: int,
    ) -> tuple[Rows, Tensor, Tensor, list[int], Handle]:
        experts, number = layout.experts, gpu_of_rows(rows)
        local_experts(experts, self.group_size)
        if number is None:
            self._check_layout(topk_idx, experts, layout.in_rank)
        else:
            layout.check_on(number)
            topk_idx = topk_idx.detach().clone()  # the handle keeps them, and the caller may change his
        shape = Shape(experts, _shape(rows)[1], topk_idx.shape[1])
        parallel, arrived, fixed = self._send(rows, shape, topk_idx, topk_weights, worst)
        count = worst if worst else len(arrived.tokens)
        listed = [] if worst else [align(one, alignment) for one in counts_of(arrived)]
        made = make_handle(arrived, parallel, in_rank=layout.in_rank, padded=count, fixed=fixed)
        ids, weights = pad(arrived.topk_idx, count, -1), pad(arrived.topk_weights, count)
        return _rows(arrived, count), ids, weights, listed, made

    def _send(
        self, rows: Rows, shape: Shape, ids: Tensor, weights: Tensor | None, worst: int
    ) -> tuple[Any, Any, SideBySide | None]:
        """Dispatch; on a GPU without a word of the host's if it is known how many rows come at the worst."""
        tokens, number = _shape(rows)[0], gpu_of_rows(rows)
        if worst and number is not None:
            parallel = self._instances.fixed(shape, tokens, worst)
            if self._instances.is_direct(parallel, number):
                arrived = self._instances.done(parallel, lambda: parallel.dispatch(rows, ids, weights, layout="slots"))
                fixed = SideBySide.of(arrived, worst)
                return parallel, fixed.taken(arrived), fixed
        return (*self._instances.run(shape, tokens, lambda parallel: parallel.dispatch(rows, ids, weights)), None)

    def _by_rank(self, rows: Rows, layout: GivenLayout, alignment: int) -> tuple[Rows, None, None, list[int], Handle]:
        """Dispatch by ranks alone: as if each had one expert."""
        tokens, hidden = _shape(rows)
        each, number = local_experts(layout.experts, self.group_size), gpu_of_rows(rows)
        if number is not None:
            layout.check_on(number)
        shape = Shape(self.group_size, hidden, self.group_size)
        ids = torch.where(layout.in_rank, torch.arange(self.group_size, device=layout.in_rank.device), -1)
        parallel, arrived = self._instances.run(shape, tokens, lambda parallel: parallel.dispatch(rows, ids))
        told = layout.per_expert.int()
        told = told if number is None else cuda_device.gpu(number).fetch(told)
        counts = self._instances.members.gather(told.numpy()).sum(0)[self.rank * each : (self.rank + 1) * each]
        listed = [align(one, alignment) for one in counts.tolist()]
        count = len(arrived.tokens)
        made = make_handle(arrived, parallel, in_rank=layout.in_rank, padded=count)
        return _rows(arrived, count), None, None, listed, made

    def _dispatch_again(self, rows: Rows, handle: Handle, topk_idx: Tensor | None, topk_weights: Tensor | None) -> Rows:
        if topk_idx is not None or topk_weights is not None:
            raise ConfigError("a handle comes with its own ids", hint="leave topk_idx and topk_weights out")
        parallel, fixed = handle.parallel, handle.fixed
        inner = handle.inner if fixed is None else fixed.handle
        arrived = self._instances.done(parallel, lambda: parallel.dispatch(rows, handle=inner))
        return _rows(arrived if fixed is None else fixed.taken(arrived), handle.padded)

    def _combine_behind(
        self, rows: Tensor, handle: Handle, biases: Any, after: EventOverlap | None, is_async: bool
    ) -> tuple[Tensor, None, EventOverlap]:
        """Combine in memory of the host, if that is wanted behind the caller's back."""
        wait_for(after)
        parallel = handle.parallel
        total = torch.empty((handle.inner.routing.tokens, rows.shape[1]), dtype=rows.dtype)
        pending = parallel.combine(rows, handle.inner, bias=biases, out=total, async_=True)

        def receive() -> None:
            self._instances.done(parallel, pending.wait)

        work = Work(receive)
        if is_async:
            return total, None, EventOverlap(EventHandle(work))
        work.finish()
        return total, None, EventOverlap()

    def _check_layout(self, topk_idx: Tensor, experts: int, is_token_in_rank: Tensor) -> None:
        if not torch.equal(lay_out(topk_idx, experts, self.group_size).is_token_in_rank, is_token_in_rank):
            raise ConfigError(
                "is_token_in_rank is not what topk_idx says", hint="call get_dispatch_layout with the same topk_idx"
            )


def _shape(rows: Rows) -> tuple[int, int]:
    first = rows[0] if isinstance(rows, tuple) else rows
    return first.shape[0], first.shape[1]


def _rows(arrived: Any, count: int) -> Rows:
    x = pad(arrived.x, count)
    return x if arrived.scales is None else (x, pad(arrived.scales, count))


def _biases(bias: Any) -> Any:
    if isinstance(bias, Tensor):
        return bias.detach()
    if isinstance(bias, tuple) and len(bias) == 2:
        return tuple(one.detach() for one in bias)
    raise ConfigError(f"bias is {type(bias).__name__}", hint="give a tensor [tokens, hidden], or a pair of them")

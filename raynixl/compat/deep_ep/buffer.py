"""`Buffer`: DeepEP's V1 interface on `ExpertParallel`; the normal mode for tensors in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import Config, align, low_latency_size
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap, Work, wait_for
from raynixl.compat.deep_ep.instances import Instances, Shape
from raynixl.compat.deep_ep.layout import Handle, lay_out, local_experts, make_handle, pad
from raynixl.compat.deep_ep.low_latency import LowLatency
from raynixl.compat.deep_ep.members import join
from raynixl.compat.deep_ep.reuse import Reuse
from raynixl.compat.deep_ep.runtime import Runtime
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
        self._next_buffers: dict[tuple[int, ...], Tensor] = {}

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
        """Return an event that is reached: whoever calls has done everything before it."""
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

    def get_comm_stream(self) -> torch.cpu.Stream:
        """Return a stream of the CPU, which orders nothing: operations end in the order of their calls."""
        return torch.cpu.Stream()

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

        Raises:
            RangeError: an id is no expert.
            ConfigError: experts do not divide among ranks.
        """
        wait_for(previous_event)
        found = lay_out(topk_idx, num_experts, self.group_size)
        return (
            found.num_tokens_per_rank, found.num_tokens_per_rdma_rank, found.num_tokens_per_expert,
            found.is_token_in_rank, self._event(async_finish),
        )  # fmt: skip

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

        The rows are there when this returns, also with async_finish. Received weights are 0 where the id is -1.

        Raises:
            ConfigError: arguments that do not go together; a rank that calls something else.
            RangeError: an id is no expert; more rows than num_worst_tokens.
            PeerLost: a rank is lost, and the buffer was made without enable_shrink.
        """
        wait_for(previous_event)
        rows = (x[0].detach(), x[1].detach()) if isinstance(x, tuple) else x.detach()
        _check_on_host(rows)
        if handle is not None:
            return self._dispatch_again(rows, handle, topk_idx, topk_weights, async_finish)
        if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
            raise ConfigError(
                "a dispatch without a handle needs its layout", hint="give what get_dispatch_layout returned"
            )
        if (topk_idx is None) != (topk_weights is None):
            raise ConfigError("topk_idx comes without topk_weights, or they without it", hint="give both, or none")
        if num_worst_tokens and topk_idx is None:
            raise ConfigError("num_worst_tokens needs topk_idx", hint="give topk_idx and topk_weights too")
        experts = len(num_tokens_per_expert)
        each = local_experts(experts, self.group_size)
        if topk_idx is None:
            parallel, arrived = self._by_rank(rows, is_token_in_rank)
            mine = self._instances.members.gather(num_tokens_per_expert.int().numpy()).sum(0)
            counts = mine[self.rank * each : (self.rank + 1) * each].tolist()
        else:
            self._check_layout(topk_idx, experts, is_token_in_rank)
            parallel, arrived = self._by_expert(rows, experts, topk_idx, topk_weights)
            counts = arrived.counts.tolist()
        self._instances.check(parallel)
        count = num_worst_tokens if num_worst_tokens else len(arrived.tokens)
        ids = None if topk_idx is None else pad(arrived.topk_idx, count, -1)
        weights = None if topk_idx is None else pad(arrived.topk_weights, count)
        listed = [] if num_worst_tokens else [align(one, expert_alignment) for one in counts]
        made = make_handle(arrived, parallel, in_rank=is_token_in_rank, padded=count)
        return _rows(arrived, count), ids, weights, listed, made, self._event(async_finish)

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
        With async_finish the sum is there once the event was waited for; with weights, when this returns.
        """
        wait_for(previous_event)
        if not isinstance(handle, Handle):
            raise ConfigError("this is no handle of dispatch", hint="give what dispatch returned, as it is")
        if len(x) != handle.padded:
            raise ConfigError(
                f"x has {len(x)} rows", hint=f"give one for each of the {handle.padded} that dispatch returned"
            )
        rows, biases = x.detach()[: handle.rows], None if bias is None else _biases(bias)
        if topk_weights is not None:
            weights = topk_weights.detach()[: handle.rows]
            total, back = handle.parallel.combine_weights(rows, weights, handle.inner, bias=biases)
            self._instances.check(handle.parallel)
            return total, back, self._event(async_finish)
        total = torch.empty((handle.inner.routing.tokens, x.shape[1]), dtype=x.dtype)
        pending = handle.parallel.combine(rows, handle.inner, bias=biases, out=total, async_=True)

        def receive() -> None:
            self._instances.wait(handle.parallel, pending)

        work = Work(receive)
        if async_finish:
            return total, None, EventOverlap(EventHandle(work))
        work.finish()
        return total, None, EventOverlap()

    def internode_dispatch(self, x: Rows, **options: Any) -> Any:
        """Dispatch; there is one implementation for any number of ranks."""
        return self.dispatch(x, **options)

    def internode_combine(self, x: Tensor, handle: Handle, **options: Any) -> Any:
        """Combine; there is one implementation for any number of ranks."""
        return self.combine(x, handle, **options)

    # Within

    def _by_expert(self, rows: Rows, experts: int, topk_idx: Tensor, topk_weights: Tensor | None) -> tuple[Any, Any]:
        tokens, hidden = _shape(rows)
        shape = Shape(experts, hidden, topk_idx.shape[1])
        return self._instances.run(shape, tokens, lambda parallel: parallel.dispatch(rows, topk_idx, topk_weights))

    def _by_rank(self, rows: Rows, is_token_in_rank: Tensor) -> tuple[Any, Any]:
        """Dispatch by ranks alone: as if each had one expert."""
        tokens, hidden = _shape(rows)
        shape = Shape(self.group_size, hidden, self.group_size)
        ids = torch.where(is_token_in_rank, torch.arange(self.group_size), -1)
        return self._instances.run(shape, tokens, lambda parallel: parallel.dispatch(rows, ids))

    def _dispatch_again(
        self, rows: Rows, handle: Handle, topk_idx: Tensor | None, topk_weights: Tensor | None, is_async: bool
    ) -> tuple[Rows, None, None, None, None, EventOverlap]:
        if topk_idx is not None or topk_weights is not None:
            raise ConfigError("a handle comes with its own ids", hint="leave topk_idx and topk_weights out")
        arrived = handle.parallel.dispatch(rows, handle=handle.inner)
        self._instances.check(handle.parallel)
        return _rows(arrived, handle.padded), None, None, None, None, self._event(is_async)

    def _check_layout(self, topk_idx: Tensor, experts: int, is_token_in_rank: Tensor) -> None:
        if not torch.equal(lay_out(topk_idx, experts, self.group_size).is_token_in_rank, is_token_in_rank):
            raise ConfigError(
                "is_token_in_rank is not what topk_idx says", hint="call get_dispatch_layout with the same topk_idx"
            )

    def _event(self, is_async: bool) -> EventOverlap:
        return EventOverlap(EventHandle()) if is_async else EventOverlap()


def _check_on_host(rows: Rows) -> None:
    first = rows[0] if isinstance(rows, tuple) else rows
    if cuda_device.gpu_of(first) is not None:
        raise ConfigError(
            f"rows are on {first.device}: the normal mode takes tensors in memory of the host",
            hint="use the low-latency mode, or the layouts tokens and experts of raynixl.moe itself",
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

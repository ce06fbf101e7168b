"""The low-latency half of `Buffer`: fixed places for every source, one phase each way, weights at the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep import gpu
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap, Work
from raynixl.compat.deep_ep.instances import Instances, Shape
from raynixl.compat.deep_ep.layout import check_own, local_experts
from raynixl.compat.deep_ep.packing import Form, Packed, pack
from raynixl.compat.deep_ep.reuse import Reuse
from raynixl.compat.deep_ep.utils import quantise
from raynixl.errors import ConfigError, RangeError
from raynixl.moe import cuda_device
from raynixl.moe.calls import check_place
from raynixl.weights.conversion import BLOCK

Hook = Callable[[], None]
NANOSECONDS = 1e9


class LowLatencyHandle(tuple[Any, ...]):
    """DeepEP's tuple (src_info, layout_range, max tokens, hidden, experts), and with it what our combine needs."""

    step: _Step

    @property
    def parallel(self) -> Any:
        """What the dispatch was carried out by."""
        return self.step.parallel

    @property
    def gpu(self) -> int | None:
        """The GPU that it is of."""
        return self.step.gpu


class _Step:
    """One dispatch on its way to its combine."""

    def __init__(self, parallel: Any, topk_idx: Tensor, gpu: int | None) -> None:
        self.parallel = parallel
        self.topk_idx = topk_idx.detach().clone()  # the caller may change his
        self.gpu = gpu
        self.work: Work
        self.inner: Any = None

    def received(self) -> Any:
        """Return the handle that combine needs, once the rows are here."""
        self.work.finish()
        return self.inner


class LowLatency:
    """The operations that a buffer has with low_latency_mode=True."""

    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    _instances: Instances
    _memory: Reuse
    _next_buffers: dict[tuple[torch.device, tuple[int, ...]], Tensor]

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send rows to their experts. Rows lie by expert, then source, then token.

        With return_recv_hook or async_finish the call returns at once, and x and topk_idx may be changed; the results
        are there once the hook was called, or the event waited for.

        The wait stats, int64 [ranks], count nanoseconds that we waited for each rank (DeepEP: cycles).

        Raises:
            RangeError: more tokens than num_max_dispatch_tokens_per_rank.
            ConfigError: dtypes or options that do not go together.
            PeerLost: a rank is lost, and the buffer was made without enable_shrink.
        """
        self._check_mode(async_finish, return_recv_hook)
        most, world = num_max_dispatch_tokens_per_rank, self.group_size
        form = _form(x, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
        parallel = self._parallel(num_experts, x.shape[1], topk_idx.shape[1], most)
        number = cuda_device.gpu_of(x)
        step = _Step(parallel, topk_idx, number)
        if number is not None:
            made = gpu.Given(x, step.topk_idx, form, num_experts // world, round_scale)
            spent = gpu.Waited.of(dispatch_wait_recv_cost_stats, world)
            found = step.inner = made.dispatch(self._instances, parallel, number, spent)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(found.counts)
            handle = LowLatencyHandle((found.src_info, found.layout_range, most, x.shape[1], num_experts))
            handle.step = step
            event, hook = gpu.left(number, async_finish, return_recv_hook)
            return ((found.x, found.scales) if use_fp8 else found.x), found.counts, handle, event, hook
        packed = Packed.empty(
            form, self._memory, experts=num_experts // world, places=most * world, hidden=x.shape[1], world=world
        )
        waited = torch.zeros(world, dtype=torch.float64)
        rows = quantise(x, round_scale=round_scale) if use_fp8 else _kept(x, async_finish or return_recv_hook)
        pending = parallel.dispatch(
            rows, step.topk_idx, layout="slots", weights_at="source", async_=True, waited=waited
        )  # fmt: skip

        def receive() -> None:
            arrived = self._instances.done(parallel, pending.wait)
            step.inner = pack(arrived, packed, parallel.agent.native)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(packed.counts)
            if dispatch_wait_recv_cost_stats is not None:
                dispatch_wait_recv_cost_stats.add_((waited * NANOSECONDS).long())

        step.work = Work(receive)
        event, hook = _leave(step.work, async_finish, return_recv_hook)
        handle = LowLatencyHandle((packed.src_info, packed.layout_range, most, x.shape[1], num_experts))
        handle.step = step
        return ((packed.x, packed.scales) if use_fp8 else packed.x), packed.counts, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Bring the experts' rows back and sum them with their weights, in the order of k in float32, rounded once.

        A pair whose id is -1 in `topk_idx` is left out, as are those of ranks that are masked or lost.

        Raises:
            ConfigError: the handle, or a tensor, is of another buffer, of another dispatch, or elsewhere.
        """
        self._check_mode(async_finish, return_recv_hook)
        number = cuda_device.gpu_of(x)
        check_own(handle, LowLatencyHandle, self._instances, number)
        step, shape = handle.step, (*handle[0].shape, handle[3])
        if zero_copy:
            x = self.get_next_low_latency_combine_buffer(handle)
        if x.shape != shape:
            raise ConfigError(f"x is {list(x.shape)}", hint=f"give {list(shape)}, as dispatch returned it")
        check_place(topk_idx, "topk_idx", number)
        check_place(topk_weights, "topk_weights", number)
        if number is not None:
            cuda_device.gpu(number).use([step.topk_idx])  # the dispatch may have been on another stream
            given = gpu.weights_of(topk_idx, topk_weights, step.topk_idx)
            spent = gpu.Waited.of(combine_wait_recv_cost_stats, self.group_size)
            rows, inner = step.inner.given_back(x.detach().reshape(-1, handle[3]), given)
            made = self._instances.done(
                step.parallel, lambda: step.parallel.combine(rows, inner, out=out, stats=spent.seconds)
            )
            spent.add()
            event, hook = gpu.left(number, async_finish, return_recv_hook)
            return made if out is None else out, event, hook
        weights = _weights(topk_idx, topk_weights, step.topk_idx)
        inner = dataclasses.replace(step.received(), weights=weights)
        rows = x.detach().reshape(-1, handle[3])
        total = torch.empty((len(topk_idx), handle[3]), dtype=x.dtype) if out is None else out
        waited = torch.zeros(self.group_size, dtype=torch.float64)
        pending = step.parallel.combine(rows, inner, out=total, async_=True, stats=waited)

        def receive() -> None:
            self._instances.done(step.parallel, pending.wait)
            if combine_wait_recv_cost_stats is not None:
                combine_wait_recv_cost_stats.add_((waited * NANOSECONDS).long())

        event, hook = _leave(Work(receive), async_finish, return_recv_hook)
        return total, event, hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Return the tensor to fill for a combine with zero_copy=True; the next one of its shape uses it again."""
        key = handle[0].device, (*handle[0].shape, handle[3])
        if key not in self._next_buffers:
            self._next_buffers[key] = torch.empty(key[1], dtype=torch.bfloat16, device=key[0])
        return self._next_buffers[key]

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Do nothing: there is nothing to clean, since rows are found by what their lines say."""
        self._check_mode(False, False)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out (mask=True), or let it take part again. The other ranks hear of it with the next step.

        A rank that was left out raises `Masked`; it calls this with its own rank to come back, while the others, which
        have unmasked it, go on with their steps.
        """
        self._check_shrink()
        if not 0 <= rank_to_mask < self.group_size:
            raise RangeError(f"there is no rank {rank_to_mask}", hint=f"ranks are 0..{self.group_size - 1}")
        if mask:
            self._instances.mask(rank_to_mask)
        else:
            self._instances.unmask(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write into an int32 tensor [ranks]: 1 for ranks that were masked or lost, else 0.

        The host waits for the steps that are on a GPU.
        """
        self._check_shrink()
        if mask_status.shape != (self.group_size,) or mask_status.dtype != torch.int32:
            raise ConfigError(
                f"mask_status is {mask_status.dtype} {list(mask_status.shape)}", hint=f"give int32 [{self.group_size}]"
            )
        self._instances.settle()
        mask_status.zero_()
        mask_status[list(self._instances.masked)] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Let every rank take part again."""
        self._check_shrink()
        self._instances.settle()
        for rank in self._instances.masked:
            self._instances.unmask(rank)

    # Within

    def _parallel(self, experts: int, hidden: int, topk: int, tokens: int) -> Any:
        local_experts(experts, self.group_size)
        return self._instances.get(Shape(experts, hidden, topk), tokens)

    def _check_mode(self, is_async: bool, has_hook: bool) -> None:
        if not self.low_latency_mode:
            raise ConfigError("this buffer has no low-latency mode", hint="make it with low_latency_mode=True")
        if is_async and has_hook:
            raise ConfigError("async_finish and return_recv_hook exclude each other", hint="set one of them")

    def _check_shrink(self) -> None:
        if not self.enable_shrink:
            raise ConfigError("this buffer masks no ranks", hint="make it with enable_shrink=True")


def _form(x: Tensor, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Form:
    if x.dim() != 2 or not x.dtype.is_floating_point or x.element_size() == 1:
        raise ConfigError(f"x is {x.dtype} {list(x.shape)}", hint="give bfloat16 [tokens, hidden]; use_fp8 casts it")
    if use_ue8m0 and not (use_fp8 and round_scale):
        raise ConfigError("use_ue8m0 needs scales that are powers of 2", hint="set use_fp8 and round_scale too")
    if not use_fp8:
        return Form(x.dtype)
    step = 4 * BLOCK if use_ue8m0 else BLOCK
    if x.shape[1] % step:
        raise ConfigError(f"rows of {x.shape[1]} columns cannot be cast so", hint=f"give multiples of {step}")
    return Form(torch.float8_e4m3fn, x.shape[1] // step, torch.int32 if use_ue8m0 else torch.float32)


def _leave(work: Work, is_async: bool, has_hook: bool) -> tuple[EventOverlap, Hook | None]:
    if has_hook:
        return EventOverlap(), work.finish
    if is_async:
        return EventOverlap(EventHandle(work)), None
    work.finish()
    return EventOverlap(), None


def _kept(x: Tensor, goes_on: bool) -> Tensor:
    """Return rows that the caller does not change meanwhile."""
    return x.detach().clone() if goes_on else x.detach()


def _weights(topk_idx: Tensor, topk_weights: Tensor, dispatched: Tensor) -> Any:
    """Return the weights of a combine; those of pairs that the caller has taken out since are 0."""
    is_out = topk_idx != dispatched if topk_idx.shape == dispatched.shape else None
    if is_out is None or topk_weights.shape != dispatched.shape or bool((topk_idx[is_out] != -1).any()):
        raise ConfigError(
            "topk_idx or topk_weights are not those of the dispatch",
            hint="give the same ids, or -1 to leave a pair out",
        )
    return topk_weights.detach().float().masked_fill(is_out, 0).contiguous().numpy()

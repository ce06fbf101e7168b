"""What ranks call of buffers of DeepEP's kind, wherever their tensors are, and whether results are alike."""

from __future__ import annotations

from typing import Any

import torch
from deep_ep_tools import Case, same
from torch import Tensor

from raynixl.compat.deep_ep import Buffer, ElasticBuffer, EventHandle, EventOverlap
from raynixl.compat.deep_ep.utils import per_token_cast_to_fp8

WORLD, MOST = 3, 40


def case_of(**options: Any) -> Case:
    return Case(WORLD, **{"tokens": 33, "hidden": 256, "topk": 3, "experts": 3 * WORLD, "missing": 0.2, **options})


def alike(one: Any, other: Any, what: str = "result") -> None:
    """Fail unless two results have the same form and the same bits."""
    assert type(one) is type(other), what
    if isinstance(one, Tensor):
        assert same(one, other), f"{what}: {one} {other}"
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), what
        for number, pair in enumerate(zip(one, other, strict=True)):
            alike(*pair, f"{what}[{number}]")
    else:
        assert one == other, what


def spread_out(rows: Tensor) -> Tensor:
    """The same rows, with others' items between theirs."""
    return torch.stack([rows, rows], 2)[:, :, 0]


def normal(case: Case, rank: int, buffer: Buffer, form: str, worst: int, *, is_async: bool = False) -> list[Any]:
    """All that the normal mode returns: rows, handle, sums, weights, rows by the handle."""
    x: Any = case.x(rank)
    if form == "fp8":
        x = per_token_cast_to_fp8(x)
    layout = case.layout(buffer, rank)
    ids, weights = case.topk_idx(rank), case.topk_weights(rank)
    if form == "strided":
        x, ids, weights = spread_out(x), spread_out(ids), spread_out(weights)
    more = {"async_finish": is_async, "previous_event": buffer.capture() if is_async else None}
    rows, recv_ids, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_worst_tokens=worst, expert_alignment=4, **layout, **more
    )
    if is_async:
        event.current_stream_wait()
    ids.fill_(-1)
    y = case.x(rank).new_zeros((len(recv_ids), case.hidden))
    y[:] = (rows[0].float() if form == "fp8" else rows) * (rank + 1)
    y = spread_out(y) if form == "strided" else y
    biases = (y.new_full((case.count(rank), case.hidden), 0.375), case.x(rank) * 3)
    total, none, event = buffer.combine(y, handle, bias=biases, **more)
    if is_async:
        event.current_stream_wait()
    again, *_ = buffer.dispatch(case.x(rank) * 2, handle=handle)
    summed, back, _ = buffer.combine(again, handle, topk_weights=recv_weights)
    return [rows, recv_ids, recv_weights, counts, tuple(handle), total, none, again, summed, back]


def elastic(case: Case, rank: int, buffer: ElasticBuffer, form: str, *, expands: bool, waits: bool) -> list[Any]:
    """All that V2 returns: rows, the handle's fields, sums, weights, rows by the handle."""
    x: Any = per_token_cast_to_fp8(case.x(rank)) if form == "fp8" else case.x(rank)
    stats = case.topk_idx(rank).new_ones(case.each, dtype=torch.int32)
    rows, ids, weights, handle, event = buffer.dispatch(
        x, case.topk_idx(rank), case.topk_weights(rank), stats, num_experts=case.experts, expert_alignment=8,
        do_expand=expands, do_cpu_sync=waits, use_tma_aligned_col_major_sf=form == "fp8",
        async_with_compute_stream=True,
    )  # fmt: skip
    event.current_stream_wait()
    y = case.x(rank).new_zeros((handle.allocated, case.hidden))
    y[:] = (rows[0].float() if form == "fp8" else rows) * (rank + 1)
    biases = (y.new_full((case.count(rank), case.hidden), 0.375), case.x(rank) * 3)
    reduces = buffer.allow_multiple_reduction or not expands
    summed, back, _ = buffer.combine(y, handle, topk_weights=weights if reduces else None, bias=biases)
    again, _, ws, _, _ = buffer.dispatch(
        case.x(rank) * 2, topk_weights=case.topk_weights(rank) + 1, handle=handle, do_expand=expands
    )
    return [
        rows, ids, weights, stats, summed, back, again, ws, handle.num_recv_tokens, handle.num_expanded_tokens,
        handle.num_recv_tokens_per_expert_list, handle.psum_num_recv_tokens_per_scaleup_rank,
        handle.psum_num_recv_tokens_per_expert, handle.num_unaligned_recv_tokens_per_expert,
        handle.recv_src_metadata, handle.dst_buffer_slot_idx, handle.topk_idx,
    ]  # fmt: skip


def steps(case: Case, rank: int, buffer: Buffer, *, worst: int = 0) -> Tensor:
    """A step of the normal mode; the sums."""
    rows, _, weights, _, handle, _ = buffer.dispatch(
        case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), num_worst_tokens=worst,
        **case.layout(buffer, rank),
    )  # fmt: skip
    return buffer.combine(rows, handle, topk_weights=weights)[0]


class Sent(torch.autograd.Function):
    """Dispatch with gradients, as trainers wrap it: backward is a combine by the handle."""

    @staticmethod
    def forward(ctx, x, weights, ids, buffer, layout):
        rows, recv_ids, recv_weights, _, handle, event = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, previous_event=EventOverlap(EventHandle()), async_finish=True,
            allocate_on_comm_stream=True, **layout,
        )  # fmt: skip
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(recv_ids)
        layout["handle"] = handle
        return rows, recv_weights, recv_ids

    @staticmethod
    def backward(ctx, rows, weights, _):
        grad, back, event = ctx.buffer.combine(
            rows.contiguous(), ctx.handle, topk_weights=weights.float(), previous_event=EventOverlap(EventHandle()),
            async_finish=True, allocate_on_comm_stream=True,
        )  # fmt: skip
        event.current_stream_wait()
        return grad, back, None, None, None


class Brought(torch.autograd.Function):
    """Combine with gradients: backward is a dispatch by the handle."""

    @staticmethod
    def forward(ctx, y, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        total, _, event = buffer.combine(y, handle, async_finish=True)
        event.current_stream_wait()
        return total

    @staticmethod
    def backward(ctx, grad):
        rows, *_, event = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle, async_finish=True)
        event.current_stream_wait()
        return rows, None, None


def train(case: Case, rank: int, buffer: Buffer, worst: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step of a layer whose experts multiply by numbers of their own: the sums, gradients of rows and of weights."""
    x = case.x(rank).requires_grad_()
    weights = case.topk_weights(rank).requires_grad_()
    layout = {**case.layout(buffer, rank), "num_worst_tokens": worst}
    rows, ws, ids = Sent.apply(x, weights, case.topk_idx(rank), buffer, layout)
    factors = torch.where(ids >= 0, ws * (ids + 1 + rank), 0).sum(1, keepdim=True)
    out = Brought.apply((rows.float() * factors).bfloat16(), buffer, layout["handle"])
    out.float().square().sum().backward()
    return out.detach(), x.grad, weights.grad

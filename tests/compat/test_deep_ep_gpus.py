"""Tensors on GPUs that are made up: the bits of the same calls in memory of the host, which waits where it must."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deep_ep_tools import Case, bits, ranks, same
from moe_cuda import StandInGpu
from moe_cuda_crews import BACKENDS, GpuCrew, gpu_crew
from torch.overrides import TorchFunctionMode

from raynixl import ConfigError, PeerLost, RangeError
from raynixl.compat.deep_ep import Buffer, ElasticBuffer, EventHandle, EventOverlap
from raynixl.compat.deep_ep.utils import per_token_cast_to_fp8
from raynixl.errors import Masked
from raynixl.moe.cuda_layer import GpuLayer

WORLD, MOST = 3, 40
WAITS = (
    "__int__", "__float__", "__bool__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero", "bincount", "equal",
    "masked_select", "unique", "allclose",
)  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "staged"])
def crew(request: pytest.FixtureRequest) -> Iterator[GpuCrew]:
    """Ranks whose kernels reach each other's memory, or which go through memory of the host."""
    backends = BACKENDS if request.param else BACKENDS[:2]
    with gpu_crew(WORLD, is_everywhere=False, backends=backends) as made:
        yield made


@pytest.fixture(scope="module")
def kernels() -> Iterator[GpuCrew]:
    """Ranks whose kernels reach each other's memory."""
    with gpu_crew(WORLD, is_everywhere=False) as made:
        yield made


def case_of(**options: Any) -> Case:
    return Case(WORLD, **{"tokens": 33, "hidden": 256, "topk": 3, "experts": 3 * WORLD, "missing": 0.2, **options})


def alike(one: Any, other: Any, what: str = "result") -> None:
    """Fail unless two results have the same form and the same bits."""
    assert type(one) is type(other), what
    if isinstance(one, torch.Tensor):
        assert same(one, other), f"{what}: {one} {other}"
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), what
        for number, pair in enumerate(zip(one, other, strict=True)):
            alike(*pair, f"{what}[{number}]")
    else:
        assert one == other, what


class NoHost(TorchFunctionMode):
    """Fails what would have the host wait for a GPU, by its name in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert name not in WAITS, f"{name} waits for the GPU"
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = indices if isinstance(indices, tuple) else (indices,)
        assert not any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices), "a mask as index"
        is_open = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        assert not is_open, "repeat_interleave waits for the GPU"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing in here waits for a GPU, nor for what kernels tell."""

    def waits(*_: Any) -> None:
        raise AssertionError("the host waits")

    with monkeypatch.context() as patched:
        patched.setattr(GpuLayer, "wait_ticket", waits)
        patched.setattr(StandInGpu, "fetch", waits)
        yield


def normal(case: Case, rank: int, buffer: Buffer, form: str, worst: int, *, is_async: bool = False) -> list[Any]:
    """All that the normal mode returns: rows, handle, sums, weights, rows by the handle."""
    x: Any = case.x(rank)
    if form == "fp8":
        x = per_token_cast_to_fp8(x)
    elif form == "strided":
        x = torch.cat([x, x], 1)[:, : case.hidden]
    layout = case.layout(buffer, rank)
    ids, weights = case.topk_idx(rank), case.topk_weights(rank)
    more = {"async_finish": is_async, "previous_event": buffer.capture() if is_async else None}
    rows, recv_ids, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_worst_tokens=worst, expert_alignment=4, **layout, **more
    )
    if is_async:
        event.current_stream_wait()
    ids.fill_(-1)
    y = case.x(rank).new_zeros((len(recv_ids), case.hidden))
    y[:] = (rows[0].float() if form == "fp8" else rows) * (rank + 1)
    biases = (torch.full((case.count(rank), case.hidden), 0.375, dtype=y.dtype), case.x(rank) * 3)
    total, none, event = buffer.combine(y, handle, bias=biases, **more)
    if is_async:
        event.current_stream_wait()
    again, *_ = buffer.dispatch(case.x(rank) * 2, handle=handle)
    summed, back, _ = buffer.combine(again, handle, topk_weights=recv_weights)
    return [rows, recv_ids, recv_weights, counts, tuple(handle), total, none, again, summed, back]


@pytest.mark.parametrize(("form", "is_async"), [("bf16", True), ("fp8", False), ("strided", False)])
def test_the_normal_mode_has_the_bits_of_the_host(crew, form, is_async):
    with ranks(crew) as there, ranks(crew) as here:
        for tokens, worst in ((33, 0), (33, 99), (5, 0), (5, 99)):  # with 5 tokens the last rank has none

            def work(rank, buffer, tokens=tokens, worst=worst):
                return normal(case_of(tokens=tokens), rank, buffer, form, worst, is_async=is_async)

            def on_host(rank, buffer, work=work):
                with crew.gpus.on_host():
                    return work(rank, buffer)

            alike(there.run(work), here.run(on_host))


def elastic(case: Case, rank: int, buffer: ElasticBuffer, form: str, *, expands: bool, waits: bool) -> list[Any]:
    """All that V2 returns: rows, the handle's fields, sums, weights, rows by the handle."""
    x: Any = per_token_cast_to_fp8(case.x(rank)) if form == "fp8" else case.x(rank)
    stats = torch.ones(case.each, dtype=torch.int32)
    rows, ids, weights, handle, event = buffer.dispatch(
        x, case.topk_idx(rank), case.topk_weights(rank), stats, num_experts=case.experts, expert_alignment=8,
        do_expand=expands, do_cpu_sync=waits, use_tma_aligned_col_major_sf=form == "fp8",
        async_with_compute_stream=True,
    )  # fmt: skip
    event.current_stream_wait()
    y = case.x(rank).new_zeros((handle.allocated, case.hidden))
    y[:] = (rows[0].float() if form == "fp8" else rows) * (rank + 1)
    biases = (torch.full((case.count(rank), case.hidden), 0.375, dtype=y.dtype), case.x(rank) * 3)
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


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("reduces", [True, False], ids=["by rank", "at the source"])
def test_v2_has_the_bits_of_the_host(crew, form, reduces):
    options = {"num_max_tokens_per_rank": MOST, "hidden": 256, "allow_multiple_reduction": reduces}
    with ranks(crew, ElasticBuffer, **options) as there, ranks(crew, ElasticBuffer, **options) as here:
        for expands, waits, tokens in itertools.product((False, True), (True, False), (33, 5)):

            def work(rank, buffer, tokens=tokens, expands=expands, waits=waits):
                return elastic(case_of(tokens=tokens), rank, buffer, form, expands=expands, waits=waits)

            def on_host(rank, buffer, work=work):
                with crew.gpus.on_host():
                    return work(rank, buffer)

            alike(there.run(work), here.run(on_host))


def test_buffers_go_the_way_that_they_are_meant_to(crew):
    case = case_of()
    with ranks(crew) as group:
        group.run(lambda rank, buffer: normal(case, rank, buffer, "bf16", 0))
        ways = {made.is_direct for buffer in group.buffers for made in buffer._instances._made.values()}
        assert ways == {"nvlink" in crew.agents[0].config.backends}


@pytest.mark.parametrize("kind", ["normal", "plain", "expanded"])
def test_where_the_worst_case_is_known_no_host_waits(kernels, kind, monkeypatch):
    case = case_of()

    def step(rank, buffer, ids, weights, x):
        if kind == "normal":
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.experts)
            rows, _, ws, _, handle, _ = buffer.dispatch(
                x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert, num_worst_tokens=WORLD * case.tokens,
            )  # fmt: skip
            again, *_ = buffer.dispatch(x, handle=handle)
        else:
            rows, _, ws, handle, _ = buffer.dispatch(
                x, ids, weights, num_experts=case.experts, do_cpu_sync=False, do_expand=kind == "expanded"
            )
            again, *_ = buffer.dispatch(x, handle=handle, do_expand=kind == "expanded")
        return rows, again, *buffer.combine(rows, handle, topk_weights=ws)[:2]

    def work(rank, buffer, guarded):
        given = (case.topk_idx(rank), case.topk_weights(rank), case.x(rank))
        with NoHost() if guarded else contextlib.nullcontext():
            return step(rank, buffer, *given)

    options = {} if kind == "normal" else {"num_max_tokens_per_rank": MOST, "hidden": case.hidden}
    with ranks(kernels, Buffer if kind == "normal" else ElasticBuffer, **options) as group:
        first = group.run(lambda rank, buffer: work(rank, buffer, False))
        with no_host(monkeypatch):
            found = group.run(lambda rank, buffer: work(rank, buffer, True))
        alike(found, first)
        for rank, (rows, again, _, back) in enumerate(found):
            assert torch.equal(bits(rows), bits(again))
            assert same(back, case.topk_weights(rank).masked_fill(case.topk_idx(rank) < 0, 0))


def steps(case, rank, buffer, *, worst=0):
    """A step of the normal mode; the sums."""
    rows, _, weights, _, handle, _ = buffer.dispatch(
        case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), num_worst_tokens=worst,
        **case.layout(buffer, rank),
    )  # fmt: skip
    return buffer.combine(rows, handle, topk_weights=weights)[0]


def errors_of(group, work):
    """The error of each rank, or None."""

    def attempt(rank, buffer):
        try:
            work(rank, buffer)
        except Exception as error:  # noqa: BLE001 - it is the result
            return error
        return None

    return group.run(attempt)


@pytest.mark.parametrize("worst", [0, 99])
def test_a_rank_that_does_not_come_is_named_and_hears_of_it(kernels, worst):
    case = case_of()
    with ranks(kernels, deadline=1.0) as group:
        group.run(lambda rank, buffer: steps(case, rank, buffer, worst=worst))

        def without(rank, buffer):
            if rank != 2:
                steps(case, rank, buffer, worst=worst)
                steps(case, rank, buffer, worst=worst)

        found = errors_of(group, without)
        assert [type(error) for error in found] == [PeerLost, PeerLost, type(None)]
        assert all("ranks [2] (rank2) are lost" in str(error) for error in found[:2])

        def late(rank, buffer):
            if rank == 2:
                steps(case, rank, buffer, worst=worst)
                steps(case, rank, buffer, worst=worst)

        assert [type(error) for error in errors_of(group, late)] == [type(None), type(None), Masked]


@pytest.mark.parametrize("worst", [0, 99])
def test_with_enable_shrink_the_others_go_on(kernels, worst):
    case = case_of()
    with ranks(kernels, deadline=1.0, low_latency_mode=True, enable_shrink=True) as group:
        group.run(lambda rank, buffer: steps(case, rank, buffer, worst=worst))

        def without(rank, buffer):
            if rank == 2:
                return None
            steps(case, rank, buffer, worst=worst)
            out = steps(case, rank, buffer, worst=worst)
            status = torch.zeros(WORLD, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(status)
            return out, status.tolist()

        for rank, (out, status) in enumerate(group.run(without)[:2]):
            times = sum(case.is_in_rank(rank, other).float() for other in (0, 1)).unsqueeze(1)
            assert torch.equal(out, (case.x(rank).float() * times).bfloat16())
            assert status == [0, 0, 1]


def test_wrong_ids_are_refused_on_all_ranks(kernels):
    case = case_of()

    def work(rank, buffer, wrong, worst=0):
        ids = case.topk_idx(rank) + (case.experts if rank == 1 and wrong else 0)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.experts)
        buffer.dispatch(
            case.x(rank), topk_idx=ids, topk_weights=case.topk_weights(rank), num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, num_worst_tokens=worst,
        )  # fmt: skip

    with ranks(kernels) as group:
        found = errors_of(group, lambda rank, buffer: work(rank, buffer, True))
        assert [type(error) for error in found] == [RangeError] * WORLD
        group.run(lambda rank, buffer: work(rank, buffer, False))
        group.run(lambda rank, buffer: work(rank, buffer, True, 99))  # nobody has heard of it yet
        found = errors_of(group, lambda rank, buffer: work(rank, buffer, False, 99))
        assert [type(error) for error in found] == [RangeError] * WORLD
        group.run(lambda rank, buffer: steps(case, rank, buffer, worst=99))


def test_more_rows_than_the_worst_case_are_refused_and_write_nowhere_else(kernels):
    case = case_of(missing=0.0)
    with ranks(kernels) as group:
        found = errors_of(group, lambda rank, buffer: steps(case, rank, buffer, worst=12))
        assert found == [None] * WORLD
        found = errors_of(group, lambda rank, buffer: steps(case, rank, buffer, worst=12))
        assert all(isinstance(error, ConfigError) for error in found)
        group.run(lambda rank, buffer: steps(case, rank, buffer, worst=99))


def test_more_tokens_than_were_agreed_on_are_refused(kernels):
    few, many = case_of(tokens=30), case_of(tokens=400)
    with ranks(kernels) as group:
        group.run(lambda rank, buffer: steps(few, rank, buffer, worst=99))
        found = errors_of(group, lambda rank, buffer: steps(many, rank, buffer, worst=99))
        assert [type(error) for error in found] == [RangeError] * WORLD
        group.run(lambda rank, buffer: steps(many, rank, buffer, worst=1200))
        group.run(lambda rank, buffer: steps(many, rank, buffer))


def test_handles_of_other_buffers_and_of_other_memory_are_refused(kernels):
    case = case_of()

    def sent(rank, buffer):
        return buffer.dispatch(
            case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank),
            **case.layout(buffer, rank),
        )  # fmt: skip

    options = {"num_max_tokens_per_rank": MOST, "hidden": case.hidden}
    with ranks(kernels) as one, ranks(kernels) as two, ranks(kernels, ElasticBuffer, **options) as elastic:

        def work(rank, buffer):
            rows, *_, handle, _ = sent(rank, buffer)
            for call in (two.buffers[rank].combine, two.buffers[rank].dispatch):
                with pytest.raises(ConfigError, match="another buffer"):
                    call(rows, handle=handle)
            with pytest.raises(ConfigError, match="no handle"):
                elastic.buffers[rank].combine(rows, handle)
            with kernels.gpus.on_host():
                for call in (buffer.combine, buffer.dispatch):
                    with pytest.raises(ConfigError, match="rows in GPU 0, these are in memory of the host"):
                        call(rows, handle=handle)
                *_, host, _ = sent(rank, two.buffers[rank])
            with pytest.raises(ConfigError, match="rows in memory of the host, these are in GPU 0"):
                two.buffers[rank].combine(rows, host)
            return buffer.combine(rows, handle)[0]

        outs = one.run(work)
    assert all(len(out) == case.count(rank) for rank, out in enumerate(outs))


def test_ranks_that_give_tensors_elsewhere_are_told(kernels):
    case = case_of()

    def work(rank, buffer):
        if rank != 1:
            return steps(case, rank, buffer)
        with kernels.gpus.on_host():
            return steps(case, rank, buffer)

    with ranks(kernels) as group:
        found = errors_of(group, work)
        assert [type(error) for error in found] == [ConfigError] * WORLD


def test_a_layout_elsewhere_is_refused(kernels):
    case = case_of()
    with ranks(kernels) as group:

        def work(rank, buffer):
            layout = case.layout(buffer, rank)
            kernels.gpus.at_host.append(layout["is_token_in_rank"])
            try:
                with pytest.raises(ConfigError, match="topk_idx on cuda:0"):
                    buffer.dispatch(
                        case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), **layout
                    )
            finally:
                kernels.gpus.at_host.clear()

        work_on_one = [lambda: work(0, group.buffers[0])]
        kernels.run(work_on_one)


def test_what_was_waited_for_each_rank_is_counted(crew):
    case = case_of()
    is_there = threading.Event()

    def work(rank, buffer):
        for turn in range(2):
            sent, back = torch.full((WORLD,), 5), torch.full((WORLD,), 5)
            if rank == 2 and turn:
                assert is_there.wait(20)
                threading.Event().wait(0.05)  # what the others wait for
            elif turn:
                is_there.set()
            packed, _, handle, _, _ = buffer.low_latency_dispatch(
                case.x(rank), case.topk_idx(rank), MOST, case.experts, use_fp8=False,
                dispatch_wait_recv_cost_stats=sent,
            )  # fmt: skip
            buffer.low_latency_combine(
                packed, case.topk_idx(rank), case.topk_weights(rank), handle, combine_wait_recv_cost_stats=back
            )
        assert sent[rank] == back[rank] == 5
        assert bool((sent >= 5).all())
        assert bool((back >= 5).all())
        assert rank == 2 or int(sent[2]) > 10_000_000

    with ranks(crew, low_latency_mode=True) as group:
        group.run(work)


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


@pytest.mark.parametrize("worst", [0, 99])
def test_gradients_through_what_callers_wrap_are_those_of_the_host(crew, worst):
    case = case_of(missing=0.0, tokens=20)

    def train(rank, buffer):
        x = case.x(rank).requires_grad_()
        weights = case.topk_weights(rank).requires_grad_()
        layout = {**case.layout(buffer, rank), "num_worst_tokens": worst}
        rows, ws, ids = Sent.apply(x, weights, case.topk_idx(rank), buffer, layout)
        factors = torch.where(ids >= 0, ws * (ids + 1 + rank), 0).sum(1, keepdim=True)
        out = Brought.apply((rows.float() * factors).bfloat16(), buffer, layout["handle"])
        out.float().square().sum().backward()
        return out.detach(), x.grad, weights.grad

    def on_host(rank, buffer):
        with crew.gpus.on_host():
            return train(rank, buffer)

    with ranks(crew) as there, ranks(crew) as here:
        found, wanted = there.run(train), here.run(on_host)
    alike(found, wanted)
    for rank, (out, x_grad, weights_grad) in enumerate(found):
        x, ids = case.x(rank).float().requires_grad_(), case.topk_idx(rank)
        weights = case.topk_weights(rank).requires_grad_()
        terms = weights * (ids % case.each + 1 + ids // case.each)
        (x * terms.sum(1, keepdim=True)).square().sum().backward()
        torch.testing.assert_close(out.float(), (x * terms.sum(1, keepdim=True)).detach(), atol=0.2, rtol=0.05)
        torch.testing.assert_close(weights_grad, weights.grad, atol=2e2, rtol=0.05)
        torch.testing.assert_close(x_grad.float(), x.grad, atol=4.0, rtol=0.1)


@pytest.mark.parametrize("kind", ["normal", "plain", "expanded", "cached"])
def test_steps_are_captured_in_a_graph(kernels, kind, monkeypatch):
    """What kernels do is replayed; that of torch between them is done at once here, by the rules of a capture."""
    case = case_of()
    options = {} if kind in ("normal", "cached") else {"num_max_tokens_per_rank": MOST, "hidden": case.hidden}
    work, empty = kernels.gpus.fake.work, StandInGpu.empty
    kept = []  # what a capture has made is the graph's, whoever else lets go of it

    def keep(*arguments):
        kept.append(empty(*arguments))
        return kept[-1]

    monkeypatch.setattr(StandInGpu, "empty", keep)

    def run(rank, buffer):
        given = (case.x(rank), case.topk_idx(rank), case.topk_weights(rank))
        stream = kernels.gpus.stream()
        layout = case.layout(buffer, rank) if not options else {}

        def step(handle=None):
            x, ids, weights = given
            if handle is not None:
                rows, *_ = buffer.dispatch(x, handle=handle)
            elif options:
                rows, _, _, handle, _ = buffer.dispatch(
                    x, ids, weights, num_experts=case.experts, do_cpu_sync=False, do_expand=kind == "expanded"
                )
            else:
                rows, *_, handle, _ = buffer.dispatch(
                    x, topk_idx=ids, topk_weights=weights, num_worst_tokens=99 if kind == "normal" else 0, **layout
                )
            return rows, handle, buffer.combine(rows, handle)[0]

        _, first, out = step()
        work.begin_capture(stream)
        with NoHost():
            rows, handle, captured = step(first if kind == "cached" else None)
        graph = work.end_capture(stream)
        graph.launch()
        kernels.gpus.settle()
        assert len(rows) == (handle.padded if not options else handle.allocated)
        if kind == "cached":
            assert same(rows, case.received(rank, case.x))
            assert same(captured, out)
        again = step(first) if kind == "cached" else step()
        assert same(again[2], out)
        return graph, again

    with ranks(kernels, ElasticBuffer if options else Buffer, **options) as group:
        assert len(group.run(run)) == WORLD

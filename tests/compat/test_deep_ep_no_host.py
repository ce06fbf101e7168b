"""Where the worst case is known on a GPU no host waits, and steps go into CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deep_ep_calls import MOST, WORLD, alike, case_of
from deep_ep_tools import bits, ranks, same
from moe_cuda import StandInGpu
from torch.overrides import TorchFunctionMode

from raynixl.compat.deep_ep import Buffer, ElasticBuffer
from raynixl.moe.cuda_layer import GpuLayer

WAITS = (
    "__int__", "__float__", "__bool__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero", "bincount", "equal",
    "masked_select", "unique", "allclose",
)  # fmt: skip


class NoHost(TorchFunctionMode):
    """Fails what would have the host wait for a GPU, by its name in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert name not in WAITS, f"{name} waits for the GPU"
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = indices if isinstance(indices, tuple) else (indices,)
        assert not any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices), "a mask as index"
        moves = name == "to" and any(isinstance(one, torch.device) for one in (*args, *(kwargs or {}).values()))
        assert not moves, "a copy from memory of the host waits for the GPU"
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


@pytest.mark.parametrize(
    "options",
    [{"use_fp8": False}, {"use_fp8": True}, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}],
    ids=["bf16", "fp8", "ue8m0"],
)
def test_no_host_waits_in_the_low_latency_mode(kernels, options, monkeypatch):
    case = case_of(hidden=512)

    def step(rank, buffer, ids, weights, x):
        stats = [ids.new_zeros(WORLD) for _ in range(2)]
        packed, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, ids, MOST, case.experts, dispatch_wait_recv_cost_stats=stats[0], **options
        )
        y = packed[0].float().bfloat16() if options["use_fp8"] else packed
        total, _, _ = buffer.low_latency_combine(y, ids, weights, handle, combine_wait_recv_cost_stats=stats[1])
        return counts, handle[1], total

    def work(rank, buffer, guarded):
        given = (case.topk_idx(rank), case.topk_weights(rank), case.x(rank))
        with NoHost() if guarded else contextlib.nullcontext():
            return step(rank, buffer, *given)

    with ranks(kernels, low_latency_mode=True) as group:
        first = group.run(lambda rank, buffer: work(rank, buffer, False))
        with no_host(monkeypatch):
            found = group.run(lambda rank, buffer: work(rank, buffer, True))
        alike(found, first)


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

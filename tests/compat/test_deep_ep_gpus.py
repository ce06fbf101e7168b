"""Tensors on GPUs that are made up: the bits of the same calls in memory of the host, with kernels and without."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from deep_ep_calls import MOST, WORLD, alike, case_of, elastic, normal, train
from deep_ep_tools import ranks
from moe_cuda_crews import BACKENDS, GpuCrew, gpu_crew

from raynixl.compat.deep_ep import ElasticBuffer


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "staged"])
def crew(request: pytest.FixtureRequest) -> Iterator[GpuCrew]:
    """Ranks whose kernels reach each other's memory, or which go through memory of the host."""
    backends = BACKENDS if request.param else BACKENDS[:2]
    with gpu_crew(WORLD, is_everywhere=False, backends=backends) as made:
        yield made


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


def test_what_was_waited_for_each_rank_is_counted(crew):
    case, last = case_of(), WORLD - 1
    everybody, found = threading.Barrier(WORLD), [0] * WORLD

    def work(rank, buffer):
        for late in (0.0, 0.05, 0.5, 5.0):  # the first step makes the layer; a busy machine may begin later than that
            everybody.wait(20)
            threading.Event().wait(late * (rank == last))
            sent, back = torch.full((WORLD,), 5), torch.full((WORLD,), 5)
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
            found[rank] = int(sent[last])
            everybody.wait(20)
            if late and min(found[:last]) > 10_000_000:
                return
        raise AssertionError(found)

    with ranks(crew, low_latency_mode=True) as group:
        group.run(work)


@pytest.mark.parametrize("worst", [0, 99])
def test_gradients_through_what_callers_wrap_are_those_of_the_host(crew, worst):
    case = case_of(missing=0.0, tokens=20)

    def on_host(rank, buffer):
        with crew.gpus.on_host():
            return train(case, rank, buffer, worst)

    with ranks(crew) as there, ranks(crew) as here:
        found, wanted = there.run(lambda rank, buffer: train(case, rank, buffer, worst)), here.run(on_host)
    alike(found, wanted)
    for rank, (out, x_grad, weights_grad) in enumerate(found):
        x, ids = case.x(rank).float().requires_grad_(), case.topk_idx(rank)
        weights = case.topk_weights(rank).requires_grad_()
        terms = weights * (ids % case.each + 1 + ids // case.each)
        (x * terms.sum(1, keepdim=True)).square().sum().backward()
        torch.testing.assert_close(out.float(), (x * terms.sum(1, keepdim=True)).detach(), atol=0.2, rtol=0.05)
        torch.testing.assert_close(weights_grad, weights.grad, atol=2e2, rtol=0.05)
        torch.testing.assert_close(x_grad.float(), x.grad, atol=4.0, rtol=0.1)

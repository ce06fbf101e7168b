"""V1's low-latency mode: how long each rank was waited for."""

from __future__ import annotations

import threading

import torch
from deep_ep_tools import Case, ranks


def case_of(crew):
    return Case(crew.world, tokens=22, hidden=128, topk=3, experts=4 * crew.world, missing=0.1)


def test_what_was_waited_for_each_rank_is_counted(pair):
    case, most = case_of(pair), 24
    everybody, found = threading.Barrier(2), [0]

    def work(rank, buffer):
        for late in (0.0, 0.05, 0.5, 5.0):  # the first step makes the layer; a busy machine may begin later than that
            everybody.wait(20)
            threading.Event().wait(late * rank)
            sent, back = torch.full((2,), 5), torch.full((2,), 5)
            packed, _, handle, _, _ = buffer.low_latency_dispatch(
                case.x(rank), case.topk_idx(rank), most, case.experts, use_fp8=False, dispatch_wait_recv_cost_stats=sent
            )
            buffer.low_latency_combine(
                packed, case.topk_idx(rank), case.topk_weights(rank), handle, combine_wait_recv_cost_stats=back
            )
            assert sent[rank] == back[rank] == 5
            assert bool((sent >= 5).all())
            assert bool((back >= 5).all())
            if rank == 0:
                found[0] = int(sent[1])
            everybody.wait(20)
            if late and found[0] > 10_000_000:
                return
        raise AssertionError(found)

    with ranks(pair, low_latency_mode=True) as group:
        group.run(work)


def test_what_the_step_before_was_waited_for_is_not_counted(pair):
    """A step that is sent before the hook of the former one was called."""
    case, most = case_of(pair), 24
    is_sent = threading.Event()

    def work(rank, buffer):
        buffer.low_latency_dispatch(case.x(rank), case.topk_idx(rank), most, case.experts, use_fp8=False)
        waited = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
        if rank == 1:
            assert is_sent.wait(20)
            threading.Event().wait(0.05)  # what rank 0 waits for
        hooks = [
            buffer.low_latency_dispatch(
                case.x(rank), case.topk_idx(rank), most, case.experts, use_fp8=False, return_recv_hook=True,
                dispatch_wait_recv_cost_stats=one,
            )[-1]
            for one in waited
        ]  # fmt: skip
        if rank == 0:
            is_sent.set()
        for hook in hooks:
            hook()
        counted = {one.rank: one.waited for one in next(iter(buffer._instances._made.values())).statistics().peers}
        assert int(waited[0][1 - rank] + waited[1][1 - rank]) <= counted[1 - rank] * 1e9

    with ranks(pair, low_latency_mode=True) as group:
        group.run(work)

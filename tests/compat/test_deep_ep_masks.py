"""Ranks that are masked by hand are left out, and come back."""

from __future__ import annotations

import threading

import pytest
import torch
from deep_ep_tools import Case, counts_without, ranks
from moe_cuda_crews import gpu_crew
from moe_tools import Threads

from raynixl import RaynixlError
from raynixl.errors import Masked


@pytest.mark.parametrize("is_on_gpu", [False, True], ids=["host", "GPUs"])
def test_a_rank_that_is_masked_by_hand_is_left_out_until_it_comes_back(is_on_gpu):
    case = Case(3, tokens=20, hidden=128, topk=2, experts=6)
    everybody = threading.Barrier(3)

    def step(rank, buffer):
        _, counts, _, _, _ = buffer.low_latency_dispatch(
            case.x(rank), case.topk_idx(rank), 20, case.experts, use_fp8=False
        )
        return counts.tolist()

    def two_steps(rank, buffer):
        """On a GPU the call after that which finds that we are masked says so."""
        step(rank, buffer)
        step(rank, buffer)

    def status(buffer):
        found = torch.zeros(3, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(found)
        return found.tolist()

    def work(rank, buffer):
        assert step(rank, buffer) == counts_without(case, rank, [])
        everybody.wait(20)
        if rank != 1:
            buffer.low_latency_update_mask_buffer(1, True)
            assert step(rank, buffer) == counts_without(case, rank, [1])
            assert status(buffer) == [0, 1, 0]
        everybody.wait(20)
        if rank == 1:
            with pytest.raises(Masked):
                two_steps(rank, buffer)
        everybody.wait(20)
        if rank == 1:
            buffer.low_latency_update_mask_buffer(1, False)
            if not is_on_gpu:
                assert step(rank, buffer) == counts_without(case, rank, [])  # the one that let it in
        else:
            buffer.low_latency_clean_mask_buffer()
            while status(buffer) != [0, 0, 0]:
                buffer.low_latency_clean_mask_buffer() if is_on_gpu else step(rank, buffer)
        everybody.wait(20)
        assert step(rank, buffer) == counts_without(case, rank, [])
        assert status(buffer) == [0, 0, 0]

    made = gpu_crew(3, is_everywhere=False) if is_on_gpu else Threads(3)
    with made as crew, ranks(crew, low_latency_mode=True, enable_shrink=True) as group:
        group.run(work)


def test_masking_a_rank_that_is_none_is_refused(pair):
    with ranks(pair, low_latency_mode=True, enable_shrink=True) as group:
        errors = group.errors(lambda rank, buffer: buffer.low_latency_update_mask_buffer(2, True))
        assert all(isinstance(error, RaynixlError) for error in errors)
        errors = group.errors(lambda rank, buffer: buffer.low_latency_query_mask_buffer(torch.zeros(3)))
        assert all(isinstance(error, RaynixlError) for error in errors)

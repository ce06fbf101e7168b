"""Mistakes and lost ranks on GPUs that are made up: who is told, and when; the next step works."""

from __future__ import annotations

import contextlib

import pytest
import torch
from deep_ep_calls import MOST, WORLD, case_of, steps
from deep_ep_tools import ranks

from raynixl import ConfigError, PeerLost, RangeError
from raynixl.compat.deep_ep import ElasticBuffer
from raynixl.errors import Masked


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
    with ranks(kernels, deadline=2.0) as group:
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


def status_of(buffer):
    """Which ranks are masked or lost."""
    status = torch.zeros(WORLD, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def test_who_was_lost_in_the_step_before_is_told_and_agreed_on(kernels):
    case = case_of()

    def step(rank, buffer, comes_back=True):
        ids = case.topk_idx(rank)
        packed, _, handle, _, _ = buffer.low_latency_dispatch(case.x(rank), ids, MOST, case.experts, use_fp8=False)
        if comes_back:
            buffer.low_latency_combine(packed, ids, case.topk_weights(rank), handle)

    def without(rank, buffer):
        step(rank, buffer, rank != 2)
        if rank != 2:
            if rank == 0:
                assert status_of(buffer) == [0, 0, 1]
            buffer.low_latency_clean_mask_buffer()
            step(rank, buffer)
            assert status_of(buffer) == [0, 0, 1]

    with ranks(kernels, low_latency_mode=True, deadline=2.0, enable_shrink=True) as group:
        group.run(step)
        group.run(without)


@pytest.mark.parametrize("worst", [0, 99])
def test_with_enable_shrink_the_others_go_on_and_let_it_in_again(kernels, worst):
    case = case_of()

    def summed(rank, others):
        times = sum(case.is_in_rank(rank, other).float() for other in others).unsqueeze(1)
        return (case.x(rank).float() * times).bfloat16()

    def two_steps(rank, buffer):
        steps(case, rank, buffer, worst=worst)
        return steps(case, rank, buffer, worst=worst)

    def without(rank, buffer):
        if rank != 2:
            assert torch.equal(two_steps(rank, buffer), summed(rank, (0, 1)))
            assert status_of(buffer) == [0, 0, 1]

    def back(rank, buffer):
        if rank == 2:
            with pytest.raises(Masked):
                two_steps(rank, buffer)
            buffer.low_latency_update_mask_buffer(2, False)
        while status_of(buffer) != [0, 0, 0]:
            buffer.low_latency_clean_mask_buffer()
        assert torch.equal(two_steps(rank, buffer), summed(rank, range(WORLD)))

    with ranks(kernels, deadline=2.0, enable_shrink=True) as group:
        group.run(two_steps)
        group.run(without)
        group.run(back)


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
    few, many = case_of(tokens=30, hidden=64), case_of(tokens=140, hidden=64)
    with ranks(kernels) as group:
        for worst in (99, 80, 99):
            group.run(lambda rank, buffer, worst=worst: steps(few, rank, buffer, worst=worst))
        found = errors_of(group, lambda rank, buffer: steps(many, rank, buffer, worst=99))
        assert [type(error) for error in found] == [RangeError] * WORLD
        group.run(lambda rank, buffer: steps(many, rank, buffer, worst=420))
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


def test_ranks_of_which_one_gives_tensors_elsewhere_later_on_give_each_other_up(kernels):
    case = case_of()

    def work(rank, buffer):
        with kernels.gpus.on_host() if rank == 1 else contextlib.nullcontext():
            for _ in range(2):
                steps(case, rank, buffer)

    with ranks(kernels, deadline=2.0) as group:
        group.run(lambda rank, buffer: steps(case, rank, buffer))
        found = errors_of(group, work)
        assert all(isinstance(error, PeerLost | Masked) for error in found)

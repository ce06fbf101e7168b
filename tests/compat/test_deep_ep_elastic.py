"""V2's dispatch and combine: plain and expanded rows, cached handles, counts that are not waited for."""

from __future__ import annotations

import pytest
import torch
from deep_ep_tools import Case, bits, ranks, same, summed

from raynixl import ConfigError
from raynixl.compat.deep_ep import ElasticBuffer
from raynixl.compat.deep_ep.utils import align, per_token_cast_to_fp8

MOST = 40


def case_of(crew, **options):
    return Case(crew.world, **{"tokens": 33, "hidden": 256, "topk": 3, "experts": 3 * crew.world, **options})


def elastic(crew, case, **options):
    return ranks(crew, ElasticBuffer, num_max_tokens_per_rank=MOST, hidden=case.hidden, **options)


def arguments(case, rank, **options):
    return {
        "topk_idx": case.topk_idx(rank), "topk_weights": case.topk_weights(rank), "num_experts": case.experts,
        **options,
    }  # fmt: skip


def global_tokens(case, rank):
    return torch.cat(
        [source * MOST + case.is_in_rank(source, rank).nonzero().squeeze(1) for source in range(case.world)]
    )


def expanded_rows(case, rank):
    """By local expert: the (row, k) pairs of the rows that a rank gets, in their order."""
    ids = case.received_ids(rank)
    return [[(int(row), int(k)) for row, k in (ids == expert).nonzero()] for expert in range(case.each)]


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("alignment", [1, 16])
def test_plain_rows_come_with_the_handle_that_is_documented(crew, form, alignment):
    case = case_of(crew, missing=0.2)

    def x_of(rank):
        return per_token_cast_to_fp8(case.x(rank)) if form == "fp8" else case.x(rank)

    def work(rank, buffer):
        stats = torch.zeros(case.each, dtype=torch.int32)
        recv_x, ids, weights, handle, event = buffer.dispatch(
            x_of(rank), **arguments(case, rank), expert_alignment=alignment, async_with_compute_stream=True,
            previous_event=buffer.capture(), allocate_on_comm_stream=True, cumulative_local_expert_recv_stats=stats,
        )  # fmt: skip
        event.current_stream_wait()
        if form == "fp8":
            assert same(recv_x[0], case.received(rank, lambda source: bits(x_of(source)[0])).view(torch.float8_e4m3fn))
            assert same(recv_x[1], case.received(rank, lambda source: x_of(source)[1]))
        else:
            assert same(recv_x, case.received(rank, case.x))
        assert same(ids, case.received_ids(rank))
        assert same(weights, case.received_weights(rank))
        counts = [int((ids == expert).sum()) for expert in range(case.each)]
        assert stats.tolist() == handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
        aligned = [align(count, alignment) for count in counts]
        assert handle.num_recv_tokens_per_expert_list == aligned
        assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(aligned).cumsum(0).tolist()
        sizes = [int(case.is_in_rank(source, rank).sum()) for source in range(case.world)]
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == torch.tensor(sizes).cumsum(0).tolist()
        assert torch.equal(handle.recv_src_metadata[:, 0], global_tokens(case, rank).int())
        first = (ids >= 0).int().argmax(1)
        assert torch.equal(handle.recv_src_metadata[:, 1] % case.topk, first.int())
        assert torch.equal(handle.recv_src_metadata[:, 1] // case.topk, handle.recv_src_metadata[:, 0] // MOST)
        assert torch.equal(handle.topk_idx, case.topk_idx(rank))
        for k in range(case.topk):
            found = handle.dst_buffer_slot_idx[:, k]
            assert bool((found[case.topk_idx(rank)[:, k] < 0] == -1).all())
        for other in range(case.world):
            here = handle.dst_buffer_slot_idx[case.topk_idx(rank) // case.each == other]
            assert here[here >= 0].tolist() == [rank * MOST + i for i in range(int(case.is_in_rank(rank, other).sum()))]

    with elastic(crew, case) as group:
        group.run(work)


@pytest.mark.parametrize("alignment", [1, 16])
def test_expanded_rows_lie_by_expert_with_zeros_between(crew, alignment):
    case = case_of(crew, missing=0.2)

    def work(rank, buffer):
        recv_x, ids, weights, handle, _ = buffer.dispatch(
            case.x(rank), **arguments(case, rank), expert_alignment=alignment, do_expand=True, do_zero_padding=True
        )
        assert ids is None
        rows, ws = case.received(rank, case.x), case.received_weights(rank)
        start = 0
        for expert, pairs in enumerate(expanded_rows(case, rank)):
            for place, (row, k) in enumerate(pairs, start):
                assert torch.equal(recv_x[place], rows[row])
                assert float(weights[place]) == float(ws[row, k])
                assert int(handle.recv_src_metadata[row, 2 + k]) == place
            end = start + len(pairs)
            assert int(handle.psum_num_recv_tokens_per_expert[expert]) == end
            start = align(end, alignment)
            assert not recv_x[end:start].any()
            assert not weights[end:start].any()
        assert start == len(recv_x) == len(weights) == handle.num_expanded_tokens

    with elastic(crew, case) as group:
        group.run(work)


@pytest.mark.parametrize("biases", [0, 2])
def test_combine_of_expanded_rows_adds_up_by_holder_and_then_by_rank(crew, biases):
    case = case_of(crew, missing=0.2)
    bias = tuple(torch.full((case.tokens, case.hidden), 0.375 + each, dtype=torch.bfloat16) for each in range(biases))

    def work(rank, buffer):
        recv_x, _, weights, handle, _ = buffer.dispatch(
            case.x(rank), **arguments(case, rank), expert_alignment=8, do_expand=True
        )
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        y = torch.full_like(recv_x, float("nan"))
        start = 0
        for expert, end in enumerate(ends):
            y[start:end] = recv_x[start:end] * (rank * case.each + expert + 1)
            start = align(end, 8)
        own = tuple(one[: case.count(rank)] for one in bias)
        out, back, event = buffer.combine(
            y, handle, topk_weights=weights, bias=own or None, async_with_compute_stream=True
        )
        event.current_stream_wait()
        ids = case.topk_idx(rank)
        assert same(back, case.topk_weights(rank).masked_fill(ids < 0, 0))
        parts = []
        for other in range(case.world):
            terms = [
                (case.x(rank) * (ids[:, k : k + 1] + 1))
                * ((ids[:, k : k + 1] >= 0) & (ids[:, k : k + 1] // case.each == other))
                for k in range(case.topk)
            ]
            parts.append(summed(terms))
        assert same(out, summed([*parts, *own]))

    with elastic(crew, case) as group:
        group.run(work)


def test_without_multiple_reduction_all_rows_are_added_up_at_the_source(crew):
    case = case_of(crew, missing=0.2)

    def work(rank, buffer):
        recv_x, _, weights, handle, _ = buffer.dispatch(case.x(rank), **arguments(case, rank), do_expand=True)
        y = recv_x.clone()
        start, ws = 0, case.received_weights(rank)
        for expert, (end, pairs) in enumerate(
            zip(handle.psum_num_recv_tokens_per_expert.tolist(), expanded_rows(case, rank), strict=True)
        ):
            assert weights[start:end].tolist() == [float(ws[row, k]) for row, k in pairs]
            y[start:end] = recv_x[start:end] * (rank * case.each + expert + 1)
            start = end
        out, back, _ = buffer.combine(y, handle)
        assert back is None
        ids = case.topk_idx(rank)
        assert same(
            out, summed([(case.x(rank) * (ids[:, k : k + 1] + 1)) * (ids[:, k : k + 1] >= 0) for k in range(case.topk)])
        )
        with pytest.raises(ConfigError, match="allow_multiple_reduction"):
            buffer.combine(y, handle, topk_weights=weights)

    with elastic(crew, case, allow_multiple_reduction=False) as group:
        group.run(work)


@pytest.mark.parametrize("reduces", [True, False])
def test_a_cached_handle_brings_other_rows_and_other_weights(crew, reduces):
    case, later = case_of(crew), case_of(crew, seed=9)

    def work(rank, buffer):
        for is_expanded in (False, True):
            recv_x, ids, weights, handle, _ = buffer.dispatch(
                case.x(rank), **arguments(case, rank), do_expand=is_expanded, expert_alignment=4
            )
            other, again, none, same_handle, _ = buffer.dispatch(later.x(rank), handle=handle, do_expand=is_expanded)
            assert none is None
            assert same_handle is handle
            assert other.shape == recv_x.shape
            if is_expanded:
                assert again is None
                valid = handle.recv_src_metadata[:, 2:]
                row, k = (valid >= 0).nonzero(as_tuple=True)
                assert torch.equal(other[valid[row, k].long()], case.received(rank, later.x)[row])
            else:
                assert same(again, ids)
                assert same(other, case.received(rank, later.x))
            _, _, ws, _, _ = buffer.dispatch(
                case.x(rank), topk_weights=case.topk_weights(rank), handle=handle, do_expand=is_expanded
            )
            assert same(ws, weights)

    with elastic(crew, case, allow_multiple_reduction=reduces) as group:
        group.run(work)


@pytest.mark.parametrize("is_expanded", [False, True], ids=["plain", "expanded"])
def test_without_cpu_sync_shapes_are_those_of_the_worst_case(crew, is_expanded):
    case = case_of(crew)

    def work(rank, buffer):
        recv_x, _, weights, handle, _ = buffer.dispatch(
            case.x(rank), **arguments(case, rank), do_cpu_sync=False, do_expand=is_expanded, expert_alignment=8
        )
        worst = align(case.world * MOST * case.topk + 7 * case.each, 8) if is_expanded else case.world * MOST
        assert len(recv_x) == len(weights) == worst
        assert handle.num_recv_tokens_per_expert_list == []
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert torch.equal(handle.recv_src_metadata[:rows, 0], global_tokens(case, rank).int())
        if not is_expanded:
            assert same(recv_x[:rows], case.received(rank, case.x))
        cached, *_ = buffer.dispatch(case.x(rank), handle=handle, do_expand=is_expanded)
        assert same(cached, recv_x)
        out, back, _ = buffer.combine(recv_x, handle, topk_weights=weights)
        assert same(back, case.topk_weights(rank))
        assert out.shape == case.x(rank).shape

    with elastic(crew, case) as group:
        group.run(work)


def test_scales_may_come_in_columns_and_packed_by_four(crew):
    case = case_of(crew, hidden=512)

    def work(rank, buffer):
        x, _ = per_token_cast_to_fp8(case.x(rank))
        packed = torch.arange(len(x), dtype=torch.int32).view(-1, 1) + 1000 * rank
        (rows, scales), _, _, handle, _ = buffer.dispatch(
            (x, packed), **arguments(case, rank), use_tma_aligned_col_major_sf=True
        )
        assert scales.stride()[0] == 1
        assert scales.dtype == torch.int32
        given = [
            torch.arange(case.count(source), dtype=torch.int32).view(-1, 1) + 1000 * source
            for source in range(case.world)
        ]
        assert torch.equal(scales, case.received(rank, lambda source: given[source]))
        assert len(rows) == len(handle.recv_src_metadata)

    with elastic(crew, case) as group:
        group.run(work)


def test_a_handle_keeps_its_ids_when_the_caller_changes_them(pair):
    case = case_of(pair)

    def work(rank, buffer):
        given = arguments(case, rank)
        *_, handle, _ = buffer.dispatch(case.x(rank), **given)
        given["topk_idx"].fill_(-1)
        assert torch.equal(handle.topk_idx, case.topk_idx(rank))
        recv_x, *_ = buffer.dispatch(case.x(rank), handle=handle)
        assert same(recv_x, case.received(rank, case.x))

    with elastic(pair, case) as group:
        group.run(work)


def test_sizes_domains_and_mistakes(pair):
    case = case_of(pair)

    def work(rank, buffer):
        assert buffer.num_bytes % (2 << 20) == 0
        assert buffer.get_logical_domain_size() == buffer.get_physical_domain_size() == (1, 2)
        assert (buffer.rank_idx, buffer.num_ranks) == (rank, 2)
        sms = buffer.get_theoretical_num_sms(case.experts, case.topk)
        assert buffer.get_theoretical_num_qps(sms) > 0
        buffer.barrier()
        with pytest.raises(ConfigError, match="needs topk_idx"):
            buffer.dispatch(case.x(rank))
        with pytest.raises(ConfigError, match="do_expand"):
            buffer.dispatch(case.x(rank), **arguments(case, rank), do_zero_padding=True)
        with pytest.raises(ConfigError, match=r"Group\.allgather"):
            buffer.all_gather(case.x(rank))
        with pytest.raises(ConfigError, match=r"agent\.read"):
            buffer.engram_fetch(case.topk_idx(rank))
        recv_x, *_, handle, _ = buffer.dispatch(case.x(rank), **arguments(case, rank))
        with pytest.raises(ConfigError, match="other layout"):
            buffer.dispatch(case.x(rank), handle=handle, do_expand=True)
        with pytest.raises(ConfigError, match="own ids"):
            buffer.dispatch(case.x(rank), handle=handle, topk_idx=case.topk_idx(rank))
        with pytest.raises(ConfigError, match="not the handle's"):
            buffer.dispatch(case.x(rank), handle=handle, num_experts=77)
        with pytest.raises(ConfigError, match="one for each"):
            buffer.combine(recv_x[1:], handle)

    with elastic(pair, case) as group:
        group.run(work)
    with pytest.raises(ConfigError, match="no size"):
        ElasticBuffer(None)

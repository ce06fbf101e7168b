"""V1's normal dispatch and combine do what DeepEP's do, to the bit where DeepEP defines it."""

from __future__ import annotations

import pytest
import torch
from deep_ep_tools import Case, bits, ranks, same, summed

from raynixl import ConfigError, RangeError
from raynixl.compat.deep_ep import Buffer, Config
from raynixl.compat.deep_ep.utils import per_token_cast_to_fp8


def case_of(crew, **options):
    return Case(crew.world, **{"tokens": 37, "hidden": 256, "topk": 3, "experts": 4 * crew.world, **options})


def test_a_layout_counts_tokens_by_rank_and_pairs_by_expert(crew):
    case = case_of(crew, missing=0.3)
    with ranks(crew) as group:

        def work(rank, buffer):
            per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
                case.topk_idx(rank), case.experts, async_finish=True
            )
            event.current_stream_wait()
            assert per_node is None
            assert per_expert.dtype == per_rank.dtype == torch.int32
            assert per_expert.tolist() == [int((case.topk_idx(rank) == e).sum()) for e in range(case.experts)]
            for other in range(case.world):
                assert torch.equal(in_rank[:, other], case.is_in_rank(rank, other))
            assert per_rank.tolist() == in_rank.sum(0).tolist()

        group.run(work)


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_rows_ids_and_weights_arrive_in_the_order_of_source_and_token(crew, form, is_async):
    case = case_of(crew, missing=0.2)

    def x_of(rank):
        return per_token_cast_to_fp8(case.x(rank)) if form == "fp8" else case.x(rank)

    def work(rank, buffer):
        x = x_of(rank)
        if form == "fp8":
            x = (x[0], x[1].T.contiguous().T)  # column-major, as GPUs like them
        recv_x, ids, weights, counts, handle, event = buffer.dispatch(
            x, topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), **case.layout(buffer, rank),
            config=Buffer.get_dispatch_config(case.world), async_finish=is_async,
            previous_event=buffer.capture() if is_async else None,
        )  # fmt: skip
        if is_async:
            event.current_stream_wait()
        if form == "fp8":
            assert same(recv_x[0], case.received(rank, lambda source: bits(x_of(source)[0])).view(torch.float8_e4m3fn))
            assert same(recv_x[1], case.received(rank, lambda source: x_of(source)[1]))
        else:
            assert same(recv_x, case.received(rank, case.x))
        assert same(ids, case.received_ids(rank))
        assert same(weights, case.received_weights(rank))
        assert counts == [int((case.received_ids(rank) == e).sum()) for e in range(case.each)]
        sizes = [int(case.is_in_rank(source, rank).sum()) for source in range(case.world)]
        assert handle[0][:, rank].tolist() == torch.tensor(sizes).cumsum(0).tolist()
        tokens = [case.is_in_rank(source, rank).nonzero().squeeze(1) for source in range(case.world)]
        assert torch.equal(handle[3], torch.cat(tokens).int())
        assert torch.equal(handle[4], case.layout(buffer, rank)["is_token_in_rank"])

    with ranks(crew) as group:
        group.run(work)


@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_combine_adds_up_rows_by_rank_and_then_the_biases(crew, biases, is_async):
    case = case_of(crew, missing=0.2)
    bias = [
        case.x(50 + each)[:1].expand(case.tokens, -1).contiguous() if case.count(50 + each) else None for each in (0, 1)
    ]
    bias = [torch.full((case.tokens, case.hidden), 0.375 + each, dtype=torch.bfloat16) for each in (0, 1)]

    def work(rank, buffer):
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            case.x(rank),
            topk_idx=case.topk_idx(rank),
            topk_weights=case.topk_weights(rank),
            **case.layout(buffer, rank),
        )
        own = [one[: case.count(rank)] for one in bias[:biases]]
        given = None if not own else own[0] if len(own) == 1 else tuple(own)
        y = recv_x * (rank + 1)
        out, weights, event = buffer.combine(y, handle, bias=given, async_finish=is_async)
        if is_async:
            event.current_stream_wait()
        assert weights is None
        parts = [
            (case.x(rank) * (other + 1)).float() * case.is_in_rank(rank, other).unsqueeze(1)
            for other in range(case.world)
        ]
        assert same(out, summed([*parts, *own]))

    with ranks(crew) as group:
        group.run(work)


def test_weights_come_back_as_the_gradient_of_what_was_dispatched(crew):
    case = case_of(crew)

    def work(rank, buffer):
        recv_x, _, weights, _, handle, _ = buffer.dispatch(
            case.x(rank),
            topk_idx=case.topk_idx(rank),
            topk_weights=case.topk_weights(rank),
            **case.layout(buffer, rank),
        )
        out, back, event = buffer.combine(recv_x, handle, topk_weights=weights, async_finish=True)
        event.current_stream_wait()
        assert same(back, case.topk_weights(rank))
        times = sum(case.is_in_rank(rank, other).float() for other in range(case.world)).unsqueeze(1)
        assert same(out, (case.x(rank).float() * times).bfloat16())

    with ranks(crew) as group:
        group.run(work)


def test_a_dispatch_without_ids_goes_by_ranks(crew):
    case = case_of(crew)

    def work(rank, buffer):
        recv_x, ids, weights, counts, handle, _ = buffer.dispatch(
            case.x(rank), **case.layout(buffer, rank), expert_alignment=8
        )
        assert ids is None
        assert weights is None
        assert same(recv_x, case.received(rank, case.x))
        found = [int((case.received_ids(rank) == e).sum()) for e in range(case.each)]
        assert counts == [-(-one // 8) * 8 for one in found]
        again, *nothing, _ = buffer.dispatch(case.x(rank), handle=handle)
        assert nothing == [None] * 4
        assert same(again, recv_x)
        out, _, _ = buffer.combine(again, handle)
        times = sum(case.is_in_rank(rank, other).float() for other in range(case.world)).unsqueeze(1)
        assert same(out, (case.x(rank).float() * times).bfloat16())

    with ranks(crew) as group:
        group.run(work)


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_a_handle_dispatches_other_rows_by_the_same_layout(crew, form):
    """The backward of combine: gradients in bf16 by the handle of a dispatch in either form."""
    case, later = case_of(crew), case_of(crew, seed=5)

    def work(rank, buffer):
        x = per_token_cast_to_fp8(case.x(rank)) if form == "fp8" else case.x(rank)
        *_, handle, _ = buffer.dispatch(
            x, topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), **case.layout(buffer, rank)
        )
        for _ in range(2):
            grad, ids, weights, counts, none, event = buffer.dispatch(later.x(rank), handle=handle, async_finish=True)
            event.current_stream_wait()
            assert (ids, weights, counts, none) == (None,) * 4
            assert same(grad, case.received(rank, later.x))

    with ranks(crew) as group:
        group.run(work)


def test_num_worst_tokens_pads_rows(crew):
    case = case_of(crew)
    worst = case.tokens * case.world

    def work(rank, buffer):
        arguments = {
            "topk_idx": case.topk_idx(rank), "topk_weights": case.topk_weights(rank), **case.layout(buffer, rank),
        }  # fmt: skip
        recv_x, ids, weights, counts, handle, _ = buffer.dispatch(case.x(rank), num_worst_tokens=worst, **arguments)
        rows = len(case.received_ids(rank))
        assert counts == []
        assert len(recv_x) == len(ids) == len(weights) == len(handle[3]) == worst
        assert same(recv_x[:rows], case.received(rank, case.x))
        assert same(ids[:rows], case.received_ids(rank))
        assert bool((ids[rows:] == -1).all())
        out, back, _ = buffer.combine(recv_x, handle, topk_weights=weights)
        assert same(back, case.topk_weights(rank))
        again, *_ = buffer.dispatch(case.x(rank), handle=handle)
        assert same(again[:rows], recv_x[:rows])
        assert len(again) == worst
        assert len(out) == case.count(rank)

    with ranks(crew) as group:
        group.run(work)


def test_more_rows_than_num_worst_tokens_are_refused(pair):
    case = case_of(pair)

    def work(rank, buffer):
        buffer.dispatch(
            case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank),
            **case.layout(buffer, rank), num_worst_tokens=4,
        )  # fmt: skip

    with ranks(pair) as group:
        assert all(isinstance(error, RangeError) for error in group.errors(work))


def test_batches_may_grow_on_any_rank(crew):
    def work(rank, buffer):
        for tokens in (5, 100, 700, 3):
            case = case_of(crew, tokens=tokens + 3 * crew.world, hidden=128, seed=tokens)
            x = case.x(rank)[: tokens if rank == crew.world - 1 else 2]
            ids = case.topk_idx(rank)[: len(x)]
            layout = dict(zip(
                ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank"),
                buffer.get_dispatch_layout(ids, case.experts), strict=False,
            ))  # fmt: skip
            recv_x, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=torch.ones(ids.shape), **layout)
            out, _, _ = buffer.combine(recv_x, handle)
            times = layout["is_token_in_rank"].sum(1, keepdim=True)
            assert same(out, (x.float() * times).bfloat16())

    with ranks(crew) as group:
        group.run(work)


def test_several_handles_are_alive_at_once(pair):
    cases = [case_of(pair, seed=seed, tokens=tokens) for seed, tokens in ((1, 20), (2, 31), (3, 9))]

    def work(rank, buffer):
        held = []
        for case in cases:
            recv_x, _, _, _, handle, _ = buffer.dispatch(
                case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank),
                **case.layout(buffer, rank),
            )  # fmt: skip
            held.append((case, recv_x, handle))
        events = []
        for case, recv_x, handle in reversed(held):
            assert same(recv_x, case.received(rank, case.x))
            events.append((case, *buffer.combine(recv_x, handle, async_finish=True)))
        for case, out, _, event in events:
            with event:
                pass
            times = sum(case.is_in_rank(rank, other).float() for other in range(case.world)).unsqueeze(1)
            assert same(out, (case.x(rank).float() * times).bfloat16())

    with ranks(pair) as group:
        group.run(work)


def test_mistakes_say_what_to_do(pair):
    case = case_of(pair)

    def work(rank, buffer):
        x, ids, weights = case.x(rank), case.topk_idx(rank), case.topk_weights(rank)
        layout = case.layout(buffer, rank)
        with pytest.raises(ConfigError, match="get_dispatch_layout"):
            buffer.dispatch(x, topk_idx=ids, topk_weights=weights)
        with pytest.raises(ConfigError, match="give both"):
            buffer.dispatch(x, topk_idx=ids, **layout)
        with pytest.raises(ConfigError, match="is_token_in_rank"):
            buffer.dispatch(x, topk_idx=ids.roll(1, 0), topk_weights=weights, **layout)
        with pytest.raises(ConfigError, match="needs topk_idx"):
            buffer.dispatch(x, num_worst_tokens=9, **layout)
        with pytest.raises(ConfigError, match="divide"):
            buffer.get_dispatch_layout(ids, case.experts + 1)
        with pytest.raises(RangeError, match="experts are"):
            buffer.get_dispatch_layout(ids + case.experts, case.experts)
        with pytest.raises(ConfigError, match="no handle"):
            buffer.combine(x, (1, 2, 3))
        with pytest.raises(ConfigError, match="raw buffer"):
            buffer.get_local_buffer_tensor(torch.uint8)
        recv_x, *_, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout)
        with pytest.raises(ConfigError, match="one for each"):
            buffer.combine(recv_x[:-1], handle)
        with pytest.raises(ConfigError, match="leave topk_idx"):
            buffer.dispatch(x, handle=handle, topk_idx=ids)

    with ranks(pair) as group:
        group.run(work)


def test_nine_ranks_have_the_internode_form():
    from moe_tools import Threads

    case = Case(9, tokens=30, hidden=128, topk=4, experts=18)

    def work(rank, buffer):
        layout = case.layout(buffer, rank)
        in_rank = layout["is_token_in_rank"]
        assert layout["num_tokens_per_rdma_rank"].tolist() == [
            int(in_rank[:, :8].any(1).sum()),
            int(in_rank[:, 8].sum()),
        ]
        recv_x, ids, weights, _, handle, _ = buffer.internode_dispatch(
            case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), **layout, config=Config()
        )
        assert same(recv_x, case.received(rank, case.x))
        sizes = torch.tensor([int(case.is_in_rank(source, rank).sum()) for source in range(9)])
        assert handle[-4].tolist() == sizes.cumsum(0).tolist()
        assert handle[4].tolist() == [int(sizes[:8].sum()), int(sizes.sum())]
        assert torch.equal(handle[0], in_rank)
        _, back, _ = buffer.internode_combine(recv_x, handle, topk_weights=weights)
        assert same(back, case.topk_weights(rank))
        assert bool(((ids >= 0).any(1)).all())

    with Threads(9) as crew, ranks(crew) as group:
        group.run(work)

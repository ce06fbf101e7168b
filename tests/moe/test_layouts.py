"""What a dispatch returns in each layout, seen by a user: shapes, places, padding, where rows came from."""

from __future__ import annotations

import pytest
import torch
from moe_programs import Combine, Dispatch, Program, even

HIDDEN, TOKENS = 8, 4


def given(rank, count=TOKENS):
    """Tokens of one rank whose rows tell who they are; each goes to experts 0 and 3 of two ranks' four."""
    x = torch.arange(count, dtype=torch.float32)[:, None].expand(count, HIDDEN) + 100 * rank
    return x, torch.tensor([[0, 3]] * count), torch.tensor([[0.25, 0.75]] * count)


@pytest.fixture
def pair(crew):
    with crew.experts(2, experts=4, hidden=HIDDEN, topk=2, max_tokens=6, dtype=torch.float32) as layer:
        yield layer


def test_rows_in_the_order_of_source_and_token(pair):
    for made in pair.run(lambda rank, ep: ep.dispatch(*given(rank))):
        assert made.x[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
        assert made.sources.tolist() == [0] * 4 + [1] * 4
        assert made.tokens.tolist() == [0, 1, 2, 3] * 2
        assert made.x.is_contiguous()
        assert made.scales is made.offsets is None
        assert made.lost == ()


def test_ids_are_those_of_the_holder(pair):
    first, second = pair.run(lambda rank, ep: ep.dispatch(*given(rank)))
    assert first.topk_idx.tolist() == [[0, -1]] * 8
    assert second.topk_idx.tolist() == [[-1, 1]] * 8
    assert first.topk_weights.tolist() == [[0.25, 0]] * 8
    assert first.counts.tolist() == [8, 0]
    assert (first.counts.dtype, first.sources.dtype, first.tokens.dtype) == (torch.int64, torch.int32, torch.int32)


@pytest.mark.parametrize("alignment", [1, 3, 8, 128])
def test_experts_one_after_another_from_aligned_starts(pair, alignment):
    def work(rank, ep):
        x, ids, weights = given(rank)
        return ep.dispatch(x, (ids + rank) % 4, weights, layout="experts", alignment=alignment)

    for made in pair.run(work):
        ends = made.offsets[1:].tolist()
        assert made.offsets[0] == 0
        assert all(offset % alignment == 0 for offset in made.offsets.tolist())
        assert made.x.shape == (ends[-1], HIDDEN)
        assert made.topk_weights.shape == (ends[-1],)
        for local, count in enumerate(made.counts.tolist()):
            padding = slice(int(made.offsets[local]) + count, ends[local])
            assert not made.x[padding].any()
            assert not made.topk_weights[padding].any()


def test_slots_that_stay_where_they_are(pair):
    for made in pair.run(lambda rank, ep: ep.dispatch(*given(rank, 2 + rank), layout="slots")):
        assert made.x.shape == (2, 6, HIDDEN)
        assert made.topk_idx.shape == (2, 6, 2)
        assert made.x[0, :2, 0].tolist() == [0, 1]
        assert made.x[1, :3, 0].tolist() == [100, 101, 102]
        assert (made.topk_idx[0, 2:] == -1).all()
        assert (made.topk_idx[1, 3:] == -1).all()


def test_weights_that_stay_at_the_source_do_not_travel(pair):
    for layout in ("tokens", "experts", "slots"):
        made = pair.run(lambda rank, ep, layout=layout: ep.dispatch(*given(rank), layout=layout, weights_at="source"))
        assert [each.topk_weights for each in made] == [None, None]


def test_results_may_be_changed_by_their_owner(pair):
    def work(rank, ep):
        made = ep.dispatch(*given(rank))
        made.x.mul_(made.topk_weights.sum(1, keepdim=True))
        return ep.combine(made.x, made.handle)

    for rank, out in enumerate(pair.run(work)):
        assert torch.equal(out, given(rank)[0])


def test_x_may_be_changed_as_soon_as_dispatch_returns(pair):
    def work(rank, ep):
        x, ids, weights = given(rank)
        x = x.contiguous()
        made = ep.dispatch(x, ids, weights)
        x.fill_(-1)
        ids.fill_(-1)
        weights.fill_(-1)
        return made.x[:, 0].tolist()

    assert pair.run(work) == [[0, 1, 2, 3, 100, 101, 102, 103]] * 2


@pytest.mark.parametrize("alignment", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_alignments_give_the_bits_of_the_reference(plays, alignment, weights_at):
    steps = Dispatch("a", (5, 0, 6), "experts", alignment, weights_at, missing=0.2), Combine("a")
    plays(Program(3, even(3, 8), 16, 3, steps))


def test_layouts_in_turn_on_one_layer(plays):
    steps = []
    for number, layout in enumerate(["tokens", "slots", "experts", "slots", "tokens", "experts", "experts", "slots"]):
        counts = (number, 3, 8 - number)
        weights_at = "holder" if number % 3 else "source"
        steps += [Dispatch(str(number), counts, layout, 1 + number, weights_at), Combine(str(number))]
    plays(Program(3, even(3, 8), 16, 3, tuple(steps)))

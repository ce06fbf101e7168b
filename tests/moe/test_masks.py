"""A rank is masked by hand: all others go on at once with the bits of the reference, and it comes back when it may."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_programs import Dispatch, Program, even, tokens_of
from moe_rows import packed

from raynixl.errors import ConfigError, Masked
from raynixl.moe import OnLost, reference
from raynixl.moe.reference import Setting

COUNTS = (4, 3, 5, 2)
PROGRAM = Program(4, even(4, 8), 16, 3, (Dispatch("a", COUNTS, missing=0.1),))
GIVEN = [tokens_of(PROGRAM, 0, COUNTS, rank) for rank in range(4)]
WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)
GONE = 2
REST = [0, 1, 3]


@pytest.fixture(params=[OnLost.DROP, OnLost.RENORMALISE], ids=lambda on_lost: on_lost.value)
def layer(crew, request):
    with crew.experts(4, on_lost=request.param, **PROGRAM.options()) as made:
        yield made


def setting_of(layer, way, **more):
    is_whole = layer.eps[0].on_lost is OnLost.RENORMALISE
    return Setting(4, PROGRAM.holders, PROGRAM.max_tokens, way[0], 2, way[1], renormalise=is_whole, **more)


def dispatch(way):
    def work(rank, ep):
        one = GIVEN[rank]
        return ep.dispatch(one.x, one.topk_idx, one.topk_weights, layout=way[0], alignment=2, weights_at=way[1])

    return work


def close_to(outs, wanted, layer):
    """The bits, but where sums are scaled: in which order weights are added up is not promised."""
    if layer.eps[0].on_lost is OnLost.DROP:
        return all(packed(mine) == packed(theirs) for mine, theirs in zip(outs, wanted, strict=True))
    return all(torch.allclose(*pair, rtol=0.01, atol=1e-6) for pair in zip(outs, wanted, strict=True))


def mask(layer, ranks=REST):
    layer.run(lambda rank, ep: ep.mask(GONE), ranks=ranks)


@every_way
def test_the_others_go_on_without_it(layer, way):
    layer.run(dispatch(way))
    mask(layer)
    assert [layer.eps[rank].active for rank in REST] == [(0, 1, 3)] * 3
    setting = setting_of(layer, way, lost=frozenset({GONE}))
    arrived = reference.dispatch(setting, GIVEN)
    made = layer.run(dispatch(way), ranks=REST)
    ys = {
        rank: reference.run_experts(setting, rank, each, PROGRAM.expert, torch.bfloat16)
        for rank, each in zip(REST, made, strict=True)
    }
    for rank, each in zip(REST, made, strict=True):
        assert each.lost == ()
        assert packed(each.sources) == packed(arrived[rank].sources)
        assert packed(each.topk_idx) == packed(arrived[rank].topk_idx)
    handles = dict(zip(REST, (each.handle for each in made), strict=True))
    outs = layer.run(lambda rank, ep: ep.combine(ys[rank], handles[rank]), ranks=REST)
    empty = torch.empty(0, 16, dtype=torch.bfloat16)
    wanted = reference.combine(setting, GIVEN, [ys.get(rank, empty) for rank in range(4)])
    assert close_to(outs, [wanted[rank] for rank in REST], layer)


@every_way
def test_its_terms_are_missing_from_a_combine_of_before(layer, way):
    made = layer.run(dispatch(way))
    mask(layer)
    whole = setting_of(layer, way)
    ys = [reference.run_experts(whole, rank, each, PROGRAM.expert, torch.bfloat16) for rank, each in enumerate(made)]
    outs = layer.run(lambda rank, ep: ep.combine(ys[rank], made[rank].handle), ranks=REST)
    # the reference has no such step: it is that of tokens which never named an expert of the lost rank
    held = torch.tensor([holder == GONE for holder in PROGRAM.holders])
    for rank, out in zip(REST, outs, strict=True):
        given = GIVEN[rank]
        is_gone = held[given.topk_idx.clamp(min=0)] & (given.topk_idx >= 0)
        rest = replace(given, topk_idx=torch.where(is_gone, -1, given.topk_idx))
        wanted = reference.dense(setting_of(layer, way), rest, PROGRAM.expert)
        if layer.eps[0].on_lost is OnLost.RENORMALISE:
            named = torch.where(given.topk_idx >= 0, given.topk_weights, 0).sum(1)
            left = torch.where(rest.topk_idx >= 0, given.topk_weights, 0).sum(1)
            wanted *= torch.where(left > 0, named / left, 1.0)[:, None]
        torch.testing.assert_close(out.double(), wanted, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("way", WAYS[:4], ids="-".join)
def test_a_layout_of_before_keeps_its_rows_and_those_of_the_lost_are_zero(layer, way):
    before = layer.run(dispatch(way))
    mask(layer)
    again = layer.run(
        lambda rank, ep: ep.dispatch(GIVEN[rank].x * 2, handle=before[rank].handle, layout=way[0], alignment=2),
        ranks=REST,
    )
    for rank, made in zip(REST, again, strict=True):
        old = before[rank]
        assert packed(made.counts) == packed(old.counts)
        assert packed(made.sources) == packed(old.sources)
        if way[0] == "tokens":
            is_there = old.sources != GONE
            assert torch.equal(made.x[is_there], old.x[is_there] * 2)
            assert not made.x[~is_there].any()
    # and it may be combined
    setting = setting_of(layer, way)
    ys = {
        rank: reference.run_experts(setting, rank, each, PROGRAM.expert, torch.bfloat16)
        for rank, each in zip(REST, again, strict=True)
    }
    handles = dict(zip(REST, (each.handle for each in again), strict=True))
    for out in layer.run(lambda rank, ep: ep.combine(ys[rank], handles[rank]), ranks=REST):
        assert torch.isfinite(out).all()


def test_who_is_masked_hears_of_it_at_its_next_step_and_at_every_later_one(layer):
    layer.run(dispatch(WAYS[0]))
    mask(layer)
    layer.run(dispatch(WAYS[0]), ranks=REST)
    for _ in range(3):
        with pytest.raises(Masked, match="rejoin"):
            layer.run(dispatch(WAYS[0]), ranks=[GONE])
    layer.run(dispatch(WAYS[0]), ranks=REST)


def test_it_comes_back_when_it_is_unmasked_and_rejoins(layer):
    layer.run(dispatch(WAYS[0]))
    mask(layer)
    layer.run(dispatch(WAYS[0]), ranks=REST)
    layer.run(lambda rank, ep: ep.unmask(GONE), ranks=REST)

    def work(rank, ep):
        if rank == GONE:
            with pytest.raises(Masked):
                dispatch(WAYS[0])(rank, ep)
            ep.rejoin()
            dispatch(WAYS[0])(rank, ep)  # with which the others find it active
        else:
            for _ in range(10_000):
                if GONE in ep.active:
                    break
                dispatch(WAYS[0])(rank, ep)
        return dispatch(WAYS[0])(rank, ep)

    made = layer.run(work)
    wanted = reference.dispatch(setting_of(layer, WAYS[0]), GIVEN)
    for mine, theirs in zip(made, wanted, strict=True):
        assert packed(mine.x) == packed(theirs.x)
        assert packed(mine.topk_weights) == packed(theirs.topk_weights)
    assert [ep.active for ep in layer.eps] == [(0, 1, 2, 3)] * 4


def test_one_rank_alone_goes_on(layer):
    layer.run(dispatch(WAYS[0]))
    layer.run(lambda rank, ep: [ep.mask(other) for other in (1, 2, 3)], ranks=[0])
    made = layer.run(dispatch(WAYS[0]), ranks=[0])[0]
    assert made.sources.unique().tolist() in ([0], [])
    assert layer.eps[0].active == (0,)


@pytest.mark.parametrize("rank", [-1, 4, 1000])
def test_ranks_that_there_are_not_cannot_be_masked(layer, rank):
    with pytest.raises(ConfigError):
        layer.eps[0].mask(rank)


def test_a_rank_cannot_mask_itself(layer):
    with pytest.raises(ConfigError):
        layer.eps[1].mask(1)


def test_a_cached_dispatch_names_whose_rows_are_missing(layer):
    made = layer.run(dispatch(("tokens", "holder")))
    mask(layer)
    again = layer.run(lambda rank, ep: ep.dispatch(GIVEN[rank].x, handle=made[rank].handle), ranks=REST)
    for rank, each in zip(REST, again, strict=True):
        gone = (made[rank].sources == GONE).nonzero().flatten()
        assert each.lost == ((GONE,) if len(gone) else ())
        assert not each.x[gone].any()
        assert torch.equal(each.x[made[rank].sources != GONE], made[rank].x[made[rank].sources != GONE])

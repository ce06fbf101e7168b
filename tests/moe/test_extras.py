"""What else travels: tensors beside the rows, new weights by a known way, pairs that come back unsummed, counts."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_programs import Dispatch, Program, even, tokens_of
from moe_rows import draw_rows, packed

from raynixl.moe import reference
from raynixl.moe.reference import Setting, Tokens

COUNTS = (4, 0, 6)
PROGRAM = Program(3, even(3, 7), 16, 3, (Dispatch("a", COUNTS, missing=0.2, has_duplicates=True),))
GIVEN = [tokens_of(PROGRAM, 0, COUNTS, rank) for rank in range(3)]
WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)


@pytest.fixture
def trio(crew):
    with crew.experts(3, **PROGRAM.options()) as layer:
        yield layer


def setting_of(way, **more):
    return Setting(3, PROGRAM.holders, PROGRAM.max_tokens, way[0], 2, way[1], **more)


def options_of(way):
    return {"layout": way[0], "alignment": 2, "weights_at": way[1]}


def dispatched(layer, way, given=None, **more):
    """Dispatch on all ranks."""
    given = GIVEN if given is None else given

    def work(rank, ep):
        one = given[rank]
        return ep.dispatch(one.x, one.topk_idx, one.topk_weights, **options_of(way), **more)

    return layer.run(work)


def same(one, other):
    return all(packed(mine) == packed(theirs) for mine, theirs in zip(one, other, strict=True))


@every_way
def test_tensors_beside_the_rows_arrive_where_the_rows_do(trio, way):
    names = [torch.arange(count)[:, None] * 10 + rank for rank, count in enumerate(COUNTS)]
    boxes = [torch.rand(count, 3, 5, dtype=torch.float64) for count in COUNTS]

    def work(rank, ep):
        one = GIVEN[rank]
        beside = (names[rank], boxes[rank])
        return ep.dispatch(one.x, one.topk_idx, one.topk_weights, extra=beside, **options_of(way))

    setting = setting_of(way)
    as_rows = [Tokens(name, one.topk_idx, one.topk_weights) for name, one in zip(names, GIVEN, strict=True)]
    as_boxes = [Tokens(box.reshape(len(box), 15), one.topk_idx) for box, one in zip(boxes, GIVEN, strict=True)]
    wanted = zip(reference.dispatch(setting, as_rows), reference.dispatch(setting, as_boxes), strict=True)
    for made, (name, box) in zip(trio.run(work), wanted, strict=True):
        first, second = made.extra
        filled = (name.topk_idx >= 0).any(-1) if way[0] == "slots" else slice(None)
        assert torch.equal(first[filled], name.x[filled])
        assert torch.equal(second.reshape(*second.shape[:-2], 15)[filled], box.x[filled])


KNOWN_WAYS = [
    (first, way) for first in WAYS for way in WAYS
    if way[1] == "holder" and (first[0] == "slots") == (way[0] == "slots")  # fixed slots are other places
]  # fmt: skip


@pytest.mark.parametrize(("first", "way"), KNOWN_WAYS, ids="-".join)
def test_new_weights_go_a_known_way_and_into_any_layout(trio, first, way):
    made = dispatched(trio, first)
    fresh = [Tokens(torch.rand_like(one.x.float()), one.topk_idx, torch.rand(one.topk_idx.shape)) for one in GIVEN]

    def again(rank, ep):
        return ep.dispatch(
            fresh[rank].x, topk_weights=fresh[rank].topk_weights, handle=made[rank].handle, **options_of(way)
        )

    wanted = reference.dispatch(setting_of(way), fresh)
    for got, want in zip(trio.run(again), wanted, strict=True):
        assert packed(got.counts) == packed(want.counts)
        assert packed(got.topk_idx) == packed(want.topk_idx)
        filled = (want.topk_idx >= 0).any(-1) if way[0] == "slots" else slice(None)
        assert torch.equal(got.x[filled], want.x[filled])
        assert torch.equal(got.topk_weights[filled], want.topk_weights[filled])


@every_way
def test_a_plain_handle_adds_up_what_it_is_given(trio, way):
    made = dispatched(trio, way)
    unweighted = [replace(one, topk_weights=None) for one in GIVEN]
    setting = setting_of(way)
    arrived = reference.dispatch(setting, unweighted)
    ys = [
        reference.run_experts(setting, rank, each, PROGRAM.expert, torch.bfloat16) for rank, each in enumerate(arrived)
    ]
    outs = trio.run(lambda rank, ep: ep.combine(ys[rank], made[rank].handle.plain()))
    assert same(outs, reference.combine(setting, unweighted, ys))


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_pairs_come_back_as_they_are(trio, layout):
    way = (layout, "source")
    made = dispatched(trio, way)
    setting = setting_of(way)
    arrived = reference.dispatch(setting, GIVEN)
    ys = [
        reference.run_experts(setting, rank, each, PROGRAM.expert, torch.bfloat16) for rank, each in enumerate(arrived)
    ]
    for rank, pairs in enumerate(trio.run(lambda rank, ep: ep.combine(ys[rank], made[rank].handle, summed=False))):
        tokens, ks = (GIVEN[rank].topk_idx >= 0).nonzero(as_tuple=True)
        names = GIVEN[rank].topk_idx[tokens, ks].tolist()
        rows = [PROGRAM.expert(name, GIVEN[rank].x[token]) for name, token in zip(names, tokens.tolist(), strict=True)]
        assert torch.equal(pairs, torch.stack(rows) if rows else torch.empty(0, 16, dtype=torch.bfloat16))


def test_counts_and_waits_are_added_to_what_is_given(trio):
    def work(rank, ep, late):
        counts, seconds = torch.ones(len(ep.local_experts), dtype=torch.int64), torch.zeros(3, dtype=torch.float64)
        one, waited = GIVEN[rank], torch.zeros(3)
        time.sleep(late * (rank == 1))
        made = ep.dispatch(one.x, one.topk_idx, one.topk_weights, stats=counts, waited=waited)
        assert waited[rank] == 0
        ep.combine(made.x, made.handle, stats=seconds)
        assert torch.equal(counts, 1 + made.counts)
        assert (seconds >= 0).all()
        assert seconds[rank] == 0
        return float(waited[1])

    for late in (0.2, 2.0):  # a busy machine may keep the others for longer than the first
        found = trio.run(lambda rank, ep, late=late: work(rank, ep, late))
        if min(found[0], found[2]) > late / 2:
            return
    raise AssertionError(found)


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_a_bias_for_all_tokens_and_one_for_each(trio, layout):
    way = (layout, "holder")
    made = dispatched(trio, way)
    setting = setting_of(way)
    arrived = reference.dispatch(setting, GIVEN)
    ys = [
        reference.run_experts(setting, rank, each, PROGRAM.expert, torch.bfloat16) for rank, each in enumerate(arrived)
    ]
    rng = np.random.default_rng(0)
    shared = draw_rows(rng, 1, 16, torch.float32, "plain")[0][0]
    own = [draw_rows(rng, count, 16, torch.bfloat16, "plain")[0] for count in COUNTS]
    biases = [(shared.expand(count, 16), each) for count, each in zip(COUNTS, own, strict=True)]
    outs = trio.run(lambda rank, ep: ep.combine(ys[rank], made[rank].handle, bias=(shared, own[rank])))
    assert same(outs, reference.combine(setting, GIVEN, ys, biases=biases))

"""Handles: used again, held together, thrown away; results that outlive later steps; layers beside each other."""

from __future__ import annotations

import pytest
import torch
from moe_programs import Cached, Combine, CombineWeights, Dispatch, Drop, Program, check, even, play

from raynixl.errors import ConfigError, RaynixlError

WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)


def program(*steps, **more):
    return Program(3, even(3, 7), 16, 3, steps, **more)


def fresh(key, way=("tokens", "holder"), counts=(3, 0, 5), **more):
    return Dispatch(key, counts, way[0], 2, way[1], **more)


@every_way
def test_a_layout_is_used_again_for_other_rows(plays, way):
    plays(
        program(
            fresh("a", way, missing=0.2),
            Combine("a"),
            Cached("b", "a"),
            Combine("b"),
            Cached("c", "b", "bits"),
            Combine("c"),
        )
    )


@every_way
def test_a_layout_is_used_again_before_its_own_combine(plays, way):
    plays(program(fresh("a", way), Cached("b", "a"), Cached("c", "a"), Combine("c"), Combine("a"), Combine("b")))


@every_way
def test_two_handles_live_at_a_time_and_end_in_any_order(plays, way):
    other = ("experts", "holder") if way[0] == "tokens" else ("tokens", "source")
    first, second = fresh("a", way), fresh("b", other, (5, 2, 1))
    plays(program(first, second, Combine("b"), Combine("a")))
    plays(program(first, second, Combine("a"), Combine("b"), Combine("a")))


@every_way
def test_a_dispatch_needs_no_combine(plays, way):
    plays(program(fresh("a", way), fresh("b", way, (8, 1, 0)), Drop("a"), fresh("c", way), Combine("c"), Combine("b")))


def test_a_combine_may_be_made_again_with_other_rows(plays):
    plays(program(fresh("a"), Combine("a"), Combine("a", biases=1), CombineWeights("a"), Combine("a", out="given")))


def test_results_live_on_while_fifty_steps_go_by(plays):
    steps = [fresh("first")]
    for number in range(50):
        key = str(number)
        steps += [fresh(key, WAYS[number % 6], (number % 9, 3, 2)), Combine(key)]
    plays(program(*steps, Combine("first")))


def test_memory_is_used_again_when_nobody_views_it(crew):
    x, ids = torch.ones(6, 64, dtype=torch.bfloat16), torch.zeros(6, 1, dtype=torch.int64)

    def steps(rank, ep, count):
        places = set()
        for _ in range(count):
            made = ep.dispatch(x, ids)
            places.add(made.x.data_ptr())
            ep.combine(made.x, made.handle)
        return places

    with crew.experts(2, experts=2, hidden=64, topk=1, max_tokens=6) as layer:
        first, _ = layer.run(lambda rank, ep: steps(rank, ep, 20))
        later, _ = layer.run(lambda rank, ep: steps(rank, ep, 200))
        assert len(first | later) <= 8


@every_way
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_what_a_dispatch_returned_may_be_changed_in_place(crew, way, ids_dtype):
    x, weights = torch.arange(8.0).reshape(8, 1).expand(8, 16), torch.full((8, 2), 0.5)
    ids = (torch.arange(16).reshape(8, 2) % 4).to(ids_dtype)

    def work(rank, ep, changes):
        r = ep.dispatch(x, ids, weights, layout=way[0], weights_at=way[1])
        is_pairs = way[1] == "source" and way[0] != "experts"
        y = r.x[(r.topk_idx >= 0).nonzero()[:, :-1].unbind(1)] if is_pairs else r.x.clone()
        for told in (r.topk_idx, r.topk_weights, r.counts, r.offsets, r.tokens, r.sources):
            if changes and told is not None:
                told.fill_(-1)
        out, again = ep.combine(y, r.handle), ep.dispatch(x, handle=r.handle)
        return [out, again.topk_idx, again.counts, again.tokens, again.topk_weights]

    with crew.experts(experts=4, hidden=16, topk=2, max_tokens=8, dtype=torch.float32) as layer:
        wanted = layer.run(lambda rank, ep: work(rank, ep, changes=False))
        found = layer.run(lambda rank, ep: work(rank, ep, changes=True))
    for want, have in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True) if a is not None)


@pytest.mark.parametrize("count", [0, 2, 4, 8])
def test_a_handle_for_another_number_of_tokens_is_refused_on_all_ranks(crew, count):
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with crew.experts(3, experts=3, hidden=8, topk=1, max_tokens=8) as layer:
        rows = torch.ones(3, 8, dtype=torch.bfloat16)
        made = layer.run(lambda rank, ep: ep.dispatch(rows, ids))

        def again(rank, ep):
            ep.dispatch(torch.ones(count if rank == 1 else 3, 8, dtype=torch.bfloat16), handle=made[rank].handle)

        errors = layer.errors(again)
        assert all(isinstance(error, RaynixlError) for error in errors), errors
        assert all("3" in str(error) and str(count) in str(error) for error in errors), errors
        outs = layer.run(lambda rank, ep: ep.combine(made[rank].x, made[rank].handle))
        assert all(torch.equal(out, rows) for out in outs)


@pytest.mark.parametrize("shape", [(3, 8), (5, 8), (4, 7), (4, 8, 1)], ids=str)
def test_y_that_does_not_fit_the_handle_is_refused_on_all_ranks(crew, shape):
    ids = torch.arange(2)[:, None]
    with crew.experts(2, experts=2, hidden=8, topk=1, max_tokens=8) as layer:
        made = layer.run(lambda rank, ep: ep.dispatch(torch.ones(4, 8, dtype=torch.bfloat16), ids.repeat(2, 1)))
        y = torch.ones(4, 8, dtype=torch.bfloat16)
        bad = torch.ones(shape, dtype=torch.bfloat16)
        errors = layer.errors(lambda rank, ep: ep.combine(bad if rank == 0 else y, made[rank].handle))
        assert [type(error) for error in errors] == [ConfigError] * 2, errors
        assert all(torch.equal(out, y) for out in layer.run(lambda rank, ep: ep.combine(y, made[rank].handle)))


def test_two_layers_share_agents_and_take_turns(crew):
    one = program(*[each for key in "abcdef" for each in (fresh(key), Combine(key))], seed=1)
    two = program(
        *[each for key in "abc" for each in (fresh(key, ("slots", "source")), Combine(key))],
        dtype=torch.float32,
        seed=2,
    )
    with crew.experts(3, **one.options()) as first, crew.experts(3, **two.options()) as second:

        def both(rank, ep):
            mine = play(one, rank, ep)
            return mine, play(two, rank, second.eps[rank])

        played = first.run(both)
        check(one, [mine for mine, _ in played])
        check(two, [theirs for _, theirs in played])


def test_a_step_of_one_layer_lies_within_that_of_another(crew):
    rows = [torch.full((2, 8), rank + 1.0, dtype=torch.bfloat16) for rank in range(2)]
    ids = torch.tensor([[0], [1]])
    options = {"experts": 2, "hidden": 8, "topk": 1, "max_tokens": 2}
    with crew.experts(2, **options) as first, crew.experts(2, **options) as second:

        def nested(rank, ep):
            outer = ep.dispatch(rows[rank], ids)
            inner = second.eps[rank].dispatch(rows[1 - rank], ids)
            out = ep.combine(outer.x, outer.handle)
            return out, second.eps[rank].combine(inner.x, inner.handle)

        for rank, (out, other) in enumerate(first.run(nested)):
            assert torch.equal(out, rows[rank])
            assert torch.equal(other, rows[1 - rank])

"""Placements: any rank for any expert, replicas, and a new placement between two steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_programs import Cached, Combine, Dispatch, Place, Program, even, expected
from moe_rows import unpacked

from raynixl.errors import ConfigError, RangeError

EXPERTS = 8
ODD = (3, 0, 0, 2, 3, 3, 0, 2)  # rank 1 has none


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
@pytest.mark.parametrize("holders", [ODD, (0,) * EXPERTS, (1,) * EXPERTS, even(4, EXPERTS)[::-1]], ids=str)
def test_experts_lie_anywhere(plays, layout, weights_at, holders):
    steps = Dispatch("a", (3, 5, 0, 2), layout, 2, weights_at, missing=0.2), Combine("a")
    plays(Program(4, holders, 16, 3, steps))


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_a_new_placement_counts_from_the_next_step_on(plays, layout):
    steps = []
    for number, holders in enumerate([ODD, even(4, EXPERTS)[::-1], (2,) * EXPERTS, even(4, EXPERTS)]):
        key = str(number)
        steps += [Dispatch(key, (3, number, 0, 2), layout), Combine(key), Place(holders)]
        steps += [Dispatch(key + "b", (3, number, 0, 2), layout, weights_at="source"), Combine(key + "b")]
    plays(Program(4, even(4, EXPERTS), 16, 3, tuple(steps)))


@pytest.mark.parametrize("layout", ["tokens", "experts"])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_a_handle_from_before_is_combined_after(plays, layout, weights_at):
    steps = Dispatch("a", (3, 5, 0, 2), layout, 2, weights_at), Place(ODD), Combine("a"), Dispatch("b", (1, 1, 1, 1))
    plays(Program(4, even(4, EXPERTS), 16, 3, (*steps, Combine("b"), Combine("a"))))


def test_a_placement_tells_each_rank_its_experts(crew):
    with crew.experts(4, experts=EXPERTS, hidden=8, topk=2, max_tokens=4, placement=ODD) as layer:
        assert [ep.local_experts for ep in layer.eps] == [(1, 2, 6), (), (3, 7), (0, 4, 5)]
        layer.run(lambda rank, ep: ep.place(even(4, EXPERTS)))
        assert [ep.local_experts for ep in layer.eps] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_without_a_placement_ranks_have_equal_shares(crew):
    with crew.experts(4, experts=10, hidden=8, topk=2, max_tokens=4) as layer:
        assert [ep.local_experts for ep in layer.eps] == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]


@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_replicas_of_an_expert_take_their_share(plays, weights_at):
    """Expert 0 is hot and has a replica on each rank: physical 4, 8, 12 are it too."""
    holders = (0, 0, 1, 1, 1, 2, 2, 3, 2, 0, 1, 2, 3, 3, 3, 0)
    steps = Dispatch("a", (6, 6, 6, 6), "experts", 4, weights_at, has_duplicates=True), Combine("a"), Cached("b", "a")
    plays(Program(4, holders, 16, 4, (*steps, Combine("b")), experts=4))


def test_replicas_change_no_bit_when_weights_apply_at_the_source(crew):
    """Four logical experts on two ranks; then each has a replica, to which every other token goes."""
    plain = Program(2, even(2, 4), 16, 2, (Dispatch("a", (5, 5), weights_at="source"), Combine("a")))
    wanted = [unpacked(each[-1][0]) for each in expected(plain)]
    x, ids, weights = zip(*(_given(plain, rank) for rank in range(2)), strict=True)
    options = {**plain.options(), "experts": 8, "placement": (0, 0, 1, 1, 1, 1, 0, 0)}

    def work(rank, ep):
        spread = ids[rank] + 4 * (torch.arange(5)[:, None] % 2)
        made = ep.dispatch(x[rank], spread, weights[rank], weights_at="source")
        rows, k = (made.topk_idx >= 0).nonzero(as_tuple=True)
        names = torch.tensor(ep.local_experts)[made.topk_idx[rows, k]] % 4
        pairs = zip(names.tolist(), made.x[rows], strict=True)
        return ep.combine(torch.stack([plain.expert(name, row) for name, row in pairs]), made.handle)

    with crew.experts(2, **options) as layer:
        assert all(torch.equal(*pair) for pair in zip(layer.run(work), wanted, strict=True))


@pytest.mark.parametrize("holders", [(0,) * 7, (0,) * 9, (4,) * 8, ((0, 1),) * 4, "abcdefgh"], ids=str)
def test_placements_that_make_no_sense_are_refused_at_once(crew, holders):
    with crew.experts(4, experts=EXPERTS, hidden=8, topk=1, max_tokens=4) as layer:
        for error in layer.errors(lambda rank, ep: ep.place(holders)):
            assert isinstance(error, ConfigError)


def test_placements_that_differ_between_ranks_are_an_error_of_all(crew):
    x, ids = torch.ones(2, 8, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    with crew.experts(3, experts=EXPERTS, hidden=8, topk=1, max_tokens=4) as layer:

        def differ(rank, ep):
            ep.place(even(3, EXPERTS) if rank else (0,) * EXPERTS)
            ep.dispatch(x, ids)

        assert [type(error) for error in layer.errors(differ)] == [ConfigError] * 3


@pytest.mark.parametrize("bad", [EXPERTS, -2, 2**31 - 1])
@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_ids_of_no_expert_are_an_error_of_all_ranks(crew, bad, layout):
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with crew.experts(3, experts=EXPERTS, hidden=8, topk=1, max_tokens=4) as layer:
        ids = torch.tensor([[0], [1]])

        def work(rank, ep):
            ep.dispatch(x, torch.tensor([[0], [bad]]) if rank == 1 else ids, layout=layout)

        errors = layer.errors(work)
        assert [type(error) for error in errors] == [RangeError] * 3
        assert all(str(bad) in str(error) for error in errors), errors
        outs = layer.run(lambda rank, ep: ep.combine((made := ep.dispatch(x, ids)).x, made.handle))
        assert all(torch.equal(out, x) for out in outs)


def _given(program, rank):
    from moe_programs import tokens_of

    given = tokens_of(program, 0, (5, 5), rank)
    return given.x, given.topk_idx, given.topk_weights


def test_numpy_arrays_are_placements_too(crew):
    with crew.experts(2, experts=4, hidden=8, topk=1, max_tokens=4, placement=np.array([1, 0, 0, 1])) as layer:
        assert [ep.local_experts for ep in layer.eps] == [(1, 2), (0, 3)]

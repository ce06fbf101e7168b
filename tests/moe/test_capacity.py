"""More rows than a slot holds find their place all the same; more tokens than were said are refused everywhere."""

from __future__ import annotations

import pytest
import torch
from moe_programs import Cached, Combine, Dispatch, Program, even

from raynixl.errors import RangeError

ROWS = 24  # of three ranks with 8 tokens each, all for rank 0
WAYS = [("tokens", "holder"), ("tokens", "source"), ("experts", "holder"), ("experts", "source")]


def crowded(capacity, layout="tokens", weights_at="holder", counts=(8, 8, 8), **more):
    first = Dispatch("a", counts, layout, 2, weights_at, only=(0, 1))
    steps = (first, Combine("a"), Dispatch("b", (8, 1, 0)), Combine("b"), Cached("c", "a"), Combine("c"))
    return Program(3, even(3, 6), 16, 2, steps, max_tokens=8, capacity=capacity, **more)


@pytest.mark.parametrize("layout_and_place", WAYS, ids="-".join)
@pytest.mark.parametrize("capacity", [ROWS + 1, ROWS, ROWS - 1, ROWS // 2, 8, 1], ids=lambda rows: f"{rows}-rows")
def test_rows_that_fill_pass_and_far_pass_the_capacity(plays, capacity, layout_and_place):
    plays(crowded(capacity, *layout_and_place))


@pytest.mark.parametrize("counts", [(8, 8, 8), (8, 0, 0), (0, 8, 8), (2, 1, 2)], ids=str)
def test_only_some_ranks_pass_it(plays, counts):
    plays(crowded(4, counts=counts))


@pytest.mark.parametrize("layout_and_place", WAYS, ids="-".join)
def test_pairs_that_come_back_pass_it_though_rows_did_not(plays, layout_and_place):
    first = Dispatch("a", (8, 0, 8), layout_and_place[0], 1, layout_and_place[1], has_duplicates=True)
    plays(Program(3, even(3, 6), 16, 8, (first, Combine("a")), max_tokens=8, capacity=8))


def test_wider_rows_back_than_forth_pass_it(crew):
    def work(rank, ep):
        made = ep.dispatch(torch.full((8, 16), rank + 1, dtype=torch.int8), torch.tensor([[0, 1]] * 8))
        return ep.combine(made.x.double(), made.handle)

    with crew.experts(2, experts=2, hidden=16, topk=2, max_tokens=8, dtype=torch.int8, capacity=8) as layer:
        for rank, out in enumerate(layer.run(work)):
            assert torch.equal(out, torch.full((8, 16), 2.0 * (rank + 1), dtype=torch.float64))


def test_step_after_step_passes_it(plays):
    steps = []
    for number in range(12):
        steps += [Dispatch(f"{number}", (number % 9, 8, 8 - number % 5), only=(number % 6,)), Combine(f"{number}")]
    plays(Program(3, even(3, 6), 16, 2, tuple(steps), max_tokens=8, capacity=5))


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
@pytest.mark.parametrize("guilty", [(1,), (0, 2)], ids=str)
def test_too_many_tokens_of_one_rank_are_an_error_of_all_and_the_next_step_works(crew, layout, guilty):
    def tokens(count):
        return torch.ones(count, 8, dtype=torch.bfloat16), torch.zeros(count, 1, dtype=torch.int64)

    with crew.experts(3, experts=3, hidden=8, topk=1, max_tokens=4) as layer:
        errors = layer.errors(lambda rank, ep: ep.dispatch(*tokens(5 if rank in guilty else 4), layout=layout))
        assert [type(error) for error in errors] == [RangeError] * 3
        assert all("5" in str(error) and "4" in str(error) for error in errors), errors
        assert all(f"rank {guilty[0]}" in str(errors[rank]) for rank in range(3) if rank not in guilty), errors
        made = layer.run(lambda rank, ep: ep.combine((got := ep.dispatch(*tokens(4), layout=layout)).x, got.handle))
        assert all(torch.equal(out, tokens(4)[0]) for out in made)

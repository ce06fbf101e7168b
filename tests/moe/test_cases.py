"""Whatever tokens and routers come up with: each case gives the bits of the reference, in every layout."""

from __future__ import annotations

import pytest
import torch
from moe_programs import Cached, Combine, CombineWeights, Dispatch, Program, even

WAYS = [
    ("tokens", 1, "holder"), ("tokens", 1, "source"), ("experts", 1, "holder"), ("experts", 8, "holder"),
    ("experts", 4, "source"), ("slots", 1, "holder"), ("slots", 1, "source"),
]  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))


def once(way, counts, *, holders=None, topk=3, hidden=16, steps=(), **more):
    """One dispatch and its combine."""
    layout, alignment, weights_at = way
    first = Dispatch("a", counts, layout, alignment, weights_at, **more)
    world = len(counts)
    holders = even(world, 8) if holders is None else holders
    return Program(world, holders, hidden, topk, (first, *(steps or (Combine("a"),))), max_tokens=max(8, *counts))


@every_way
@pytest.mark.parametrize(
    "counts", [(3, 0, 5, 2), (0, 0, 0, 0), (0, 0, 7, 0), (1, 1, 1, 1), (8,), (0,), (2, 9)], ids=str
)
def test_any_number_of_tokens_on_each_rank(plays, way, counts):
    plays(once(way, counts))


@every_way
def test_all_tokens_go_to_one_rank(plays, way):
    plays(once(way, (4, 3, 5, 2), only=(2, 3), topk=2))


@every_way
def test_no_token_goes_to_one_rank(plays, way):
    plays(once(way, (4, 3, 5, 2), only=(0, 1, 4, 5, 6)))


@every_way
@pytest.mark.parametrize("missing", [0.3, 0.9])
def test_ids_of_nobody_in_some_places_and_whole_tokens(plays, way, missing):
    plays(once(way, (6, 6, 6), missing=missing))


@every_way
@pytest.mark.parametrize("silent", [(1,), (0, 2), (0, 1, 2)], ids=str)
def test_ids_of_nobody_on_whole_ranks(plays, way, silent):
    plays(once(way, (3, 4, 2), silent=silent))


@every_way
def test_the_same_expert_several_times_in_a_token(plays, way):
    plays(once(way, (4, 0, 6), topk=5, has_duplicates=True))
    plays(once(way, (4, 0, 6), topk=3, only=(5,), has_duplicates=True))


@every_way
@pytest.mark.parametrize(("topk", "experts"), [(1, 8), (22, 64), (8, 8), (16, 16), (5, 3)])
def test_one_or_many_or_all_experts_for_a_token(plays, way, topk, experts):
    plays(once(way, (3, 5, 2, 4), topk=topk, holders=even(4, experts)))


@every_way
@pytest.mark.parametrize(("world", "experts"), [(4, 10), (3, 256), (5, 3), (8, 2), (1, 6), (1, 1), (7, 7)])
def test_ranks_need_not_divide_experts_nor_have_any(plays, way, world, experts):
    plays(once(way, (4, 2, 1, 0, 3, 5, 2, 1)[:world], holders=even(world, experts), topk=min(4, experts)))


@every_way
def test_ids_of_32_bits(plays, way):
    plays(once(way, (3, 4), ids_dtype=torch.int32, missing=0.2))


@every_way
def test_no_weights(plays, way):
    plays(once(way, (3, 4, 0), is_weighted=False, missing=0.2))


@every_way
def test_rows_that_are_not_contiguous(plays, way):
    plays(once(way, (3, 4, 5), x_kind="strided"))


@every_way
def test_nans_and_any_other_bits_pass_through(plays, way):
    plays(once(way, (6, 4, 5), x_kind="bits"))


@every_way
@pytest.mark.parametrize("biases", [1, 2])
def test_biases_are_added_at_the_source(plays, way, biases):
    plays(once(way, (3, 0, 4), steps=(Combine("a", biases=biases),), missing=0.5))


@every_way
@pytest.mark.parametrize("out", ["given", "float32"])
def test_a_result_goes_where_it_shall(plays, way, out):
    plays(once(way, (3, 0, 4), steps=(Combine("a", out=out, biases=1),)))


@every_way
@pytest.mark.parametrize("out", ["", "given"])
def test_y_and_the_result_lie_within_wider_tensors(plays, way, out):
    plays(once(way, (3, 0, 4), steps=(Combine("a", out=out, is_strided=True),)))
    plays(once(way, (3, 0, 4), hidden=1, steps=(Combine("a", out=out, is_strided=True),)))


@every_way
def test_steps_that_are_waited_for_later(plays, way):
    plays(
        once(
            way,
            (3, 0, 4),
            steps=(Combine("a", is_async=True), Cached("b", "a", is_async=True), Combine("b")),
            is_async=True,
        )
    )


@pytest.mark.parametrize("way", [way for way in WAYS if way[0] != "slots"], ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize("has_duplicates", [False, True])
def test_weights_that_come_back(plays, way, has_duplicates):
    plays(once(way, (3, 0, 4, 5), steps=(CombineWeights("a"),), missing=0.3, has_duplicates=has_duplicates))

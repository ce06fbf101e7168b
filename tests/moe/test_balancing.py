"""Hot experts get replicas, ranks get equal work, and tokens are spread over replicas alike everywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import ConfigError, RangeError
from raynixl.moe.balancing import Replicas, balance
from raynixl.moe.placement import Placement

pytestmark = pytest.mark.pure

LOADS = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)


def work(placement, logical, loads, ranks):
    """What each rank has to do if tokens are spread evenly over replicas."""
    each = np.asarray(loads, float) / np.bincount(logical, minlength=len(loads))
    return [sum(each[logical[e]] for e in placement.experts_of(rank)) for rank in range(ranks)]


def test_the_hottest_experts_get_the_replicas_and_ranks_equal_work():
    loads = [100, 10, 10, 10, 60, 10]
    placement, logical = balance(loads, 2, 8)
    assert Counter(logical.tolist()) == {0: 2, 4: 2, 1: 1, 2: 1, 3: 1, 5: 1}
    assert work(placement, logical, loads, 2) == [100.0, 100.0]
    assert [set(logical[list(placement.experts_of(rank))].tolist()) >= {0, 4} for rank in (0, 1)] == [True, True]


def test_without_replicas_the_heavy_experts_are_spread():
    loads = [8, 7, 1, 2]
    placement, logical = balance(loads, 2, 4)
    assert logical.tolist() == [0, 2, 1, 3]
    assert placement.holders.tolist() == [0, 0, 1, 1]


def test_a_skewed_layer_becomes_nearly_even():
    loads = np.random.default_rng(0).zipf(1.3, 256).clip(0, 10_000)
    placement, logical = balance(loads, 8, 288)
    done = work(placement, logical, loads, 8)
    assert max(done) < 1.01 * np.mean(done)
    assert max(work(Placement.even(256, 8), np.arange(256), loads, 8)) > 1.3 * np.mean(done)


def test_experts_without_load_share_the_replicas_that_are_left():
    placement, logical = balance([0, 0, 0], 3, 6)
    assert Counter(logical.tolist()) == {0: 2, 1: 2, 2: 2}
    assert all(len(set(logical[list(placement.experts_of(rank))])) == 2 for rank in range(3))


def test_an_expert_has_no_more_replicas_than_ranks_while_others_can_have_them():
    _, logical = balance([1000, 1, 1], 2, 6)
    assert Counter(logical.tolist()) == {0: 2, 1: 2, 2: 2}
    _, logical = balance([5], 2, 5)
    assert logical.tolist() == [0] * 5


@given(LOADS, st.integers(1, 6), st.integers(0, 12))
def test_every_expert_lies_somewhere_and_ranks_have_equally_many(loads, ranks, extra):
    physical = len(loads) + extra
    placement, logical = balance(loads, ranks, physical)
    assert placement.experts == len(logical) == physical
    assert set(logical.tolist()) == set(range(len(loads)))
    assert placement.holders.tolist() == Placement.even(physical, ranks).holders.tolist()
    for rank in range(ranks):
        mine = logical[list(placement.experts_of(rank))].tolist()
        assert mine == sorted(mine)
    again, same = balance(np.array(loads), ranks, physical)
    assert again == placement
    assert same.tolist() == logical.tolist()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_choice_of_replicas_makes_the_hottest_one_cooler(loads, extra):
    ranks = len(loads) + extra  # so many that their number is no limit
    _, logical = balance(loads, ranks, ranks)
    counts = np.bincount(logical)
    best = min(
        max(load / count for load, count in zip(loads, other, strict=True))
        for other in itertools.product(range(1, extra + 2), repeat=len(loads))
        if sum(other) == ranks
    )
    assert max(load / count for load, count in zip(loads, counts, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("loads", "ranks", "physical"),
    [([], 1, 1), ([1, 2], 1, 1), ([1], 0, 1), ([-1], 1, 1), ([float("nan")], 1, 1), ([float("inf")], 1, 1),
     ([[1], [2]], 1, 2), (["x"], 1, 1), ([1], 1, 1 << 21)],
)  # fmt: skip
def test_what_cannot_be_balanced_is_refused(loads, ranks, physical):
    with pytest.raises(ConfigError):
        balance(loads, ranks, physical)


def test_tokens_go_to_the_replicas_of_their_expert_in_turn():
    replicas = Replicas([0, 1, 0, 2, 0])
    ids = np.array([[0, 1], [0, -1], [0, 2], [0, 0]], np.int64)
    assert replicas.choose(ids).tolist() == [[0, 1], [2, -1], [4, 3], [0, 0]]
    assert replicas.choose(ids, first=1).tolist() == [[2, 1], [4, -1], [0, 3], [2, 2]]
    assert replicas.counts.tolist() == [3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0, 2), (5, 0), (5, 3), (5,)])
def test_ids_keep_their_type_and_shape(dtype, shape):
    ids = torch.zeros(shape, dtype=dtype)
    chosen = Replicas([0, 0]).choose(ids)
    assert (chosen.dtype, chosen.shape) == (ids.dtype, ids.shape)
    assert Replicas([0, 0]).choose(ids.numpy()).tolist() == chosen.tolist()


def test_ids_that_are_not_contiguous_are_chosen_for_as_others():
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]]).t()
    replicas = Replicas([1, 0, 1])
    assert replicas.choose(ids).tolist() == replicas.choose(ids.contiguous()).tolist() == [[1, 0], [2, 2], [-1, 1]]


@pytest.mark.parametrize("bad", [-2, 2])
def test_an_id_of_no_expert_is_refused(bad):
    with pytest.raises(RangeError):
        Replicas([0, 1, 1]).choose(np.array([[0, bad]]))


def test_replicas_that_nobody_holds_are_not_chosen_while_others_are_held():
    placement = Placement([0, 1, 2, 1]).without([1])
    replicas = Replicas([0, 0, 0, 1], placement)
    ids = np.zeros((4, 1), np.int32)
    assert replicas.choose(ids).ravel().tolist() == [0, 2, 0, 2]
    assert replicas.choose(ids + 1).ravel().tolist() == [3] * 4, "none of it is held: whoever routes drops the pair"


@pytest.mark.parametrize("logical", [[], [1], [0, 2], [-1, 0], [0.5], [[0]]])
def test_experts_without_a_replica_are_refused(logical):
    with pytest.raises(ConfigError):
        Replicas(logical)


def test_replicas_of_another_placement_are_refused():
    with pytest.raises(ConfigError):
        Replicas([0, 1], Placement([0, 1, 1]))


@given(st.data(), LOADS, st.integers(1, 4), st.integers(0, 8), st.integers(0, 9))
def test_choices_stand_for_the_expert_asked_for_and_are_spread_evenly(data, loads, ranks, extra, first):
    placement, logical = balance(loads, ranks, len(loads) + extra)
    rows = data.draw(st.lists(st.lists(st.integers(-1, len(loads) - 1), min_size=3, max_size=3), min_size=1))
    ids = np.array(rows, np.int32)
    replicas = Replicas(logical, placement)
    chosen = replicas.choose(ids, first=first)
    assert (np.where(chosen < 0, -1, logical[chosen]) == ids).all()
    same = np.full((60, 1), data.draw(st.integers(0, len(loads) - 1)))
    uses = np.bincount(replicas.choose(same, first=first).ravel(), minlength=len(logical))
    mine = uses[logical == same[0, 0]]
    assert mine.max() - mine.min() <= 1

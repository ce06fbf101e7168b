"""A placement says who holds which expert, alike in every process, and refuses what is no placement."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import ConfigError
from raynixl.moe.placement import Placement, even_sizes

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("experts", "ranks", "holders"),
    [
        (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (10, 4, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]),
        (2, 4, [0, 1]),
        (3, 1, [0, 0, 0]),
        (1, 1, [0]),
    ],
)
def test_even_blocks_differ_by_one_at_most_and_the_first_are_the_larger(experts, ranks, holders):
    assert Placement.even(experts, ranks).holders.tolist() == holders


def test_local_ids_count_the_experts_of_a_rank_by_ascending_physical_id():
    placement = Placement([2, 0, 2, -1, 0, 2])
    assert placement.local.tolist() == [0, 0, 1, -1, 1, 2]
    assert placement.experts_of(2) == (0, 2, 5)
    assert placement.experts_of(0) == (1, 4)
    assert placement.experts_of(1) == ()
    assert placement.experts_of(-1) == ()
    assert placement.experts == 6


def test_without_ranks_nobody_holds_their_experts_and_the_others_keep_their_numbers():
    placement = Placement([2, 0, 2, 1, 0, 2])
    left = placement.without([0, 1])
    assert left.holders.tolist() == [2, -1, 2, -1, -1, 2]
    assert left.local.tolist() == [0, -1, 1, -1, -1, 2]
    assert placement.without([]) == placement
    assert placement.without([7]) == placement
    assert placement.without([0, 1, 2]).holders.tolist() == [-1] * 6


def test_a_placement_is_a_value():
    placement = Placement([0, 1, 0])
    assert placement == Placement(np.array([0, 1, 0], np.uint64))
    assert placement != Placement([0, 1, 1])
    assert placement != [0, 1, 0]
    assert hash(placement) == hash(Placement((0, 1, 0)))
    assert pickle.loads(pickle.dumps(placement)) == placement
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.holders = None
    with pytest.raises(ValueError, match="read-only"):
        placement.holders[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        placement.local[0] = 1


def test_it_does_not_change_with_the_array_that_it_was_made_of():
    holders = np.zeros(3, np.int32)
    placement = Placement(holders)
    holders[:] = 5
    assert placement.holders.tolist() == [0, 0, 0]


def test_digests_are_the_same_in_every_process_and_version():
    assert Placement([0, 1, -1, 70000]).digest == 0x82037F36
    assert Placement([0, 1]).digest != Placement([1, 0]).digest


@pytest.mark.parametrize(
    "holders",
    [[], [[0, 1]], [0.0, 1.0], ["a"], [-2], [1 << 20], [True], None, [[0], [1, 2]], "0", [2**63], [None]],
    ids=repr,
)
def test_what_is_no_placement_is_refused(holders):
    with pytest.raises(ConfigError):
        Placement(holders)


@pytest.mark.parametrize(("experts", "ranks"), [(0, 1), (1, 0), (-1, 4)])
def test_even_blocks_need_an_expert_and_a_rank(experts, ranks):
    with pytest.raises(ConfigError):
        Placement.even(experts, ranks)


def test_a_placement_of_other_experts_or_ranks_is_refused():
    placement = Placement([0, 3, -1])
    placement.check(experts=3, ranks=4)
    with pytest.raises(ConfigError, match="3 experts where there are 4"):
        placement.check(experts=4, ranks=4)
    with pytest.raises(ConfigError, match="expert 1 is placed on rank 3 of 3"):
        placement.check(experts=3, ranks=3)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.sets(st.integers(0, 6)))
def test_holders_local_ids_and_experts_of_ranks_agree(holders, gone):
    placement = Placement(holders)
    for rank in range(7):
        assert placement.experts_of(rank) == tuple(e for e, holder in enumerate(holders) if holder == rank)
        assert [placement.local[e] for e in placement.experts_of(rank)] == list(range(len(placement.experts_of(rank))))
    left = placement.without(gone)
    assert all(left.experts_of(rank) == (() if rank in gone else placement.experts_of(rank)) for rank in range(7))
    assert (left == placement) == (left.digest == placement.digest)


@given(st.integers(1, 300), st.integers(1, 40))
def test_even_shares_add_up(experts, ranks):
    sizes = even_sizes(experts, ranks)
    assert sizes.sum() == experts
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()
    assert np.bincount(Placement.even(experts, ranks).holders, minlength=ranks).tolist() == sizes.tolist()

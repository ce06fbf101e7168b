"""The simulator: every row comes once, every partial sum counts once, and messages are few."""

import math

import numpy as np
import pytest

from raynixl.errors import ConfigError
from raynixl.moe.grid import Grid, make_grid
from raynixl.moe.placement import Placement
from raynixl.moe.simulator import Draw, Simulation, _Play, simulate_flat, simulate_two_level, traffic

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("skew", [0.0, 1.2])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 8, 16, 61, 64])
def test_each_token_comes_to_each_holder_once_and_is_summed_once(world, skew):
    holders = Placement.even(96, world).holders
    ids = Draw(skew, seed=world).experts(33 * world, 96, 6)
    plain, staged = simulate_flat(world, ids, holders), simulate_two_level(make_grid(world), ids, holders)
    assert plain.is_exact
    assert staged.is_exact
    assert plain.arrived == staged.arrived == len(np.unique(np.arange(len(ids))[:, None] * world + holders[ids]))
    for simulation in (plain, staged):
        for stage in simulation.stages:
            assert not stage.rows[~(stage.linked | np.eye(world, dtype=bool))].any(), "a row goes where no line goes"


@pytest.mark.parametrize("world", [64, 256, 1024])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_messages_grow_with_the_square_root_of_ranks(world, skew):
    holders = Placement.even(1024, world).holders
    ids = Draw(skew).experts(16 * world, 1024, 8)
    simulation = simulate_two_level(make_grid(world), ids, holders)
    assert simulation.is_exact
    assert simulation.peers().max() <= 2 * math.isqrt(world)
    assert simulation.messages().max() <= 5 * 2 * math.isqrt(world)  # out: counts, rows, line; back: rows, line
    assert simulation.pair_messages() == 2


def test_hosts_and_local_indices_bound_the_peers():
    grid = make_grid(1024, [rank // 8 for rank in range(1024)])
    ids = Draw().experts(1024, 1024, 8)
    assert simulate_two_level(grid, ids, range(1024)).peers().max() == 127 + 7


@pytest.mark.parametrize("world", [127, 1000, 1009])
def test_uneven_numbers_of_ranks_are_exact_and_have_few_messages(world):
    ids = Draw(0.8).experts(8 * world, 2048, 8)
    simulation = simulate_two_level(make_grid(world), ids, Placement.even(2048, world).holders)
    assert simulation.is_exact
    assert simulation.peers().max() <= 3 * math.sqrt(world)


def test_groups_of_any_sizes_are_exact():
    grid = Grid(((0, 4, 5, 6), (1,), (2, 3)))
    ids = Draw().experts(70, 30, 30)
    simulation = simulate_two_level(grid, ids, [0] * 10 + [2] * 10 + [6] * 10)
    assert simulation.is_exact
    assert simulation.arrived == 70 * 3


def test_all_tokens_at_one_rank_and_experts_nobody_uses():
    ids = np.full((64, 1), 5)
    simulation = simulate_two_level(make_grid(16), ids, range(16))
    assert simulation.is_exact
    assert simulation.stages[1].rows.sum(0).tolist() == [0] * 5 + [64] + [0] * 10
    assert simulate_two_level(make_grid(4), np.empty((0, 2), np.int64), range(4)).is_exact


def test_rows_between_hosts_are_counted_once_for_each_host():
    ids = np.array([[2, 3], [2, 0], [0, 1], [2, 1]])
    hosts = np.array([0, 0, 1, 1])
    plain = traffic(simulate_flat(4, ids, range(4)).stages, hosts)
    staged = traffic(simulate_two_level(make_grid(4, hosts.tolist()), ids, range(4)).stages, hosts)
    assert (plain.network, plain.busiest_host, plain.busiest_rank) == (6, 3, 2)
    assert (staged.network, staged.busiest_host, staged.busiest_rank) == (4, 2, 1)
    assert plain.inside == 2
    assert staged.inside == 2 + 8


def test_a_row_that_is_lost_or_doubled_and_a_sum_that_lacks_one_are_found():
    play = _Play(2, Draw().experts(6, 4, 2), [0, 0, 1, 1])
    rows, sums = np.unique(play.wanted()), play._values.sum(1)

    def played(rows, sums) -> Simulation:
        return play.result(None, (), rows, sums)

    assert played(rows, sums).is_exact
    assert (played(rows[1:], sums).missing, played(rows[1:], sums).duplicates) == (1, 0)
    assert (played(np.append(rows, rows[:1]), sums).missing, played(np.append(rows, rows[:1]), sums).duplicates) == (
        0,
        1,
    )
    assert played(rows, sums - play._values[:, 0] * (np.arange(6) == 2)).wrong_sums == 1


@pytest.mark.parametrize(("skew", "topk"), [(0.0, 8), (0.0, 100), (1.0, 8), (1.0, 128)])
def test_experts_of_a_token_are_different_and_as_popular_as_said(skew, topk):
    ids = Draw(skew, seed=1).experts(5000, 128, topk)
    assert ids.shape == (5000, topk)
    assert (np.diff(np.sort(ids, 1), axis=1) > 0).all()
    popularity = np.sort(np.bincount(ids.ravel(), minlength=128))
    if skew == 0:
        assert popularity.min() > 0.8 * popularity.mean()
    elif topk == 8:
        assert popularity[-1] > 10 * popularity[64]


def test_draws_are_repeated_by_their_seed():
    one, same, other = (Draw(0.5, seed).experts(100, 64, 4) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("topk", [0, 5])
def test_more_experts_than_there_are_cannot_be_drawn(topk):
    with pytest.raises(ConfigError):
        Draw().experts(3, 4, topk)

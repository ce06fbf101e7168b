"""Grids: who is beside whom, and who stands in for whom."""

import math

import numpy as np
import pytest

from raynixl.errors import ConfigError
from raynixl.moe.grid import Grid, make_grid

pytestmark = pytest.mark.pure


def test_hosts_of_equal_size_are_the_groups():
    grid = make_grid(6, ["a", "b", "a", "b", "c", "c"])
    assert grid.groups == ((0, 2), (1, 3), (4, 5))
    assert grid.group_of().tolist() == [0, 1, 0, 1, 2, 2]
    assert grid.local_of().tolist() == [0, 0, 1, 1, 0, 1]
    assert [grid.column(0), grid.column(1)] == [(0, 1, 4), (2, 3, 5)]
    assert [grid.columns_of(rank) for rank in range(6)] == [(0,), (0,), (1,), (1,), (0,), (1,)]
    assert grid.is_even


@pytest.mark.parametrize(
    ("hosts", "why"),
    [(None, "hosts are not known"), (["a"] * 9, "there is one"), (range(9), "each rank has its own")],
)
def test_without_a_host_for_some_ranks_each_the_grid_is_square(hosts, why):
    assert make_grid(9, hosts).groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8)), why


def test_ranks_of_uneven_hosts_come_into_groups_with_their_neighbours():
    assert make_grid(6, ["a", "b", "a", "b", "a", "a"]).groups == ((0, 2, 4), (1, 3, 5))


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3]), (7, [4, 3]), (8, [4, 4]), (64, [8] * 8),
     (1024, [32] * 32)],
)  # fmt: skip
def test_sizes_of_square_grids(world, sizes):
    assert [len(group) for group in make_grid(world).groups] == sizes


@pytest.mark.parametrize("world", [*range(1, 70), 127, 509, 1000, 1009, 1023, 1024])
def test_every_rank_reaches_every_group_through_its_column_with_few_peers(world):
    grid = make_grid(world)
    forwarders = grid.forwarders()
    assert forwarders.shape == (len(grid.groups), grid.width)
    assert np.array_equal(forwarders[grid.group_of(), grid.local_of()], np.arange(world))
    assert np.array_equal(grid.group_of()[forwarders], np.arange(len(grid.groups))[:, None].repeat(grid.width, 1))
    for rank in range(world):
        columns = grid.columns_of(rank)
        assert columns[0] == grid.local_of()[rank]
        assert columns == tuple(column for column in range(grid.width) if rank in grid.column(column))
        inside = len(grid.groups[grid.group_of()[rank]]) - 1
        most = 2.0 if grid.is_even and math.isqrt(world) ** 2 == world else 2 * math.sqrt(2)
        assert len(columns) * (len(grid.groups) - 1) + inside <= most * math.sqrt(world) + 2


def test_of_grids_with_as_few_peers_an_even_one_is_made():
    assert make_grid(8).is_even
    assert make_grid(12).is_even


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0,), (2,)), ((0, 1), ())])
def test_groups_that_are_no_grid_are_refused(groups):
    with pytest.raises(ConfigError):
        Grid(groups)


@pytest.mark.parametrize(("world", "hosts"), [(0, None), (3, ["a", "b"])])
def test_hosts_that_do_not_fit_the_ranks_are_refused(world, hosts):
    with pytest.raises(ConfigError):
        make_grid(world, hosts)

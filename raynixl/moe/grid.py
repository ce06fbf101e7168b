"""The grid that ranks form where rows travel in two stages: groups of neighbours, and columns across them. Pure.

A group is a host where hosts are known and all have as many ranks. Otherwise groups are made so that the busiest rank
has the fewest peers, about as many as the square root of all, with sizes that differ by one at most.

A column has the ranks of one local index, one in each group. Where a group has none of that index, another one of its
members stands in: it belongs to two columns. So each rank reaches every group through its own column.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from raynixl.errors import ConfigError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of ranks, each ascending; groups are numbered by their order, local indices by the place in the group."""

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = [rank for group in self.groups for rank in group]
        if sorted(ranks) != list(range(len(ranks))) or not all(self.groups):
            raise ConfigError(f"the groups {self.groups!r:.200} are no grid", hint="put each rank into one group")

    def __str__(self) -> str:
        fewest = min(len(group) for group in self.groups)
        each = str(self.width) if fewest == self.width else f"{fewest} or {self.width}"
        return f"{len(self.groups)} groups of {each} ranks"

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return sum(len(group) for group in self.groups)

    @property
    def width(self) -> int:
        """How many columns there are: as many as the largest group has members."""
        return max(len(group) for group in self.groups)

    @property
    def is_even(self) -> bool:
        """Whether all groups have as many ranks, so that nobody stands in for another."""
        return all(len(group) == self.width for group in self.groups)

    def group_of(self) -> Ints:
        """Return the group of each rank."""
        return self._by_rank(number for number, group in enumerate(self.groups) for _ in group)

    def local_of(self) -> Ints:
        """Return the local index of each rank, which is also the column that its own rows take."""
        return self._by_rank(local for group in self.groups for local in range(len(group)))

    def forwarder(self, group: int, column: int) -> int:
        """Return the member of a group that takes part in a column."""
        members = self.groups[group]
        return members[column % len(members)]

    def column(self, column: int) -> tuple[int, ...]:
        """Return the ranks of a column, by group."""
        return tuple(self.forwarder(group, column) for group in range(len(self.groups)))

    def forwarders(self) -> Ints:
        """Return all columns at once: the rank of each (group, column)."""
        return np.array([self.column(column) for column in range(self.width)], np.int64).T

    def columns_of(self, rank: int) -> tuple[int, ...]:
        """Return the columns that a rank takes part in, ascending: its own first, then those that it stands in for."""
        group = next(members for members in self.groups if rank in members)
        return tuple(range(group.index(rank), self.width, len(group)))

    def _by_rank(self, values: Iterable[int]) -> Ints:
        out = np.empty(self.world, np.int64)
        out[[rank for group in self.groups for rank in group]] = list(values)
        return out


def make_grid(world: int, hosts: Sequence[Hashable] | None = None) -> Grid:
    """Return the grid of so many ranks; `hosts[rank]` is anything that ranks of one host have in common.

    Raises:
        ConfigError: there are no ranks, or not as many hosts as ranks.
    """
    if world < 1 or (hosts is not None and len(hosts) != world):
        raise ConfigError(f"{world} ranks on {hosts!r:.100} form no grid", hint="give the host of each rank")
    together = by_host(hosts if hosts is not None else range(world))
    is_grid = len({len(group) for group in together}) == 1 and 1 < len(together) < world
    return Grid(together) if is_grid else square_grid([rank for group in together for rank in group])


def by_host(hosts: Sequence[Hashable]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each host, ascending; hosts are ordered by their lowest rank."""
    found: dict[Hashable, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def square_grid(order: Sequence[int]) -> Grid:
    """Return a grid of ranks, of which those that lie beside each other in `order` come into one group."""
    world = len(order)
    count = min(range(1, world + 1), key=lambda groups: (_most_peers(world, groups), world % groups != 0, groups))
    small, larger = divmod(world, count)
    ends = [small * number + min(number, larger) for number in range(count + 1)]
    groups = (sorted(order[start:end]) for start, end in pairwise(ends))
    return Grid(tuple(sorted(tuple(group) for group in groups)))


def _most_peers(world: int, groups: int) -> int:
    """Return how many peers the busiest rank has, in its columns and in its group."""
    small, larger = divmod(world, groups)
    across = groups - 1
    if not larger:
        return across + small - 1
    return max(across + small, across * -(-(small + 1) // small) + small - 1)

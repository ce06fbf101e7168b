"""The simulator: routes drawn tokens over up to some thousand ranks, row by row, and checks where each of them comes.

It moves no hidden states: a row is its number. On the way out it checks that each (token, holder) arrives once; on the
way back, with an integer for each pair, that every partial sum is added once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.errors import ConfigError
from raynixl.moe.cost import Bools, Exchange, Topology, column_links, group_links
from raynixl.moe.grid import Grid, Ints

_KEYS = 1 << 24
"""Random keys drawn at a time."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How experts are drawn: the i-th with probability proportional to 1 / (i + 1) ** `skew`; 0 is uniform.

    The experts of a token are different. Which expert is how popular is drawn, too.
    """

    skew: float = 0.0
    seed: int = 0

    def experts(self, tokens: int, experts: int, topk: int) -> Ints:
        """Return the experts [tokens, topk] of some tokens.

        Raises:
            ConfigError: there are fewer experts than each token has.
        """
        if not 0 < topk <= experts:
            raise ConfigError(f"top {topk} of {experts} experts", hint="draw at least one, and no more than there are")
        generator = np.random.default_rng(self.seed)
        if self.skew == 0 and topk * topk <= experts:
            return _draw_uniform(generator, tokens, experts, topk)
        logs = -self.skew * np.log(np.arange(1, experts + 1, dtype=np.float32))
        chunks = list(_draw_by_key(generator, tokens, generator.permutation(logs), topk))
        return np.concatenate(chunks) if chunks else np.empty((0, topk), np.int64)


def _draw_uniform(generator: np.random.Generator, tokens: int, experts: int, topk: int) -> Ints:
    """Draw rows, and those again that have an expert twice."""
    ids = generator.integers(experts, size=(tokens, topk))
    again = np.arange(tokens)
    while len(again := again[(np.diff(np.sort(ids[again], 1), axis=1) == 0).any(1)]):
        ids[again] = generator.integers(experts, size=(len(again), topk))
    return ids


def _draw_by_key(
    generator: np.random.Generator, tokens: int, logs: npt.NDArray[np.float32], topk: int
) -> Iterator[Ints]:
    """Give each expert a key, its logarithm and Gumbel's noise: the largest keys are a draw without putting back."""
    step = max(1, _KEYS // len(logs))
    for start in range(0, tokens, step):
        shape = (min(step, tokens - start), len(logs))
        keys = logs - np.log(generator.standard_exponential(shape, np.float32) + np.float32(1e-30))
        yield np.argpartition(-keys, topk - 1, axis=1)[:, :topk].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What a dispatch and its combine have moved, and whether it was right."""

    topology: Topology
    stages: tuple[Exchange, ...]
    """The exchanges of the dispatch; those of the combine bring a row back for each."""
    arrived: int
    """Rows that have come to holders."""
    duplicates: int
    missing: int
    wrong_sums: int

    @property
    def is_exact(self) -> bool:
        """Whether each (token, holder) came once, and each partial sum was added once."""
        return self.duplicates == self.missing == self.wrong_sums == 0

    def peers(self) -> Ints:
        """Return to how many different others each rank sends in a dispatch."""
        linked = np.logical_or.reduce([stage.linked for stage in self.stages])
        count: Ints = linked.sum(1)
        return count

    def messages(self) -> Ints:
        """Return how many messages each rank sends in a dispatch and its combine."""
        every = [stage.messages().sum(1) for each in self.stages for stage in (each, each.back())]
        count: Ints = np.sum(every, axis=0).astype(np.int64)
        return count

    def pair_messages(self) -> int:
        """Return the most messages that go from one rank to another in one phase: a put and a line."""
        return max(int((stage.puts * stage.linked + stage.linked).max()) for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows over each kind of link, one way: all together, and the busiest rank's or host's."""

    inside: int
    busiest_inside: int
    network: int
    busiest_host: int
    busiest_rank: int


def traffic(stages: Sequence[Exchange], hosts: Ints) -> Traffic:
    """Count the rows that go between ranks of one host, a rank's own among them, and between hosts."""
    is_near = hosts[:, None] == hosts[None, :]
    rows = np.sum([stage.rows for stage in stages], axis=0)
    near, far = np.where(is_near, rows, 0), np.where(is_near, 0, rows)
    busiest = [float(np.bincount(hosts, far.sum(axis)).max()) for axis in (0, 1)]
    ranks = [float(far.sum(axis).max()) for axis in (0, 1)]
    return Traffic(
        round(near.sum()), round(near.sum(1).max()), round(far.sum()), round(max(busiest)), round(max(ranks))
    )


def simulate_flat(world: int, ids: Ints, holders: Sequence[int] | npt.NDArray[Any], *, phases: int = 2) -> Simulation:
    """Play one exchange among all. `ids` [world * tokens, topk] has the tokens of each rank, one after the other."""
    play = _Play(world, ids, holders)
    rows = _distinct(play.wanted())
    exchange = _exchange(play.source[rows // world], rows % world, ~np.eye(world, dtype=np.bool_), phases)
    sums = np.zeros(len(ids), np.int64)
    np.add.at(sums, rows // world, play.partials(rows // world, rows % world))
    return play.result(Topology.FLAT, (exchange,), rows, sums)


def simulate_two_level(
    grid: Grid, ids: Ints, holders: Sequence[int] | npt.NDArray[Any], *, phases: int = 2
) -> Simulation:
    """Play the two stages: to the groups along columns, then to the holders inside each group."""
    play, groups = _Play(grid.world, ids, holders), len(grid.groups)
    group_of, local_of, forwarders = grid.group_of(), grid.local_of(), grid.forwarders()
    # What each source sends: one row for each group that its token has an expert in.
    carried = _distinct((np.arange(len(ids))[:, None] * groups + group_of[play.holder]).ravel())
    token, group = carried // groups, carried % groups
    source = play.source[token]
    forwarder = forwarders[group, local_of[source]]
    # What each forwarder makes of a row, by what the row says: one for each holder in its own group.
    held = play.holder[token]
    row, k = (group_of[held] == group_of[forwarder][:, None]).nonzero()
    sent = _distinct(row * grid.world + held[row, k])
    row, holder = sent // grid.world, sent % grid.world
    stages = (
        _exchange(source, forwarder, column_links(grid), phases),
        _exchange(forwarder[row], holder, group_links(grid), phases),
    )
    # The mirror: holders' partial sums to the forwarder's row, forwarders' sums to the source's token.
    of_groups, sums = np.zeros(len(carried), np.int64), np.zeros(len(ids), np.int64)
    np.add.at(of_groups, row, play.partials(token[row], holder))
    np.add.at(sums, token, of_groups)
    return play.result(Topology.TWO_LEVEL, stages, token[row] * grid.world + holder, sums)


class _Play:
    """What is simulated, and what must come of it."""

    def __init__(self, world: int, ids: Ints, holders: Sequence[int] | npt.NDArray[Any]) -> None:
        if len(ids) % world:
            raise ConfigError(f"{len(ids)} tokens of {world} ranks", hint="give each rank as many tokens")
        self._world = world
        self.source = np.arange(len(ids)) // max(1, len(ids) // world)
        self.holder = np.asarray(holders, np.int64)[ids]
        # Integers of 62 bits that wrap: a sum that lacks one, or has one twice, is another sum.
        self._values = np.random.default_rng(1).integers(1 << 62, size=ids.shape)

    def wanted(self) -> Ints:
        """Return token * world + holder for each pair."""
        every: Ints = (np.arange(len(self.holder))[:, None] * self._world + self.holder).ravel()
        return every

    def partials(self, token: Ints, holder: Ints) -> Ints:
        """Return what each holder adds up for a token."""
        partial: Ints = np.where(self.holder[token] == holder[:, None], self._values[token], 0).sum(1)
        return partial

    def result(self, topology: Topology, stages: tuple[Exchange, ...], arrived: Ints, sums: Ints) -> Simulation:
        """Compare what has arrived, as token * world + holder, and the sums with what was wanted."""
        different, wanted = _distinct(arrived), _distinct(self.wanted())
        missing = len(np.setdiff1d(wanted, different, assume_unique=True))
        extra = len(arrived) - len(wanted) + missing  # twice, or not wanted
        wrong = int((sums != self._values.sum(1)).sum())
        return Simulation(topology, stages, len(arrived), extra, missing, wrong)


def _exchange(sender: Ints, receiver: Ints, linked: Bools, phases: int) -> Exchange:
    world = len(linked)
    rows = np.bincount(sender * world + receiver, minlength=world * world).reshape(world, world)
    return Exchange(rows.astype(np.float64), (rows > 0).astype(np.float64), linked, phases)


def _distinct(values: Ints) -> Ints:
    """Return the different values, ascending; ten times as fast as numpy's way by hashes."""
    ordered = np.sort(values)
    different: Ints = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return different

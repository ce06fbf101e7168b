"""The cost model that chooses between one exchange among all ranks and two stages on a grid. Pure.

A dispatch or a combine is one `Exchange` after the other. An exchange takes as long as the busiest of its resources,
which work at the same time: what a rank posts and copies, its share of the network, a host's network and memory. The
rows of an exchange are counted by a simulation, or expected: `flat` and `two_level` work them out for experts drawn
uniformly, each token's all different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.collectives.cost import NETWORK, ONE_HOST
from raynixl.moe.grid import Grid, Ints

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Topology(Enum):
    """How rows travel."""

    FLAT = "flat"
    TWO_LEVEL = "two-level"


@dataclass(frozen=True, slots=True)
class Fabric:
    """What messages and bytes cost, inside a host and between hosts. GB/s is 1e9 bytes.

    `call_seconds` is what one exchange costs a rank whatever it sends (measured: 0.25 ms on one core of a 2.6 GHz
    EPYC), `message_seconds` what posting one line or one put costs its sender, one after the other (measured: 4 us),
    `latency` what passes until the last of them is seen. Those of the network are estimates.
    """

    call_seconds: float = 250e-6
    message_seconds: float = 5e-6
    network_message_seconds: float = 20e-6
    latency: float = 20e-6
    network_latency: float = 100e-6
    rank_gbps: float = ONE_HOST.link_gbps
    """What one rank copies into others' memory on its host, or adds up."""
    host_gbps: float = ONE_HOST.source_gbps
    """What all ranks of a host copy together."""
    rank_network_gbps: float = NETWORK.link_gbps
    """What one rank's share of the network carries each way where it is alone."""
    host_network_gbps: float = NETWORK.source_gbps
    """What a host's network carries each way for all its ranks together."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step moves: tokens of each rank, the bytes of a row on its way out and back, and the routing.

    `holders[physical expert]` is a rank. Weighted sums travel back, one for each row.
    """

    tokens: int
    topk: int
    holders: Sequence[int] | npt.NDArray[Any]
    row_nbytes: int
    back_nbytes: int

    def scaled(self, tokens: int) -> Shape:
        """Return the same for another number of tokens."""
        return replace(self, tokens=tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One exchange of lines and rows: `rows[sender, receiver]`, and between which ranks lines go at all."""

    rows: Floats
    puts: Floats
    """How probably there are any rows."""
    linked: Bools
    phases: int

    def back(self) -> Exchange:
        """Return the exchange that brings one row back for each."""
        return Exchange(self.rows.T.copy(), self.puts.T.copy(), self.linked.T.copy(), 1)

    def peers(self) -> Ints:
        """Return how many others each rank sends to."""
        count: Ints = self.linked.sum(1)
        return count

    def messages(self) -> Floats:
        """Return the messages of each pair: a line for each phase, and one put of all rows if there are any."""
        return np.where(self.linked, self.phases + self.puts, 0.0)


def miss_probability(held: Ints, experts: int, topk: int) -> Floats:
    """Return how probably a token has none of the `held` experts, if all its `topk` are drawn and are different."""
    drawn = np.arange(min(topk, experts))
    left = np.maximum(experts - drawn - np.asarray(held, np.float64)[..., None], 0.0)
    missed: Floats = np.prod(left / (experts - drawn), axis=-1)
    return missed


def expected_distinct(held: Ints, experts: int, topk: int) -> float:
    """Return how many holders (ranks, or hosts), that have `held` experts each, a token's experts have on average."""
    return float((1 - miss_probability(held, experts, topk)).sum())


def flat(world: int, shape: Shape, *, phases: int = 2) -> list[Exchange]:
    """Return the one exchange of a flat dispatch, with the rows expected."""
    to_rank = 1 - miss_probability(_held(shape.holders, world), len(shape.holders), shape.topk)
    tokens = np.full((world, 1), float(shape.tokens))
    return [_expected(tokens, np.tile(to_rank, (world, 1)), ~np.eye(world, dtype=np.bool_), phases)]


def two_level(grid: Grid, shape: Shape, *, phases: int = 2) -> list[Exchange]:
    """Return the exchanges of a dispatch in two stages, along columns and inside groups, with the rows expected."""
    group_of, local_of, forwarders, world = grid.group_of(), grid.local_of(), grid.forwarders(), grid.world
    held = _held(shape.holders, world)
    of_groups = np.bincount(group_of, held, len(grid.groups)).astype(np.int64)
    to_group = 1 - miss_probability(of_groups, len(shape.holders), shape.topk)
    to_rank = 1 - miss_probability(held, len(shape.holders), shape.topk)
    targets = forwarders[:, local_of].T  # [source, group]
    served = np.bincount(targets.ravel(), minlength=world)  # sources whose rows a rank forwards
    across, inside = np.zeros((world, world)), np.zeros((world, world))
    np.put_along_axis(across, targets, to_group[None, :], 1)
    for group in grid.groups:
        inside[np.ix_(group, group)] = to_rank[None, group]
    return [
        _expected(np.full((world, 1), float(shape.tokens)), across, column_links(grid), phases),
        _expected(shape.tokens * served[:, None].astype(np.float64), inside, group_links(grid), phases),
    ]


def _expected(tokens: Floats, probability: Floats, linked: Bools, phases: int) -> Exchange:
    """Return an exchange of tokens [sender, 1] that go to each receiver with some probability each."""
    return Exchange(tokens * probability, 1 - (1 - probability) ** tokens, linked, phases)


def column_links(grid: Grid) -> Bools:
    """Return which ranks say lines to each other in the stage along the columns."""
    linked = np.zeros((grid.world, grid.world), np.bool_)
    for column in range(grid.width):
        linked[np.ix_(grid.column(column), grid.column(column))] = True
    np.fill_diagonal(linked, False)
    return linked


def group_links(grid: Grid) -> Bools:
    """Return which ranks say lines to each other in the stage inside the groups."""
    group_of = grid.group_of()
    linked: Bools = group_of[:, None] == group_of[None, :]
    np.fill_diagonal(linked, False)
    return linked


def exchange_seconds(exchange: Exchange, row_nbytes: float, hosts: Ints, fabric: Fabric) -> float:
    """Predict how long one exchange takes; `hosts[rank]` is a number."""
    is_near = hosts[:, None] == hosts[None, :]
    each = np.where(is_near, fabric.message_seconds, fabric.network_message_seconds)
    posting = (exchange.messages() * each).sum(1)
    nbytes = exchange.rows * row_nbytes
    near, far = np.where(is_near, nbytes, 0.0), np.where(is_near, 0.0, nbytes)
    count = int(hosts.max()) + 1
    of_host = np.bincount(hosts, near.sum(1), count) / (fabric.host_gbps * 1e9)
    ways = [np.bincount(hosts, far.sum(axis), count) / (fabric.host_network_gbps * 1e9) for axis in (0, 1)]
    shares = [far.sum(axis) / (fabric.rank_network_gbps * 1e9) for axis in (0, 1)]
    own = posting + near.sum(1) / (fabric.rank_gbps * 1e9)
    busiest = max(float(one.max()) for one in (own, of_host, *ways, *shares))
    is_networked = bool((exchange.linked & ~is_near).any())
    latency = fabric.network_latency if is_networked else fabric.latency
    return fabric.call_seconds + exchange.phases * latency + busiest


def summing_seconds(exchange: Exchange, row_nbytes: float, hosts: Ints, fabric: Fabric) -> float:
    """Predict how long the busiest rank or host adds up the rows that an exchange has brought."""
    nbytes = exchange.rows.sum(0) * row_nbytes
    together = np.bincount(hosts, nbytes).max() / fabric.host_gbps
    return float(max(nbytes.max() / fabric.rank_gbps, together) / 1e9)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a dispatch and of the combine that follows."""

    dispatch_seconds: float
    combine_seconds: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.dispatch_seconds + self.combine_seconds


def predict(stages: Sequence[Exchange], shape: Shape, hosts: Ints, fabric: Fabric) -> Prediction:
    """Predict a dispatch by its exchanges, one after the other, and the combine, which brings a row back for each."""
    out = sum(exchange_seconds(stage, shape.row_nbytes, hosts, fabric) for stage in stages)
    back = 0.0
    for stage in (stage.back() for stage in reversed(stages)):
        back += exchange_seconds(stage, shape.back_nbytes, hosts, fabric)
        back += summing_seconds(stage, shape.back_nbytes, hosts, fabric)
    return Prediction(out, back)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which topology is predicted to be faster, what each is predicted to take, and why."""

    topology: Topology
    flat: Prediction
    two_level: Prediction
    reason: str


def choose(grid: Grid, shape: Shape, hosts: Sequence[int] | Ints, fabric: Fabric | None = None) -> Choice:
    """Choose the topology that is predicted to end a dispatch and its combine first; flat where they tie."""
    fabric, numbers = Fabric() if fabric is None else fabric, np.asarray(hosts, np.int64)
    plain = predict(flat(grid.world, shape), shape, numbers, fabric)
    staged = predict(two_level(grid, shape), shape, numbers, fabric)
    best = Topology.TWO_LEVEL if staged.seconds < plain.seconds else Topology.FLAT
    reason = f"{plain.seconds * 1e3:.3g} ms flat, {staged.seconds * 1e3:.3g} ms in two stages over {grid}, predicted"
    return Choice(best, plain, staged, reason)


def _held(holders: Sequence[int] | npt.NDArray[Any], world: int) -> Ints:
    """Return how many experts each rank has."""
    return np.bincount(np.asarray(holders, np.int64), minlength=world)

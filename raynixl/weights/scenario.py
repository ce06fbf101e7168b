"""Scenarios: machines with links, receivers with fates, and images, as values that the simulator of the swarm plays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError
from raynixl.weights.assignment import Policy, Topology

GBPS = 1e9 / 8  # bytes per second in one Gbit/s, as links are sold


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the rollouts, in bytes per second: what its network carries each way, shared by its ranks."""

    up: float
    down: float
    rank: float = math.inf  # what each rank's own link carries each way
    local: float = math.inf  # what each rank copies from others on its node


@dataclass(frozen=True, slots=True)
class Rank:
    """A receiver: where it is, which image it needs, and what becomes of it."""

    node: int
    image: int = 0
    joins: float = 0.0
    dies: float = math.inf
    freezes: float = math.inf  # from then on it neither pulls nor serves, and nobody is told
    is_lying: bool = False  # what it serves is corrupt
    is_holding: bool = False  # it has the whole version from the beginning


@dataclass(frozen=True, slots=True)
class Scenario:
    """One push. Times are seconds, bandwidths bytes per second, over all sources together for the origin."""

    images: tuple[int, ...]
    nodes: tuple[Node, ...]
    ranks: tuple[Rank, ...]
    origin: float
    chunk_nbytes: int = 16 << 20
    origin_hosts: int = 1
    latency: float = 20e-6  # one way, between any two
    control: float = 200e-6  # from a receiver's question to the coordinator's answer
    detection: float = 0.1  # from a death to its being known
    read_timeout: float = 1.0  # after which a pull from a frozen holder fails
    room: int = 4  # chunks that a receiver is assigned at a time
    depth: int = 4  # of them, those that it pulls at once
    topology: Topology | str = Topology.AUTO
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if not all(0 <= rank.node < len(self.nodes) and 0 <= rank.image < len(self.images) for rank in self.ranks):
            raise ConfigError("a rank names a node or an image that there is not", hint="count from 0")
        if min(self.chunk_nbytes, self.room, self.depth) < 1 or not self.origin > 0:
            raise ConfigError("chunks, room, depth and the origin's bandwidth must be positive")


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What came of a scenario. Seconds are from the push's beginning; nan for what did not happen."""

    seconds: float  # until the last receiver that stayed had everything
    release_seconds: float  # until no image needed the origin any more
    finished: NDArray[np.float64]  # for each rank
    origin_nbytes: int
    peer_nbytes: int
    local_nbytes: int
    failures: int  # pulls that had to be assigned again
    messages: int  # from receivers to the coordinator
    liars: tuple[int, ...]


def uniform(
    nbytes: int, receivers: int, *, up: float, down: float | None = None, origin: float | None = None, per_node: int = 1
) -> Scenario:
    """Return a scenario of equal receivers, `per_node` on each node, whose links are as fast down as up unless said.

    The origin is as fast as a node unless said.
    """
    node = Node(up, up if down is None else down)
    count = -(-receivers // per_node)
    ranks = tuple(Rank(number // per_node) for number in range(receivers))
    return Scenario((nbytes,), (node,) * count, ranks, up if origin is None else origin)


def with_deaths(scenario: Scenario, ranks: Sequence[int], at: float) -> Scenario:
    """Return it with some ranks dying at a time."""
    doomed = set(ranks)
    return replace(
        scenario,
        ranks=tuple(replace(rank, dies=at) if number in doomed else rank for number, rank in enumerate(scenario.ranks)),
    )

"""Predictions: closed forms for how long a push takes, and what its links carry, by how it spreads.

Images are cut in chunks that every node passes on once it has them whole. Where links carry several images, each
gets a share by its size, so that all end together. Latencies are left out: they do not count beside the bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from raynixl.weights.scenario import Scenario

_SWARM_CHUNKS = (
    3.0  # chunk times that a swarm's doubling takes: a chunk waits for others on its way (simulated: 2.9-3.2)
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, and bytes: all from the origin, and the most that any node brings in, gives to others, copies inside."""

    seconds: float
    origin_nbytes: int
    node_in_nbytes: int
    node_out_nbytes: int
    local_nbytes: int


@dataclass(frozen=True, slots=True)
class _Needs:
    """Who needs what: how many ranks of which node need which image."""

    scenario: Scenario
    ranks: tuple[Counter[int], ...]  # for each node: image -> ranks

    @staticmethod
    def of(scenario: Scenario) -> _Needs:
        ranks = tuple(Counter[int]() for _ in scenario.nodes)
        for rank in scenario.ranks:
            ranks[rank.node][rank.image] += 1
        return _Needs(scenario, ranks)

    def nodes_of(self, image: int) -> int:
        return sum(image in counter for counter in self.ranks)

    @property
    def images(self) -> list[int]:
        return sorted(set().union(*self.ranks))

    def once(self, node: int) -> int:
        """What a node needs, each image once."""
        return sum(self.scenario.images[image] for image in self.ranks[node])

    def each(self, node: int) -> int:
        """What a node needs if each of its ranks brings its own in."""
        return sum(self.scenario.images[image] * count for image, count in self.ranks[node].items())

    def all_once(self) -> int:
        return sum(self.scenario.images[image] for image in self.images)

    def slowest(self, link: Callable[[int], float]) -> float:
        """The longest that any node's link takes."""
        return max(link(node) for node in range(len(self.ranks)))


def lower_bound(scenario: Scenario) -> float:
    """Return the seconds that no way of spreading can beat: each link carries at least what must pass it."""
    needs = _Needs.of(scenario)
    nodes = range(len(scenario.nodes))
    everywhere = sum(needs.once(node) for node in nodes)
    ranks = max(scenario.images[rank.image] / scenario.nodes[rank.node].rank for rank in scenario.ranks)
    return max(
        needs.all_once() / scenario.origin,
        needs.slowest(lambda node: needs.once(node) / scenario.nodes[node].down),
        everywhere / (scenario.origin + sum(scenario.nodes[node].up for node in nodes)),
        ranks if math.isinf(max(node.local for node in scenario.nodes)) else 0.0,
    )


def direct(scenario: Scenario) -> Prediction:
    """Predict that every rank pulls everything from the origin: a star."""
    needs = _Needs.of(scenario)
    whole = sum(scenario.images[rank.image] for rank in scenario.ranks)
    ranks = max(scenario.images[rank.image] / scenario.nodes[rank.node].rank for rank in scenario.ranks)
    seconds = max(
        whole / scenario.origin,
        needs.slowest(lambda node: needs.each(node) / scenario.nodes[node].down),
        ranks,
    )
    return Prediction(seconds, whole, _most(needs, needs.each), 0, 0)


def chain(scenario: Scenario) -> Prediction:
    """Predict that each node passes everything on to the next one."""
    return _pipeline(scenario, 1, lambda nodes: nodes - 1)


def tree(scenario: Scenario) -> Prediction:
    """Predict that each node passes everything on to two others: half the speed, but few steps."""
    return _pipeline(scenario, 2, lambda nodes: max(0, math.floor(math.log2(nodes)) - 1) if nodes > 2 else nodes - 1)


def swarm(scenario: Scenario) -> Prediction:
    """Predict the swarm: at the lower bound's speed, after as many doublings as it takes to reach every node."""
    stream = lower_bound(scenario)
    return _spread(scenario, stream, 1, lambda nodes: _SWARM_CHUNKS * math.log2(nodes))


def _pipeline(scenario: Scenario, copies: int, steps: Callable[[int], float]) -> Prediction:
    needs = _Needs.of(scenario)

    def out(node: int) -> float:
        passed = sum(scenario.images[image] * min(copies, needs.nodes_of(image) - 1) for image in needs.ranks[node])
        return passed / scenario.nodes[node].up

    stream = max(
        needs.all_once() / scenario.origin,
        needs.slowest(lambda node: needs.once(node) / scenario.nodes[node].down),
        needs.slowest(out),
    )
    return _spread(scenario, stream, copies, steps)


def _spread(scenario: Scenario, stream: float, copies: int, steps: Callable[[int], float]) -> Prediction:
    """Add the time in which the last chunk makes its steps, one chunk time each, to that of the stream."""
    needs = _Needs.of(scenario)
    fills = [
        steps(needs.nodes_of(image)) * min(scenario.chunk_nbytes, scenario.images[image]) / scenario.images[image]
        for image in needs.images
        if scenario.images[image]
    ]
    inside = _most(needs, lambda node: needs.each(node) - needs.once(node))
    out = _most(
        needs,
        lambda node: sum(
            scenario.images[image] * min(copies, needs.nodes_of(image) - 1) for image in needs.ranks[node]
        ),
    )
    seconds = stream * (1 + max(fills, default=0.0))
    return Prediction(seconds, needs.all_once(), _most(needs, needs.once), out, inside)


def _most(needs: _Needs, nbytes: Callable[[int], int]) -> int:
    return max(nbytes(node) for node in range(len(needs.ranks)))

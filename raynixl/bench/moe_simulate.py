"""Simulated expert parallelism: what many ranks would send, flat and in two stages, and the time predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raynixl.errors import ConfigError
from raynixl.moe.cost import Fabric, Prediction, Shape, flat, predict, two_level
from raynixl.moe.grid import Grid, Ints, make_grid
from raynixl.moe.simulator import Draw, Simulation, simulate_flat, simulate_two_level, traffic

Row = dict[str, Any]
MAX_PAIRS = 1 << 24
COMMON = ("hidden", "topk", "experts", "skew")
"""What the rows of one call have alike."""
_BESIDE_NBYTES = 8  # of a row: an id and a weight for each k, and these for its token


@dataclass(frozen=True, slots=True)
class SimulateSpec:
    """What is simulated: so many ranks on so many hosts, each with as many tokens of so many experts.

    `link_gbps` is what each rank's share of the network carries each way, in Gb/s; 0 for one network of 10 GB/s for
    all ranks of a host. `skew` says how uneven experts are popular (0: all alike, 1: Zipf's law).
    """

    ranks: int = 64
    hosts: int = 8
    tokens: int = 128
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    skew: float = 0.0
    link_gbps: float = 0.0
    seed: int = 0

    @property
    def host_of(self) -> Ints:
        """The host of each rank; neighbours share one."""
        return np.arange(self.ranks) * self.hosts // self.ranks

    @property
    def shape(self) -> Shape:
        """What a step moves: rows in bfloat16, both ways."""
        holders = np.arange(self.experts) * self.ranks // self.experts
        beside = 8 * self.topk + _BESIDE_NBYTES
        return Shape(self.tokens, self.topk, holders, 2 * self.hidden + beside, 2 * self.hidden)

    @property
    def fabric(self) -> Fabric:
        """What links carry."""
        if not self.link_gbps:
            return Fabric()
        share = self.link_gbps / 8
        return replace(Fabric(), rank_network_gbps=share, host_network_gbps=share * -(-self.ranks // self.hosts))

    def check(self) -> SimulateSpec:
        """Return it, if it can be simulated.

        Raises:
            ConfigError: more hosts than ranks, more experts of a token than there are, or too much for memory.
        """
        if not 1 <= self.hosts <= self.ranks:
            raise ConfigError(f"{self.hosts} hosts for {self.ranks} ranks", hint="give each host a rank at least")
        if not 1 <= self.topk <= self.experts:
            raise ConfigError(f"top {self.topk} of {self.experts} experts", hint="give as many --experts at least")
        if self.ranks * self.tokens * self.topk > MAX_PAIRS:
            raise ConfigError(
                f"{self.ranks} ranks with {self.tokens} tokens, top {self.topk}, are more than {MAX_PAIRS} pairs",
                hint="simulate fewer --tokens: bytes grow as they do",
            )
        return self


def sweep(like: SimulateSpec, ranks: Sequence[int], tokens: Sequence[int]) -> list[SimulateSpec]:
    """Return what to simulate: `like.hosts` are those of the most ranks, and fewer ranks fill as many as they need."""
    per_host = -(-max(ranks) // like.hosts)
    return [
        replace(like, ranks=count, hosts=-(-count // per_host), tokens=each).check()
        for each in tokens
        for count in ranks
    ]


def run_simulation(spec: SimulateSpec, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """Simulate a dispatch and its combine: flat, in two stages by host, and on a square grid where that is another."""
    spec.check()
    shape, hosts = spec.shape, spec.host_of
    ids = Draw(spec.skew, spec.seed).experts(spec.ranks * spec.tokens, spec.experts, spec.topk)
    expected = None if spec.skew else predict(flat(spec.ranks, shape), shape, hosts, spec.fabric)
    yield _row(spec, "flat", "", simulate_flat(spec.ranks, ids, shape.holders), expected)
    step()
    grids = {"two-level": make_grid(spec.ranks, hosts.tolist()), "two-level, square": make_grid(spec.ranks)}
    if grids["two-level"] == grids["two-level, square"]:
        del grids["two-level, square"]
    for name, grid in grids.items():
        expected = None if spec.skew else predict(two_level(grid, shape), shape, hosts, spec.fabric)
        yield _row(spec, name, _form(grid), simulate_two_level(grid, ids, shape.holders), expected)
        step()


def _form(grid: Grid) -> str:
    sizes = sorted({len(group) for group in grid.groups})
    return f"{len(grid.groups)} x {' or '.join(map(str, sizes))}"


def _row(spec: SimulateSpec, impl: str, grid: str, simulation: Simulation, expected: Prediction | None) -> Row:
    shape, hosts, stages = spec.shape, spec.host_of, simulation.stages
    moved, predicted = traffic(stages, hosts), predict(stages, shape, hosts, spec.fabric)
    both = shape.row_nbytes + shape.back_nbytes
    return {
        "bench": "moe-simulated", "impl": impl, "ranks": spec.ranks, "hosts": spec.hosts, "grid": grid or "-",
        "tokens": spec.tokens, "hidden": spec.hidden, "topk": spec.topk, "experts": spec.experts, "skew": spec.skew,
        "peers": int(simulation.peers().max()), "messages": int(simulation.messages().max()),
        "pair_messages": simulation.pair_messages(),
        "network_nbytes": moved.network * both, "host_network_nbytes": moved.busiest_host * both,
        "inside_nbytes": moved.inside * both,
        "dispatch_ms": predicted.dispatch_seconds * 1e3, "combine_ms": predicted.combine_seconds * 1e3,
        "both_ms": predicted.seconds * 1e3, "uniform_ms": expected.seconds * 1e3 if expected is not None else None,
        "verified": simulation.is_exact,
    }  # fmt: skip

"""Estimate: what a plan costs on machines that one has not got: bytes over each link, memory, and a scenario of it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raynixl.weights.pieces import Ints
from raynixl.weights.plan import Plan
from raynixl.weights.scenario import Node, Rank, Scenario
from raynixl.weights.shards import Shards

MAX_PULLS = 150_000
"""Simulated pulls of chunks; with more, chunks are made longer."""

COORDINATOR_SECONDS = 20e-6
"""What the coordinator computes for each pull of a chunk, measured on one core of a 2.6 GHz EPYC."""


@dataclass(frozen=True, slots=True)
class Site:
    """Machines: what each rank's link carries each way in bytes per second, and how many ranks a host has.

    `host` is what a host's links carry together, `copy` what a rank copies from others on its host.
    """

    link: float
    per_host: int = 8
    host: float = math.inf
    copy: float = math.inf

    def node(self, ranks: int) -> Node:
        """Return a host with a number of ranks that pull."""
        together = self.bandwidth(ranks)
        return Node(together, together, rank=self.link, local=self.copy)

    @property
    def is_shared(self) -> bool:
        """Whether ranks of a host compete for its links."""
        return self.host < self.link * self.per_host

    def bandwidth(self, ranks: int) -> float:
        """Return what a number of ranks carry together, on as few hosts as hold them."""
        hosts = -(-ranks // self.per_host)
        return min(self.link * ranks, self.host * hosts)


@dataclass(frozen=True, slots=True)
class Load:
    """The bytes over each link of one kind, one way: of the busiest one, and of all together."""

    link: str
    links: int
    busiest_nbytes: int
    total_nbytes: int


def loads(plan: Plan, site: Site) -> list[Load]:
    """Return what each kind of link carries: if all pull from the sources, and if targets feed each other."""
    needed = np.array(plan.nbytes, np.int64)[list(plan.image_of)]
    wanted = np.bincount(plan.image_of, minlength=len(plan.nbytes))
    direct = _by_source(plan, wanted[:, None] * plan.shares)
    once = _by_source(plan, plan.shares)
    pulled = int(needed.sum())
    hosts = _by_host(plan, site)
    brought = sum(hosts)
    relayed = max(0, brought - int(once.sum()))
    return [
        Load("source, out, direct", len(direct), int(direct.max()), int(direct.sum())),
        Load("source, out, relayed", len(once), int(once.max()), int(once.sum())),
        Load("target, in", len(needed), int(needed.max()), pulled),
        Load("target, out to others, relayed", len(needed), -(-relayed // len(needed)), relayed),
        Load("host, in, relayed", len(hosts), max(hosts), brought),
        Load("inside hosts, relayed", len(hosts), -(-(pulled - brought) // len(hosts)), pulled - brought),
    ]


def _by_source(plan: Plan, amounts: Ints) -> Ints:
    """Return the bytes (parts,) that the busiest source of each part gives; its replicas share them."""
    members = np.array([len(part) for part in plan.parts], np.int64)
    return np.repeat(-(-amounts.sum(axis=0) // members), members)


def _by_host(plan: Plan, site: Site) -> list[int]:
    """Return the distinct bytes that each host of targets needs, images that it has twice once."""
    images: dict[int, set[int]] = defaultdict(set)
    for target, image in enumerate(plan.image_of):
        images[target // site.per_host].add(image)
    return [sum(plan.nbytes[image] for image in found) for found in images.values()]


def over_send(plan: Plan) -> int:
    """Return by how many bytes what is pulled exceeds the distinct bytes that targets need."""
    firsts = [plan.targets[plan.image_of.index(image)] for image in range(len(plan.nbytes))]
    return sum(nbytes - _needed(shards) for nbytes, shards in zip(plan.nbytes, firsts, strict=True))


def _needed(shards: Shards) -> int:
    own, table = shards.pieces, shards.table
    heads = table.alias[own.tensor]
    first = np.unique(np.column_stack((heads, own.start, own.size)), axis=0, return_index=True)[1]
    return int((own.counts * table.itemsizes[own.tensor])[first].sum())


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the rank that needs most: its weights, and with what a push adds, a copy at either side."""

    weights: int
    peak: int


def memory(ranks: Sequence[Shards]) -> Memory:
    """Return what the fullest of some ranks needs."""
    distinct = {shards.digest: shards for shards in ranks}.values()
    most = max(int(np.maximum(shards.table.entry_nbytes(shards.rank), 0).sum()) for shards in distinct)
    return Memory(most, 2 * most)


def scenarios(plan: Plan, site: Site, *, chunk_nbytes: int = 16 << 20) -> list[Scenario]:
    """Return what to simulate: everything at once where hosts' links are shared, else one of each alike images."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    hosts = [
        tuple(target // site.per_host for target, own in enumerate(plan.image_of) if own == image)
        for image in range(len(plan.nbytes))
    ]
    for image, nbytes in enumerate(plan.nbytes):
        steps = (0, *np.cumsum(np.diff(hosts[image]) > 0).tolist())
        groups[nbytes, steps].append(image)
    if site.is_shared:
        return [_scenario(plan, site, range(len(plan.nbytes)), chunk_nbytes)]
    return [_scenario(plan, site, [images[0]], chunk_nbytes) for images in groups.values()]


def coordinator_seconds(plan: Plan, chunk_nbytes: int) -> float:
    """Return how long the coordinator of one push computes, if every target has its chunks assigned."""
    pulls = sum(-(-plan.nbytes[image] // chunk_nbytes) for image in plan.image_of)
    return pulls * COORDINATOR_SECONDS


def _scenario(plan: Plan, site: Site, images: Sequence[int], chunk_nbytes: int) -> Scenario:
    numbers = {image: number for number, image in enumerate(images)}
    targets = [target for target, image in enumerate(plan.image_of) if image in numbers]
    on_hosts = Counter(target // site.per_host for target in targets)
    hosts = {host: number for number, host in enumerate(on_hosts)}
    ranks = tuple(Rank(hosts[target // site.per_host], numbers[plan.image_of[target]]) for target in targets)
    nbytes = [plan.nbytes[image] for image in images]
    pulled = sum(plan.nbytes[plan.image_of[target]] for target in targets)
    share = sum(nbytes) / sum(plan.nbytes)
    return Scenario(
        tuple(nbytes), tuple(map(site.node, on_hosts.values())), ranks, share * origin_bandwidth(plan, site),
        chunk_nbytes=max(chunk_nbytes, -(-pulled // MAX_PULLS)),
        origin_hosts=-(-len(plan.sources) // site.per_host),
    )  # fmt: skip


def origin_bandwidth(plan: Plan, site: Site) -> float:
    """Return at which rate the sources give all images once: those that give most are the last to end."""
    busiest = int(_by_source(plan, plan.shares).max())
    return min(sum(plan.nbytes) / (busiest / site.link), site.bandwidth(len(plan.sources)))

"""Schedules: what each rank does in a collective, as lists of steps. Pure: no I/O, no clock.

Every movement is a pull: the one who needs bytes reads them from a rank that has announced them. A rank that
announced keeps its buffer until all who read from it have acknowledged.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from raynixl.errors import ConfigError


class Buffer(enum.Enum):
    """Which of a rank's two buffers."""

    SOURCE = "source"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell a rank that the first `ready` bytes of one of our buffers may be read."""

    to: int
    buffer: Buffer
    ready: int


@dataclass(frozen=True, slots=True)
class Pull:
    """Read bytes of a rank's buffer, once announced, into our OUT buffer; `source` may be ourselves."""

    source: int
    buffer: Buffer
    source_offset: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Tell a rank that we have read all that we need of it."""

    to: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Wait until a rank has acknowledged."""

    source: int


@dataclass(frozen=True, slots=True)
class Signal:
    """Tell a rank that we have come to a round of a barrier."""

    to: int
    round: int


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for a rank to come to a round of a barrier."""

    source: int
    round: int


Step = Announce | Pull | Acknowledge | Collect | Signal | Await


def broadcast_direct(rank: int, world: int, root: int, *, nbytes: int) -> list[Step]:
    """Every rank pulls everything from the root. The root's OUT buffer is the source."""
    _check(rank, world, root)
    if nbytes == 0:
        return _say_nothing(rank, world, root)
    if rank != root:
        return [Pull(root, Buffer.OUT, 0, 0, nbytes), Acknowledge(root)]
    others = [(root + step) % world for step in range(1, world)]
    return [*(Announce(to, Buffer.OUT, nbytes) for to in others), *(Collect(source) for source in others)]


def broadcast_chain(rank: int, world: int, root: int, *, nbytes: int, chunk_nbytes: int) -> list[Step]:
    """Rank i pulls chunk after chunk from the rank before it, which has them from the one before.

    Takes (chunks + world - 2) chunk times, and no rank sends more than once what it holds.
    """
    _check(rank, world, root)
    if chunk_nbytes <= 0:
        raise ConfigError(f"chunks of {chunk_nbytes} bytes", hint="give a positive size")
    place = (rank - root) % world
    before = (rank - 1) % world if place else None
    after = (rank + 1) % world if place < world - 1 else None
    if nbytes == 0 or world == 1:
        return _say_nothing(rank, world, root)
    steps: list[Step] = []
    if before is None:
        steps += [] if after is None else [Announce(after, Buffer.OUT, nbytes)]
    else:
        for start in range(0, nbytes, chunk_nbytes):
            end = min(nbytes, start + chunk_nbytes)
            steps.append(Pull(before, Buffer.OUT, start, start, end - start))
            if after is not None:
                steps.append(Announce(after, Buffer.OUT, end))
        steps.append(Acknowledge(before))
    if after is not None:
        steps.append(Collect(after))
    return steps


def _say_nothing(rank: int, world: int, root: int) -> list[Step]:
    """No bytes to move, but a word from the root, so that members with buffers of other lengths are found out."""
    if rank != root:
        return [Await(root, 0)]
    return [Signal((root + step) % world, 0) for step in range(1, world)]


def scatter(rank: int, root: int, sizes: Sequence[int]) -> list[Step]:
    """Rank i pulls the i-th part of the root's SOURCE buffer, whose parts lie one after the other."""
    _check(rank, len(sizes), root)
    starts = offsets(sizes)
    own: list[Step] = [Pull(root, Buffer.SOURCE, starts[rank], 0, sizes[rank])] if sizes[rank] else []
    if rank != root:
        return [*own, Acknowledge(root)] if own else []
    readers = [other for other in range(len(sizes)) if other != root and sizes[other]]
    announced: list[Step] = [Announce(to, Buffer.SOURCE, sum(sizes)) for to in readers]
    return [*announced, *own, *(Collect(source) for source in readers)]


def gather(rank: int, root: int, sizes: Sequence[int]) -> list[Step]:
    """The root pulls every rank's SOURCE buffer into its OUT buffer, one after the other in rank order."""
    _check(rank, len(sizes), root)
    if rank != root:
        return [Announce(root, Buffer.SOURCE, sizes[rank]), Collect(root)] if sizes[rank] else []
    return _pull_from([(root + step) % len(sizes) for step in range(len(sizes))], rank, sizes)


def allgather(rank: int, sizes: Sequence[int]) -> list[Step]:
    """Every rank pulls every rank's SOURCE buffer; each begins with its successor, so that no rank is read by all."""
    world = len(sizes)
    _check(rank, world, rank)
    others = [(rank + step) % world for step in range(1, world)]
    mine = sizes[rank]
    announced: list[Step] = [Announce(to, Buffer.SOURCE, mine) for to in reversed(others)] if mine else []
    collected: list[Step] = [Collect(source) for source in others] if mine else []
    return [*announced, *_pull_from([rank, *others], rank, sizes), *collected]


def barrier(rank: int, world: int) -> list[Step]:
    """Nobody leaves before everybody has come: the dissemination barrier, log2(world) rounds.

    Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988.
    """
    _check(rank, world, rank)
    steps: list[Step] = []
    distance, number = 1, 0
    while distance < world:
        steps += [Signal((rank + distance) % world, number), Await((rank - distance) % world, number)]
        distance, number = distance * 2, number + 1
    return steps


def offsets(sizes: Sequence[int]) -> list[int]:
    """Return where each part begins when parts lie one after the other."""
    return [0, *accumulate(sizes)][:-1]


def _pull_from(ranks: Sequence[int], rank: int, sizes: Sequence[int]) -> list[Step]:
    starts = offsets(sizes)
    steps: list[Step] = []
    for source in ranks:
        if sizes[source]:
            steps.append(Pull(source, Buffer.SOURCE, 0, starts[source], sizes[source]))
            steps += [] if source == rank else [Acknowledge(source)]
    return steps


def _check(rank: int, world: int, root: int) -> None:
    if not (0 <= rank < world and 0 <= root < world):
        raise ConfigError(f"rank {rank} or root {root} is outside a group of {world}", hint="count ranks from 0")

"""A driver: a group of three workers, spread over the nodes, broadcasts, gathers and meets at a barrier."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import ray
from nodes import TIMEOUT, get, join, on, route

import raynixl as rx

NAMES = ["rank-0", "rank-1", "rank-2"]
ELEMENTS = 1_000_003  # a length that no chunk divides


@ray.remote
@rx.worker
class Member:
    """One rank."""

    def __init__(self) -> None:
        self.group = rx.Group(rx.agent(), NAMES, timeout=TIMEOUT)
        self.region = rx.agent().empty(4096, name="mark")

    def broadcast(self, root: int, algorithm: str) -> str:
        """Take part in a broadcast of numbers that depend on the root; return the digest of what is here then."""
        numbers = np.zeros(ELEMENTS, np.int32)
        if self.group.rank == root:
            numbers[:] = np.random.default_rng(root).integers(0, 1 << 30, ELEMENTS)
        self.group.broadcast(numbers, root, algorithm=algorithm)
        self.group.barrier()
        return sha256(numbers).hexdigest()

    def allgather(self) -> list[int]:
        """Take part in an allgather; return what every rank gave."""
        out = np.zeros(len(NAMES), np.int64)
        self.group.allgather(np.array([self.group.rank + 7], np.int64), out)
        return out.tolist()

    def routes(self) -> list[str]:
        """The backends by which each rank is reached."""
        return ["" if name == rx.agent().name else route(name, "mark") for name in NAMES]


def digest(root: int) -> str:
    """The digest of what a root sends."""
    return sha256(np.random.default_rng(root).integers(0, 1 << 30, ELEMENTS).astype(np.int32)).hexdigest()


def main() -> None:
    """Run every operation with every root."""
    nodes = join()
    members: list[Any] = [
        Member.options(**on(nodes[rank % len(nodes)], name=name)).remote() for rank, name in enumerate(NAMES)
    ]
    get([member.__ray_ready__.remote() for member in members])
    for root in range(len(NAMES)):
        for algorithm in ("direct", "chain", "auto"):
            got = get([member.broadcast.remote(root, algorithm) for member in members])
            assert got == [digest(root)] * len(NAMES), (root, algorithm)
    assert get([member.allgather.remote() for member in members]) == [[7, 8, 9]] * len(NAMES)
    for taken in get([member.routes.remote() for member in members]):
        print(*(backend or "-" for backend in taken))


main()

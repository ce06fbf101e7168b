"""A driver: two workers, as far from each other as there are nodes, read, write, notify and ask each other."""

from __future__ import annotations

import sys
from hashlib import sha256
from typing import Any

import numpy as np
import ray
from nodes import TIMEOUT, get, join, on, route

import raynixl as rx

KINDS = ("arena", "user")


def pattern(nbytes: int, seed: int) -> Any:
    """Bytes that differ from place to place and from seed to seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def digest(data: Any) -> str:
    """What tells bytes from others."""
    return sha256(data).hexdigest()


@ray.remote
@rx.worker
class Worker:
    """Holds two regions, one in an arena and one in memory of its own; says their digests to those who ask."""

    def __init__(self, nbytes: int, seed: int) -> None:
        agent = rx.agent()
        own = pattern(nbytes, seed)
        self.regions = {"arena": agent.empty(nbytes, name="arena"), "user": agent.register(own, name="user")}
        self.regions["arena"].array()[:] = own
        agent.serve("digest", lambda _peer, name: self.digests()[name.decode()].encode())

    def digests(self) -> dict[str, str]:
        """The digests of the regions."""
        return {name: digest(region.array()) for name, region in self.regions.items()}

    def read(self, peer: str, name: str) -> tuple[str, str]:
        """Read a region of a peer; the digest of what came, and what the peer says that it is."""
        agent = rx.agent()
        theirs = agent.peer(peer)[name]
        mine = agent.empty(theirs.nbytes)
        agent.read(theirs, mine).wait(TIMEOUT)
        came = digest(mine.array())
        agent.deregister(mine)
        return came, agent.ask(peer, "digest", name.encode(), timeout=TIMEOUT).wait().decode()

    def write(self, peer: str, name: str, seed: int) -> str:
        """Write new bytes into a region of a peer, with a notification; return their digest."""
        agent = rx.agent()
        theirs = agent.peer(peer)[name]
        mine = agent.register(pattern(theirs.nbytes, seed))
        agent.write(mine, theirs, notify=name.encode()).wait(TIMEOUT)
        written = digest(mine.array())
        agent.deregister(mine)
        return written

    def scatter(self, peer: str, name: str, block_nbytes: int) -> tuple[str, str]:
        """Write every other block into a peer, the last first; the digests of what is there and should be."""
        agent = rx.agent()
        theirs = agent.peer(peer)[name]
        mine, back = agent.register(pattern(theirs.nbytes, 99)), agent.empty(theirs.nbytes)
        agent.read(theirs, back).wait(TIMEOUT)
        expected = back.array().copy()
        ids = np.arange(theirs.nbytes // block_nbytes)[::-2].copy()
        agent.write(mine.pages(ids, block_nbytes), theirs.pages(ids, block_nbytes)).wait(TIMEOUT)
        for number in ids.tolist():
            span = slice(number * block_nbytes, (number + 1) * block_nbytes)
            expected[span] = mine.array()[span]
        agent.read(theirs, back).wait(TIMEOUT)
        seen = digest(back.array())
        agent.deregister(back)
        agent.deregister(mine)
        return seen, digest(expected)

    def heard(self) -> tuple[str, str, str]:
        """Wait for a notification; who sent it, what it says, and the digest of that region at that moment."""
        note = rx.agent().wait_notification(TIMEOUT)
        return note.peer, note.payload.decode(), self.digests()[note.payload.decode()]

    def route(self, peer: str, name: str) -> str:
        """How a read of the peer's region would go."""
        return route(peer, name)


def check_pair(one: Any, other: Any, name: str) -> None:
    """Everything between `one` and `other`, whose agent is called `name`."""
    for seed, kind in enumerate(KINDS, start=10):
        came, told = get(one.read.remote(name, kind))
        assert came == told == get(other.digests.remote())[kind], kind
        hearing = other.heard.remote()
        written = get(one.write.remote(name, kind, seed))
        assert get(hearing)[1:] == (kind, written)
        seen, expected = get(one.scatter.remote(name, kind, 4096))
        assert seen == expected == get(other.digests.remote())[kind], kind
        print(kind, get(one.route.remote(name, kind)))


def main(nbytes: int) -> None:
    """Check both directions."""
    nodes = join()
    first = Worker.options(**on(nodes[0], name="first")).remote(nbytes, 1)
    second = Worker.options(**on(nodes[-1], name="second")).remote(nbytes, 2)
    get([first.digests.remote(), second.digests.remote()])
    check_pair(first, second, "second")
    check_pair(second, first, "first")


main(int(sys.argv[1]))

"""A crowd of receivers around a swarm: it does what the swarm assigns, and checks each assignment."""

from __future__ import annotations

import random

from raynixl.weights.assignment import ORIGIN, Assignment, Policy, Topology, Why
from raynixl.weights.swarm import Swarm

NEVER = Policy(stall_seconds=1e9)


class Crowd:
    """Receivers as they are in truth, beside what the swarm thinks of them."""

    def __init__(self, chunks, *, hosts, seed=0, **options):
        self.swarm = Swarm(chunks, **{"origin_hosts": ["trainer"], "topology": "relay", "policy": NEVER, **options})
        self.chunks, self.hosts, self.random = chunks, hosts, random.Random(seed)
        self.host, self.has, self.pending = {}, {}, {}
        self.bringing_in, self.refused, self.liars = set(), set(), set()
        self.asked_of_origin, self.now, self.is_released = [], 0.0, False

    def join(self, name, has=()):
        self.host[name] = self.random.choice(self.hosts)
        self.has[name], self.pending[name] = set(has), {}
        packed = sum(1 << chunk for chunk in self.has[name]).to_bytes((self.chunks + 7) // 8, "little")
        self.swarm.join(name, self.host[name], packed if has else None)

    def leave(self, name):
        self.swarm.leave(name)
        self.bringing_in -= {(name, chunk) for chunk in self.pending[name]}
        for table in (self.host, self.has, self.pending):
            del table[name]
        self.settle()

    def ask(self, name, room=4):
        self.take(name, self.swarm.next(name, room, self.now))

    def settle(self):
        for name, assignments in self.swarm.dispatch(self.now):
            assert assignments
            self.take(name, assignments)

    def take(self, name, assignments):
        for chunk, holder in [(item.chunk, item.holder) for item in assignments]:
            assert chunk not in self.has[name], "it has that"
            assert chunk not in self.pending[name], "it is pulling that"
            self.check_holder(name, chunk, holder)
            self.pending[name][chunk] = holder

    def check_holder(self, name, chunk, holder):
        assert (name, holder) not in self.refused, "it had a corrupt chunk from there"
        if holder == ORIGIN:
            assert not self.is_released
            self.asked_of_origin.append(chunk)
        else:
            assert holder != name
            assert chunk in self.has[holder], "the holder lacks it"
            assert holder not in self.swarm.liars
        is_remote = holder == ORIGIN or self.host[holder] != self.host[name]
        if is_remote and self.swarm.topology is not Topology.DIRECT:
            self.check_brought_in_once(name, chunk)
            self.bringing_in.add((name, chunk))

    def check_brought_in_once(self, name, chunk):
        for other in self.host:
            if self.host[other] == self.host[name] and other != name:
                assert (other, chunk) not in self.bringing_in, "the host is bringing it in already"

    def finish(self, name, chunk):
        """End a pull as it would end: with the chunk, unless the holder is gone or lies."""
        holder = self.pending[name][chunk]
        if holder in self.liars:
            self.fail(name, chunk, Why.CORRUPT)
        elif holder != ORIGIN and holder not in self.host:
            self.fail(name, chunk, Why.LOST)
        else:
            del self.pending[name][chunk]
            self.bringing_in.discard((name, chunk))
            self.has[name].add(chunk)
            self.swarm.done(name, [chunk], self.now)
            self.ask(name, self.random.randint(1, 4))
            self.settle()

    def fail(self, name, chunk, why):
        holder = self.pending[name].pop(chunk)
        self.bringing_in.discard((name, chunk))
        if why is Why.CORRUPT and holder != ORIGIN:
            self.refused.add((name, holder))
        self.swarm.failed(name, chunk, holder, why, self.now)
        self.ask(name)
        self.settle()

    def tick(self, seconds):
        self.now += seconds
        for name, assignment in self.swarm.tick(self.now):
            assert self.pending[name][assignment.chunk] == assignment.holder
            self.bringing_in.discard((name, assignment.chunk))
        self.settle()

    def release_if_possible(self):
        if self.swarm.is_released and not self.is_released:
            self.is_released = True
            self.swarm.release_origin()

    def pulls(self):
        return [(name, chunk) for name, chunks in self.pending.items() for chunk in chunks]

    def run(self):
        """Go on until everybody has everything, or nobody can go on."""
        for name in list(self.host):
            if not self.pending[name]:
                self.ask(name)
        idle = 0
        while not self.swarm.is_finished and idle < 5 and not self.swarm.lost:
            pulls = self.pulls()
            if pulls:
                idle = 0
                self.finish(*self.random.choice(pulls))
            else:
                idle += 1
                self.tick(1.1)  # pauses pass
            self.release_if_possible()

    def is_complete(self):
        return all(has == set(range(self.chunks)) for has in self.has.values())


def numbers(assignments: list[Assignment]) -> set[int]:
    return {assignment.chunk for assignment in assignments}

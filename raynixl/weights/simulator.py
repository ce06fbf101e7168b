"""The simulator: plays a push over modelled links, event by event, with the very policy that real pushes use.

Every link is a queue: what comes first is carried first, at the link's whole bandwidth, and goes on to the next
link as it arrives there. So no link idles while something waits for it, and nothing is faster than its slowest link.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from raynixl.weights.assignment import ORIGIN, Assignment, Why
from raynixl.weights.bitmap import to_bytes
from raynixl.weights.scenario import Rank, Scenario, Simulation
from raynixl.weights.swarm import Swarm

_TICK_SECONDS = 0.25
_IDLE_TICKS = 100  # with nothing else going on: nothing will


@dataclass(slots=True)
class _Link:
    seconds_per_byte: float
    free: float = 0.0


@dataclass(slots=True, eq=False)
class _Receiver:
    """A rank while it takes part."""

    number: int
    name: str
    rank: Rank
    into: tuple[_Link, ...]
    out: tuple[_Link, ...]
    copy: _Link
    todo: deque[Assignment] = field(default_factory=deque)
    pulling: int = 0
    missing: int = 0
    news: list[int] = field(default_factory=list)  # verified, and not yet told
    is_asking: bool = False
    finished: float = math.nan

    @property
    def is_staying(self) -> bool:
        return math.isinf(self.rank.dies) and math.isinf(self.rank.freezes)

    def is_gone(self, now: float) -> bool:
        return now >= self.rank.dies or now >= self.rank.freezes


@dataclass(slots=True, eq=False)
class _Pull:
    """One chunk on its way over its links."""

    receiver: _Receiver
    assignment: Assignment
    holder: _Receiver | None
    nbytes: int
    links: tuple[_Link, ...]
    began: float
    passed: int = 0
    lands: float = 0.0


def simulate(scenario: Scenario) -> Simulation:
    """Play a scenario to its end."""
    return _Play(scenario).run()


class _Play:
    """A push being played: the clock, the events to come, and the books."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._origin = _Link(1 / scenario.origin)
        link = max(min(node.down, node.rank) for node in scenario.nodes)
        uplinks = scenario.origin / link / len(scenario.images)
        policy = scenario.policy if scenario.policy.uplinks is not None else replace(scenario.policy, uplinks=uplinks)
        hosts = [f"origin-{number}" for number in range(scenario.origin_hosts)]
        self._chunks = [max(1, -(-nbytes // scenario.chunk_nbytes)) for nbytes in scenario.images]
        self._swarms = [
            Swarm(chunks, origin_hosts=hosts, topology=scenario.topology, policy=policy) for chunks in self._chunks
        ]
        self._receivers = self._make_receivers()
        self._unreleased = set(range(len(scenario.images)))
        self._release = math.nan
        self._nbytes = {"origin": 0, "peer": 0, "local": 0}
        self._failures = self._messages = 0

    def _make_receivers(self) -> dict[str, _Receiver]:
        nodes = [(_Link(1 / node.up), _Link(1 / node.down)) for node in self._scenario.nodes]
        made = {}
        for number, rank in enumerate(self._scenario.ranks):
            node, (up, down) = self._scenario.nodes[rank.node], nodes[rank.node]
            own = () if math.isinf(node.rank) else (_Link(1 / node.rank),)
            back = () if math.isinf(node.rank) else (_Link(1 / node.rank),)
            copy = _Link(1 / node.local)
            made[str(number)] = _Receiver(number, str(number), rank, (down, *own), (*back, up), copy)
        return made

    def run(self) -> Simulation:
        for receiver in self._receivers.values():
            if not receiver.rank.is_holding:
                self._at(receiver.rank.joins, self._join, receiver)
            else:
                self._join(receiver)
            if receiver.rank.dies < math.inf:
                self._at(receiver.rank.dies + self._scenario.detection, self._bury, receiver)
        self._at(_TICK_SECONDS, self._tick, 0)
        events = self._events
        while events:
            self._now, _, act, arguments = heapq.heappop(events)
            act(*arguments)
        return self._result()

    def _at(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act, arguments))

    # the coordinator

    def _join(self, receiver: _Receiver) -> None:
        rank = receiver.rank
        chunks = self._chunks[rank.image]
        has = to_bytes((1 << chunks) - 1, chunks) if rank.is_holding else None
        self._swarms[rank.image].join(receiver.name, f"node-{rank.node}", has)
        receiver.missing = 0 if rank.is_holding else chunks
        if rank.is_holding:
            receiver.finished = 0.0
        else:
            self._ask(receiver)

    def _bury(self, receiver: _Receiver) -> None:
        self._swarms[receiver.rank.image].leave(receiver.name)
        self._settle(receiver.rank.image)

    def _hear(self, receiver: _Receiver, news: list[int], room: int) -> None:
        image = receiver.rank.image
        swarm = self._swarms[image]
        if receiver.name not in swarm:
            return
        self._messages += 1
        swarm.done(receiver.name, news, self._now)
        if room > 0:
            found = swarm.next(receiver.name, room, self._now)
            self._at(self._now + self._scenario.control / 2, self._start, receiver, found)
        self._settle(image)

    def _fail(self, pull: _Pull, why: Why) -> None:
        receiver = pull.receiver
        if receiver.is_gone(self._now):
            return
        self._failures += 1
        receiver.pulling -= 1
        self._work(receiver)
        self._at(self._now + self._scenario.control / 2, self._hear_failure, receiver, pull.assignment, why)

    def _hear_failure(self, receiver: _Receiver, chosen: Assignment, why: Why) -> None:
        image = receiver.rank.image
        self._swarms[image].failed(receiver.name, chosen.chunk, chosen.holder, why, self._now)
        self._settle(image)
        self._at(self._now + self._scenario.control / 2, self._ask, receiver)

    def _tick(self, idle: int) -> None:
        """What a coordinator does now and then, until all have finished or nothing happens any more."""
        idle = 0 if self._events else idle + 1
        if idle > _IDLE_TICKS or all(
            not math.isnan(item.finished) for item in self._receivers.values() if item.is_staying
        ):
            return
        for image, swarm in enumerate(self._swarms):
            swarm.tick(self._now)
            self._settle(image)
        self._at(self._now + _TICK_SECONDS, self._tick, idle)

    def _settle(self, image: int) -> None:
        swarm = self._swarms[image]
        for name, assignments in swarm.dispatch(self._now):
            self._answer(self._receivers[name], assignments)
        if image in self._unreleased and swarm.is_released:
            self._unreleased.remove(image)
            swarm.release_origin()
            if not self._unreleased:
                self._release = self._now

    def _answer(self, receiver: _Receiver, assignments: list[Assignment]) -> None:
        self._at(self._now + self._scenario.control / 2, self._start, receiver, assignments)

    # a receiver

    def _ask(self, receiver: _Receiver) -> None:
        """Tell what is new and ask for more, when half of what there is room for is free."""
        left = receiver.pulling + len(receiver.todo)
        room = self._scenario.room - left
        if receiver.missing and (receiver.is_asking or room * 2 < self._scenario.room):
            return
        receiver.is_asking = True
        news, receiver.news = receiver.news, []
        self._at(self._now + self._scenario.control / 2, self._hear, receiver, news, min(room, receiver.missing))

    def _start(self, receiver: _Receiver, assignments: list[Assignment]) -> None:
        receiver.is_asking = False
        receiver.todo.extend(assignments)
        self._work(receiver)
        if assignments or receiver.news:
            self._ask(receiver)

    def _work(self, receiver: _Receiver) -> None:
        scenario = self._scenario
        while receiver.todo and receiver.pulling < scenario.depth and not receiver.is_gone(self._now):
            assignment = receiver.todo.popleft()
            receiver.pulling += 1
            holder = None if assignment.holder == ORIGIN else self._receivers[assignment.holder]
            nbytes = self._size(receiver.rank.image, assignment.chunk)
            if holder is None:
                kind, links = "origin", (self._origin, *receiver.into)
            elif holder.rank.node == receiver.rank.node:
                kind, links = "local", (receiver.copy,)
            else:
                kind, links = "peer", (*holder.out, *receiver.into)
            self._nbytes[kind] += nbytes
            pull = _Pull(receiver, assignment, holder, nbytes, links, self._now)
            self._at(self._now + 2 * scenario.latency, self._pass, pull)

    def _size(self, image: int, chunk: int) -> int:
        whole = self._scenario.chunk_nbytes
        return min(whole, self._scenario.images[image] - chunk * whole)

    def _pass(self, pull: _Pull) -> None:
        """Queue a chunk at its next link; it goes on to the one after as soon as its first byte does."""
        while pull.passed < len(pull.links):
            link = pull.links[pull.passed]
            pull.passed += 1
            begins = max(self._now, link.free)
            link.free = begins + pull.nbytes * link.seconds_per_byte
            pull.lands = max(pull.lands, link.free)
            if begins > self._now:
                self._at(begins, self._pass, pull)
                return
        self._at(pull.lands, self._land, pull)

    def _land(self, pull: _Pull) -> None:
        receiver, holder = pull.receiver, pull.holder
        if receiver.is_gone(self._now):
            return
        if holder is not None and self._now >= holder.rank.dies:
            known = max(self._now, holder.rank.dies + self._scenario.detection)
            self._at(known, self._fail, pull, Why.LOST)
        elif holder is not None and self._now >= holder.rank.freezes:
            self._at(max(self._now, pull.began + self._scenario.read_timeout), self._fail, pull, Why.STALLED)
        elif holder is not None and holder.rank.is_lying:
            self._fail(pull, Why.CORRUPT)
        else:
            self._verified(receiver, pull.assignment.chunk)

    def _verified(self, receiver: _Receiver, chunk: int) -> None:
        receiver.pulling -= 1
        receiver.missing -= 1
        receiver.news.append(chunk)
        if not receiver.missing:
            receiver.finished = self._now
        self._work(receiver)
        self._ask(receiver)

    def _result(self) -> Simulation:
        stayed = [item for item in self._receivers.values() if item.is_staying]
        finished = np.array([receiver.finished for receiver in self._receivers.values()])
        seconds = max((receiver.finished for receiver in stayed), default=0.0)
        if any(math.isnan(receiver.finished) for receiver in stayed):
            seconds = math.nan
        liars = tuple(sorted(int(name) for swarm in self._swarms for name in swarm.liars))
        nbytes = self._nbytes
        return Simulation(
            seconds, self._release, finished, nbytes["origin"], nbytes["peer"], nbytes["local"],
            self._failures, self._messages, liars,
        )  # fmt: skip

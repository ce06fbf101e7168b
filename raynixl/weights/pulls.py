"""Pulls: the phase of a push in which targets bring the version in, from the sources and from each other."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from raynixl.errors import RaynixlError
from raynixl.weights.arrivals import Arrivals
from raynixl.weights.assembly import told_delta
from raynixl.weights.assignment import Topology
from raynixl.weights.conversation import Asking
from raynixl.weights.exchange import Exchange
from raynixl.weights.protocol import Holder, topic
from raynixl.weights.stopped import stopped
from raynixl.weights.swarm import Swarm
from raynixl.weights.targeting import Describe, Pull
from raynixl.weights.targets import NotTold, Targets

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.rounds import Round

_TICK_SECONDS = 0.5
_TELL_LOOK_SECONDS = 0.05
_HOPE_SECONDS = 5.0  # for which receivers wait for the first of them that has everything, and what its bytes take
_SLOWEST = 1e9  # bytes a second at which a delta is applied, at least

Answers = dict[str, "bytes | RaynixlError"]


class Pulls:
    """The pulls of one push, under one `exchange`. Targets that come meanwhile take part. `run` it once.

    Each image has one swarm where its receivers feed each other. Where some of them get a delta, these are to have the
    whole image first, and the others get it from them: the sources give none of it unless they all fail.
    """

    def __init__(
        self, agent: Agent, name: str, now: Round, ranks: tuple[Origins, Targets], *, topology: Topology,
        exchange: Exchange,
    ) -> None:  # fmt: skip
        self._agent = agent
        self._name = name
        self._now = now
        self._origins, self._targets = ranks
        self._topology = topology
        self._exchange = exchange
        self._swarms: dict[int, Swarm] = {}  # of images
        self._whole: dict[str, Holder] = {}
        self._with_delta: set[str] = set()
        self._telling: set[str] = set()  # targets that forgot the plan, and are told again
        self._asked_twice: set[str] = set()
        self._told_again: deque[tuple[str, Targets | None]] = deque()
        self._has_told = threading.Event()  # set when one was added to _told_again
        self._began = time.monotonic()

    def run(self, arrivals: Arrivals, deadline: float) -> Answers:
        """Have all targets pull by a deadline; return what they answered."""
        payloads: dict[str, bytes] = {}
        for image in sorted(set(self._now.image_of.values())):
            payloads |= self._told(image, deadline)
        asking = Asking(self._agent, topic(self._name, "pull"), deadline)
        asking.ask(payloads)
        arrivals.open()
        answers: Answers = {}
        ticked = time.monotonic()
        while True:
            found = asking.collect()
            if found:
                answers |= {name: self._targets.explained(name, answer) for name, answer in found.items()}
                self._note(found)
            more = self._taken(arrivals, asking) | self._retold(asking)
            if more:
                asking.ask(more)
            elif not asking.open and not self._telling:
                self._now.deltas = len(self._with_delta)
                return answers
            elif not asking.open:
                self._has_told.wait(_TELL_LOOK_SECONDS)
            if time.monotonic() - ticked > _TICK_SECONDS:
                ticked = time.monotonic()
                self._exchange.tick()
                found = self._stopped(asking)
                if found:
                    answers |= found
                    self._note(found)

    def _stopped(self, asking: Asking) -> Answers:
        """Give up targets that are stopped if nobody else is waited for."""
        found = stopped(self._agent, asking.open, time.monotonic() - self._began)
        if len(found) < len(asking.open):
            return {}
        asking.give_up(found)
        return dict(found)

    def _note(self, found: Mapping[str, bytes | RaynixlError]) -> None:
        """Let others know who is over, and who has everything now."""
        well, failed = self._targets.answers(found)
        for name, error in failed.items():
            if isinstance(error, NotTold) and name not in self._asked_twice:
                self._tell_again(name)
        over = {name: answer for name, answer in found.items() if name not in self._telling}
        whole = {name: answer.holder for name, answer in well.items() if answer.holder is not None}
        self._whole |= whole
        self._exchange.over(over, failed.keys() & over.keys(), whole)

    def _told(self, image: int, deadline: float) -> dict[str, bytes]:
        """Return what the targets of one image are told to pull; those that relay take part in the exchange."""
        now, froze = self._now, self._now.froze
        names = [name for name in now.image_of if now.image_of[name] == image and name not in now.excluded]
        blobs, blob_digests = told_delta(froze.deltas.get(image, ()))
        with_delta = [name for name in names if blobs and self._targets[name].version == froze.base]
        others = [name for name in names if name not in with_delta]
        self._with_delta.update(with_delta)
        relays_delta = self._relays(with_delta, len(blob_digests))
        if with_delta and self._topology is not Topology.DIRECT:
            is_relay = bool(others) or relays_delta
        else:
            is_relay = self._relays(others, len(froze.digests[image]))
        if is_relay:
            self._share(image, names, with_delta)
        if relays_delta:
            parts = [[one.owner for one in blob.at] for blob in blobs]
            swarm = Swarm(len(blob_digests), origin_hosts=self._hosts(), topology=Topology.RELAY)
            self._exchange.add(swarm, self._hosts_of(with_delta), parts, is_delta=True)
        self._exchange.expect(names if not is_relay else with_delta if not relays_delta else ())
        pull = self._pull(image, deadline, is_relay=is_relay)
        full = pull.to_bytes() if others else b""
        delta = b""
        if with_delta:
            delta = replace(
                pull, base=froze.base, blobs=blobs, blob_digests=blob_digests, relays_delta=relays_delta
            ).to_bytes()  # fmt: skip
        return {name: delta if name in with_delta else full for name in names}

    def _pull(self, image: int, deadline: float, *, is_relay: bool) -> Pull:
        now, froze = self._now, self._now.froze
        return Pull(
            push=now.push, version=now.version, plan=now.plan_key,
            seconds=max(0.001, deadline - time.monotonic()), flip_seconds=now.left(), is_relay=is_relay,
            origins={part: froze.holders[part] for part in now.planned.incoming(image).parts},
            digests=froze.digests[image],
        )  # fmt: skip

    def _share(self, image: int, names: Sequence[str], hopes: Sequence[str]) -> Swarm:
        """Have receivers of an image feed each other. While some of them are `hopes`, the sources give nothing."""
        froze = self._now.froze
        swarm = self._swarms[image] = Swarm(
            len(froze.digests[image]), origin_hosts=self._hosts(), topology=Topology.RELAY, holds_origin=bool(hopes)
        )  # fmt: skip
        parts = [[one.name for one in froze.holders[part]] for part in self._now.planned.incoming(image).parts]
        self._exchange.add(swarm, self._hosts_of(names), parts)
        if hopes:
            seconds = _HOPE_SECONDS + self._now.planned.images[image].nbytes / _SLOWEST
            self._exchange.hope(swarm, hopes, seconds)
        return swarm

    def _relays(self, names: Sequence[str], chunks: int) -> bool:
        """Whether receivers feed each other."""
        swarm = Swarm(chunks, origin_hosts=self._hosts(), topology=self._topology)
        for name, host in self._hosts_of(names).items():
            swarm.join(name, host)
        return len(names) > 1 and not swarm.is_direct

    def _hosts_of(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self._targets[name].host for name in names}

    def _hosts(self) -> list[str]:
        """Return the hosts of the sources, as far as they are known."""
        hosts = []
        for name in self._origins.planned:
            connection = self._agent.connector.current(name)
            record = None if connection is None else connection.record
            hosts.append(f"host of {name}" if record is None else record.host)
        return hosts

    # Those that come midway

    def _taken(self, arrivals: Arrivals, asking: Asking) -> dict[str, bytes]:
        """Take in who has come; return what they are told to pull."""
        told: dict[str, bytes] = {}
        for arrival in arrivals.take(is_last=not asking.open and not self._telling):
            if set(arrival.image_of) & set(self._targets.names):
                continue  # it has come twice
            arrival.is_taken = True
            self._targets.adopt(arrival.targets)
            for name, image in arrival.image_of.items():
                self._now.late.add(name)
                told[name] = self._admitted(name, image, asking)
        return told

    def _admitted(self, name: str, image: int, asking: Asking) -> bytes:
        """Have one that comes midway pull its image, from those that have it or will; return what it is told."""
        swarm = self._swarms.get(image)
        if swarm is None:  # so far they pull by themselves
            same = [one for one, own in self._now.image_of.items() if own == image]
            hopes = [one for one in same if one in asking.open]
            swarm = self._share(image, [one for one in same if one in hopes or one in self._whole], hopes)
            self._exchange.over((), (), {one: self._whole[one] for one in same if one in self._whole})
        self._exchange.admit(swarm, name, self._targets[name].host)
        self._now.image_of[name] = image
        return self._pull(image, asking.deadline, is_relay=True).to_bytes()

    # Those that have forgotten what they were told

    def _tell_again(self, name: str) -> None:
        """Tell a target of the plan again, in a thread of its own: the others go on meanwhile."""
        self._asked_twice.add(name)
        self._telling.add(name)
        self._with_delta.discard(name)  # what it served is forgotten, too
        threading.Thread(target=self._tell, args=(name,), name="raynixl-tell", daemon=True).start()

    def _tell(self, name: str) -> None:
        known: Targets | None = None
        try:
            targets = Targets(self._agent, self._name, [(name,)])
            deadline = time.monotonic() + self._now.left()
            failed = targets.describe([name], question(self._origins, self._now.left()), deadline)
            if not failed and targets[name].shards.digest == self._targets[name].shards.digest:
                image_of = {name: self._now.image_of[name]}
                failed = targets.tell(self._now.planned, image_of, self._now.chunk_nbytes, deadline)
                known = None if failed else targets
        finally:
            self._told_again.append((name, known))
            self._has_told.set()

    def _retold(self, asking: Asking) -> dict[str, bytes]:
        """Return what those that know the plan again are told to pull."""
        told: dict[str, bytes] = {}
        self._has_told.clear()
        while self._told_again:
            name, targets = self._told_again.popleft()
            self._telling.discard(name)
            if targets is None:
                self._exchange.over([name], [name])
                continue
            targets.replicas = []  # it follows already
            self._targets.adopt(targets)
            told[name] = self._told_otherwise(name, self._now.image_of[name], asking)
        return told

    def _told_otherwise(self, name: str, image: int, asking: Asking) -> bytes:
        """Return what one pulls that was to get a delta, maybe, and has no base: as others of its kind do."""
        is_relay = image in self._swarms
        peers = [one for one in self._with_delta if self._now.image_of[one] == image]
        if not is_relay and peers and self._topology is not Topology.DIRECT:
            told = self._admitted(name, image, asking)
            self._exchange.over([name], [])  # it needs no source any more
            return told
        return self._pull(image, asking.deadline, is_relay=is_relay).to_bytes()


def question(origins: Origins, seconds: float) -> Describe:
    """Return what to ask targets that have not said what they need."""
    source, shards = next(iter(origins.planned.items()))
    return Describe(source=source, table=shards.table.digest, seconds=seconds)

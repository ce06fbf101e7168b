"""Pulls: the phase of a push in which targets bring the version in, from the sources and from each other."""

from __future__ import annotations

import time
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
from raynixl.weights.targeting import Pull

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.origins import Origins
    from raynixl.weights.rounds import Round
    from raynixl.weights.targets import Targets

_TICK_SECONDS = 0.5
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
            late = self._taken(arrivals, asking)
            if late:
                asking.ask(late)
            elif not asking.open:
                return answers
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
        whole = {name: answer.holder for name, answer in well.items() if answer.holder is not None}
        self._whole |= whole
        self._exchange.over(found, failed, whole)

    def _told(self, image: int, deadline: float) -> dict[str, bytes]:
        """Return what the targets of one image are told to pull; those that relay take part in the exchange."""
        now, froze = self._now, self._now.froze
        names = [name for name in now.image_of if now.image_of[name] == image and name not in now.excluded]
        blobs, blob_digests = told_delta(froze.deltas.get(image, ()))
        with_delta = [name for name in names if blobs and self._targets[name].version == froze.base]
        others = [name for name in names if name not in with_delta]
        now.deltas += len(with_delta)
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
            push=now.push, version=now.version, plan=now.planned.digest,
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
        for arrival in arrivals.take(is_last=not asking.open):
            if set(arrival.image_of) & set(self._targets.names):
                continue  # it has come twice
            arrival.is_taken = True
            self._targets.adopt(arrival.targets)
            for name, image in arrival.image_of.items():
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
        self._now.late.add(name)
        return self._pull(image, asking.deadline, is_relay=True).to_bytes()

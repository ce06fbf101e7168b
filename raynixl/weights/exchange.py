"""The exchange: while a version is pulled, it answers receivers that ask what to pull from whom, by their swarm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import PeerLost
from raynixl.weights.assignment import ORIGIN
from raynixl.weights.protocol import Fault, Holder
from raynixl.weights.ranks import incarnation_of
from raynixl.weights.relay import done_topic, next_topic
from raynixl.weights.relaying import Batch, Next
from raynixl.weights.swarm import Swarm

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.backends.base import Link
    from raynixl.messages import Message

_POLL_SECONDS = 2.0
"""How long a question waits for chunks before it is answered with none: whoever asks knows then that we live."""

Key = tuple[str, bool]
"""A receiver, and whether it is the delta's chunks that it relays, or the image's."""


@dataclass(slots=True, eq=False)
class _Member:
    """A receiver: its swarm, its slot once it has asked, what waits to be told to it, and its open question."""

    name: str
    swarm: Swarm
    holder: Holder | None = None
    mail: list[tuple[int, str]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    question: tuple[Message, Link] | None = None
    asked: float = 0.0
    room: int = 0


@dataclass(slots=True)
class _Images:
    """What is known of one swarm: the sources of each part, and who may come to hold all of it, and by when."""

    is_delta: bool
    parts: Sequence[Sequence[str]]
    hopes: set[str] = field(default_factory=set)
    until: float = 0.0


Answers = list[tuple["Message", "Link", Batch]]


class Exchange:
    """The swarms of one push. Close it when the pulls are over.

    Questions are answered by the agent's own thread, at once or as soon as there is something to tell: none waits in a
    thread. `on_released` is called once, in a thread of its own, when the sources are needed no more: receivers hold
    all that swarms bring in, and those that pull from the sources by themselves are done.
    """

    def __init__(self, agent: Agent, name: str, push: str, *, on_released: Callable[[], None]) -> None:
        self._agent = agent
        self._topics = (next_topic(name, push), done_topic(name, push))
        self._on_released = on_released
        self._lock = threading.Lock()  # protects all below; nothing is sent while it is held
        self._swarms: dict[Swarm, _Images] = {}
        self._members: dict[Key, _Member] = {}
        self._alone: set[str] = set()
        self._lost_source = ""
        self._is_released = False
        self._is_closed = False
        agent.control.answer(self._topics[0], self._on_next)
        agent.control.answer(self._topics[1], self._on_done)

    def __repr__(self) -> str:
        return f"Exchange({len(self._members)} receivers of {len(self._swarms)} images)"

    # Who takes part

    def add(
        self, swarm: Swarm, hosts: Mapping[str, str], parts: Sequence[Sequence[str]] = (), *, is_delta: bool = False,
    ) -> None:  # fmt: skip
        """Have receivers, with their hosts, take part in a swarm; `parts` names the sources of each part."""
        with self._lock:
            self._swarms[swarm] = _Images(is_delta, parts)
            if self._is_released:
                swarm.release_origin()
            for name, host in hosts.items():
                swarm.join(name, host)
                self._members[name, is_delta] = _Member(name, swarm)

    def admit(self, swarm: Swarm, name: str, host: str) -> None:
        """Have a receiver that comes midway take part in the swarm of its image."""
        with self._lock:
            swarm.join(name, host, is_late=True)
            self._members[name, False] = _Member(name, swarm)

    def hope(self, swarm: Swarm, names: Iterable[str], seconds: float) -> None:
        """Let a swarm that holds its origin wait for these to have everything, before it asks the origin."""
        with self._lock:
            images = self._swarms[swarm]
            images.hopes.update(names)
            images.until = time.monotonic() + seconds

    def expect(self, names: Iterable[str]) -> None:
        """Keep the sources until these, which pull from them by themselves, are over."""
        with self._lock:
            self._alone.update(names)

    def over(self, names: Iterable[str], failed: Iterable[str], whole: Mapping[str, Holder] | None = None) -> None:
        """Note that receivers have answered. Those that failed are forgotten: others get their chunks elsewhere.

        `whole` are those that hold all of their image, and where: they give it to others.
        """
        with self._lock:
            self._alone.difference_update(names)
            for name in failed:
                self._forget(name)
            for name, holder in ({} if whole is None else whole).items():
                self._note_whole(name, holder)
            for images in self._swarms.values():
                images.hopes.difference_update(names)
            answers = self._settle(self._swarms)
        self._send(answers)

    def offer(self, swarm: Swarm, host: str, holder: Holder) -> None:
        """Have somebody who holds all chunks give them."""
        with self._lock:
            if holder.name not in swarm:
                swarm.join(holder.name, host, _all(swarm.chunks))
            self._members[holder.name, False] = _Member(holder.name, swarm, holder)
            answers = self._settle([swarm])
        self._send(answers)

    def tick(self) -> None:
        """Look for pulls that take too long, and for holders that are gone; to be called now and then."""
        with self._lock:
            now = time.monotonic()
            for name in {name for name, _ in self._members if self._agent.lost(name) is not None}:
                self._forget(name)
            self._check_sources()
            for swarm in self._swarms:
                swarm.tick(now)
            answers = self._settle(self._swarms)
            for member in self._members.values():
                if member.question is not None and now - member.asked > _POLL_SECONDS:
                    answers.append(self._answer(member, Batch()))
        self._send(answers)

    @property
    def liars(self) -> tuple[str, ...]:
        """Receivers that served corrupt chunks."""
        with self._lock:
            return tuple(sorted({name for swarm in self._swarms for name in swarm.liars}))

    @property
    def origin_chunks(self) -> int:
        """How many chunks the sources were asked for."""
        with self._lock:
            return sum(swarm.origin_chunks for swarm in self._swarms)

    def close(self) -> None:
        """Answer no more. Idempotent."""
        for where in self._topics:
            self._agent.control.unanswer(where)
        with self._lock:
            self._is_closed = True
            waiting = [member for member in self._members.values() if member.question is not None]
            answers = [self._answer(member, _gone(member.name)) for member in waiting]
        self._send(answers)

    # What receivers say, on the agent's own thread

    def _on_next(self, message: Message, link: Link) -> None:
        said = Next.from_bytes(message.payload)
        with self._lock:
            member = None if self._is_closed else self._heard(link.peer, said)
            if member is None:
                answers = [(message, link, _gone(link.peer))]
            else:
                member.question, member.asked, member.room = (message, link), time.monotonic(), said.room
                self._serve(member)
                answers = self._settled(member)
        self._send(answers)

    def _on_done(self, message: Message, link: Link) -> None:
        said = Next.from_bytes(message.payload)
        self._agent.control.reply(link, message, b"")
        with self._lock:
            member = None if self._is_closed else self._heard(link.peer, said)
            if member is None:
                return
            if said.failed:
                self._serve(member)  # its question waits, and what failed can be had elsewhere
            answers = self._settled(member)
        self._send(answers)

    def _send(self, answers: Answers) -> None:
        for message, link, batch in answers:
            self._agent.control.reply(link, message, batch.to_bytes())

    def _serve(self, member: _Member) -> None:
        """Give a receiver what there is room for. _lock is held."""
        room = member.room - len(member.mail) if member.question is not None else 0
        if room > 0:
            member.mail += member.swarm.next(member.name, room, time.monotonic())

    def _heard(self, peer: str, said: Next) -> _Member | None:
        """Note what a receiver says; None if it takes no part. _lock is held."""
        member = self._members.get((peer, said.is_delta))
        if member is None:
            return None
        now, swarm = time.monotonic(), member.swarm
        if said.holder is not None and self._is_own(peer, said.holder):
            member.holder = said.holder
            self._swarms[swarm].hopes.discard(peer)  # of a delta: it lacks something itself
        if said.done:  # to ask is no progress: what stalls at a receiver that asks on is brought in by others
            swarm.done(peer, said.done, now)
        for one in said.failed:
            swarm.failed(peer, one.chunk, one.holder, one.why, now)
            if one.holder == ORIGIN:
                self._check_sources()
            elif self._agent.lost(one.holder) is not None:
                self._forget(one.holder)
        return member

    def _is_own(self, peer: str, holder: Holder) -> bool:
        return holder.name == peer and holder.incarnation == incarnation_of(self._agent, peer)

    def _note_whole(self, name: str, holder: Holder) -> None:
        member = self._members.get((name, False))
        if member is None or not self._is_own(name, holder):
            return
        member.holder = holder
        if not member.swarm.is_complete(name):
            member.swarm.done(name, range(member.swarm.chunks), time.monotonic())

    def _forget(self, name: str) -> None:
        for is_delta in (False, True):
            member = self._members.pop((name, is_delta), None)
            if member is not None:
                member.swarm.leave(name)
                self._swarms[member.swarm].hopes.discard(name)

    def _check_sources(self) -> None:
        """Ask the sources for no more where all of some part are gone. _lock is held."""
        for swarm, images in self._swarms.items():
            for names in images.parts:
                if names and all(self._agent.lost(name) is not None for name in names):
                    self._lost_source = names[0]
                    swarm.release_origin()

    # What they are told

    def _settle(self, swarms: Iterable[Swarm]) -> Answers:
        """Hand out what has become possible in some swarms; return what is to be sent. _lock is held."""
        now = time.monotonic()
        answers: Answers = []
        for swarm in swarms:
            images = self._swarms[swarm]
            if swarm.is_held and self._is_hopeless(swarm, images, now):
                swarm.open_origin()
                for one in self._members.values():
                    if one.swarm is swarm and one.question is not None:
                        self._serve(one)
                        answers += [self._deliver(one)] if one.mail else []
            for name, found in swarm.dispatch(now):
                member = self._members.get((name, images.is_delta))
                if member is not None:
                    member.mail += found
                    answers += [] if member.question is None else [self._deliver(member)]
            if swarm.lost:
                lost = PeerLost("nobody holds all of the version any more", hint="push again", peer=self._lost_source)
                losers = [one for one in self._members.values() if one.swarm is swarm and one.question is not None]
                answers += [self._answer(one, Batch(fault=Fault.of(lost))) for one in losers if not one.mail]
        self._release_if_possible()
        return answers

    def _is_hopeless(self, swarm: Swarm, images: _Images, now: float) -> bool:
        """Whether receivers cannot get everything from each other."""
        if not swarm.is_scarce:
            return swarm.has_rebuffed
        return not images.hopes or now > images.until

    def _settled(self, member: _Member) -> Answers:
        """Settle the swarm of a receiver that said something, and tell it what there is, or that it has all."""
        answers = self._settle([member.swarm])
        if member.question is not None and (member.mail or member.swarm.is_complete(member.name)):
            answers.append(self._deliver(member))
        return answers

    def _deliver(self, member: _Member) -> tuple[Message, Link, Batch]:
        """Close a question with what there is to tell."""
        mail, member.mail = member.mail, []
        fresh = {holder for _, holder in mail if holder and holder not in member.told}
        is_delta = self._swarms[member.swarm].is_delta
        known = (self._members.get((name, is_delta)) for name in fresh)
        holders = [one.holder for one in known if one is not None and one.holder is not None]
        member.told |= {holder.name for holder in holders}
        return self._answer(member, Batch(mail, holders))

    def _answer(self, member: _Member, batch: Batch) -> tuple[Message, Link, Batch]:
        """Close a question."""
        assert member.question is not None
        message, link = member.question
        member.question, member.room = None, 0
        return message, link, batch

    def _release_if_possible(self) -> None:
        if self._is_released or self._alone or not all(swarm.is_released for swarm in self._swarms):
            return
        self._is_released = True
        for swarm in self._swarms:
            swarm.release_origin()
        threading.Thread(target=self._on_released, name="raynixl-release", daemon=True).start()


def _gone(peer: str) -> Batch:
    return Batch(fault=Fault.of(PeerLost(f"{peer!r} takes no part in this push any more", hint="push again")))


def _all(count: int) -> bytes:
    return ((1 << count) - 1).to_bytes((count + 7) // 8, "little")

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
from raynixl.weights.relay import done_topic, next_topic
from raynixl.weights.swarm import Swarm
from raynixl.weights.targeting import Batch, Next

if TYPE_CHECKING:
    from raynixl.agents import Agent

_MAX_PARKED = 24
"""Questions that wait at a time, each in a thread; an agent answers few dozen at once, and others have some, too."""
_POLL_SECONDS = 2.0
"""How long a question waits for chunks before it is answered with none."""


@dataclass(slots=True)
class _Member:
    """A receiver: its swarm, its slot once it has asked, and what waits to be told to it."""

    swarm: Swarm
    holder: Holder | None = None
    mail: list[tuple[int, str]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    room: int = 0
    """For how many chunks there is room, while its question is not answered."""


class Exchange:
    """The swarms of one push. Close it when the pulls are over.

    `on_released` is called once, in a thread of its own, when the sources are needed no more: receivers hold all that
    swarms bring in, and those that pull from the sources by themselves are done.
    """

    def __init__(self, agent: Agent, name: str, push: str, *, on_released: Callable[[], None]) -> None:
        self._agent = agent
        self._topics = (next_topic(name, push), done_topic(name, push))
        self._on_released = on_released
        self._changed = threading.Condition()  # protects all below
        self._swarms: dict[Swarm, Sequence[Sequence[str]]] = {}  # and the sources of each part, until all is released
        self._members: dict[str, _Member] = {}
        self._alone: set[str] = set()
        self._lost_source = ""
        self._parked = 0
        self._is_released = False
        self._is_closed = False
        agent.serve(self._topics[0], self._on_next, threaded=True)
        agent.serve(self._topics[1], self._on_done, threaded=False)

    def __repr__(self) -> str:
        return f"Exchange({len(self._members)} receivers of {len(self._swarms)} images)"

    def add(self, swarm: Swarm, hosts: Mapping[str, str], parts: Sequence[Sequence[str]] = ()) -> None:
        """Have receivers, with their hosts, take part in a swarm; `parts` names the sources of each part."""
        with self._changed:
            self._swarms[swarm] = parts
            for name, host in hosts.items():
                swarm.join(name, host)
                self._members[name] = _Member(swarm)

    def expect(self, names: Iterable[str]) -> None:
        """Keep the sources until these, which pull from them by themselves, are over."""
        with self._changed:
            self._alone.update(names)

    def over(self, names: Iterable[str], failed: Iterable[str]) -> None:
        """Note that receivers have answered; those that failed are forgotten: others get their chunks elsewhere."""
        with self._changed:
            self._alone.difference_update(names)
            for name in failed:
                self._forget(name)
            self._dispatch()

    def offer(self, swarm: Swarm, host: str, holder: Holder) -> None:
        """Have somebody who holds all chunks give them."""
        with self._changed:
            if holder.name not in swarm:
                swarm.join(holder.name, host, _all(swarm.chunks))
            self._members[holder.name] = _Member(swarm, holder)
            self._dispatch()

    def tick(self) -> None:
        """Look for pulls that take too long, and for holders that are gone; to be called now and then."""
        with self._changed:
            now = time.monotonic()
            for name in [name for name in self._members if self._agent.lost(name) is not None]:
                self._forget(name)
            self._check_sources()
            for swarm in self._swarms:
                swarm.tick(now)
            self._dispatch()

    @property
    def liars(self) -> tuple[str, ...]:
        """Receivers that served corrupt chunks."""
        with self._changed:
            return tuple(sorted({name for swarm in self._swarms for name in swarm.liars}))

    @property
    def origin_chunks(self) -> int:
        """How many chunks the sources were asked for."""
        with self._changed:
            return sum(swarm.origin_chunks for swarm in self._swarms)

    def close(self) -> None:
        """Answer no more. Idempotent."""
        for where in self._topics:
            self._agent.control.unserve(where)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _on_next(self, peer: str, payload: bytes) -> bytes:
        message = Next.from_bytes(payload)
        until = time.monotonic() + _POLL_SECONDS
        with self._changed:
            member = self._heard(peer, message)
            if member is None:
                return _gone(peer).to_bytes()
            member.room = message.room
            self._serve(peer, member)
            self._dispatch()
            self._parked += 1
            while self._is_parked(peer, member) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._parked -= 1
            member.room = 0
            return self._batch(member).to_bytes()

    def _is_parked(self, peer: str, member: _Member) -> bool:
        """Whether there is nothing to tell a receiver yet. _changed is held."""
        if self._parked > _MAX_PARKED:
            return False
        is_over = self._is_closed or self._members.get(peer) is not member
        return not (is_over or member.mail or member.swarm.lost or member.swarm.is_complete(peer))

    def _on_done(self, peer: str, payload: bytes) -> bytes:
        message = Next.from_bytes(payload)
        with self._changed:
            member = self._heard(peer, message)
            if member is not None and message.failed:
                self._serve(peer, member)  # its question waits, and what failed can be had elsewhere
            self._dispatch()
        return Batch().to_bytes()

    def _serve(self, peer: str, member: _Member) -> None:
        """Give a receiver what there is room for. _changed is held."""
        room = member.room - len(member.mail)
        if room > 0:
            got = member.swarm.next(peer, room, time.monotonic())
            member.mail.extend((one.chunk, one.holder) for one in got)

    def _heard(self, peer: str, message: Next) -> _Member | None:
        """Note what a receiver says; None if it takes no part. _changed is held."""
        member = self._members.get(peer)
        if member is None:
            return None
        now, swarm = time.monotonic(), member.swarm
        if message.holder is not None and message.holder.name == peer:
            member.holder = message.holder
        if message.done:  # to ask is no progress: what stalls at a receiver that asks on is brought in by others
            swarm.done(peer, message.done, now)
        for one in message.failed:
            swarm.failed(peer, one.chunk, one.holder, one.why, now)
            if one.holder == ORIGIN:
                self._check_sources()
            elif self._agent.lost(one.holder) is not None:
                self._forget(one.holder)
        return member

    def _forget(self, name: str) -> None:
        member = self._members.pop(name, None)
        if member is not None:
            member.swarm.leave(name)

    def _check_sources(self) -> None:
        """Ask the sources for no more where all of some part are gone. _changed is held."""
        for swarm, parts in self._swarms.items():
            for names in parts:
                if names and all(self._agent.lost(name) is not None for name in names):
                    self._lost_source = names[0]
                    swarm.release_origin()

    def _dispatch(self) -> None:
        """Hand out what has become possible. _changed is held."""
        now = time.monotonic()
        for swarm in self._swarms:
            for name, found in swarm.dispatch(now):
                member = self._members.get(name)
                if member is not None:
                    member.mail.extend((one.chunk, one.holder) for one in found)
        if not self._is_released and not self._alone and all(swarm.is_released for swarm in self._swarms):
            self._is_released = True
            for swarm in self._swarms:
                swarm.release_origin()
            threading.Thread(target=self._on_released, name="raynixl-release", daemon=True).start()
        self._changed.notify_all()

    def _batch(self, member: _Member) -> Batch:
        if member.swarm.lost and not member.mail:
            lost = PeerLost("nobody holds all of the version any more", hint="push again", peer=self._lost_source)
            return Batch(fault=Fault.of(lost))
        mail, member.mail = tuple(member.mail), []
        fresh = {holder for _, holder in mail if holder and holder not in member.told}
        holders = [one.holder for name in fresh if (one := self._members.get(name)) and one.holder is not None]
        member.told |= {holder.name for holder in holders}
        return Batch(chunks=mail, holders=tuple(holders))


def _gone(peer: str) -> Batch:
    return Batch(fault=Fault.of(PeerLost(f"{peer!r} takes no part in this push any more", hint="push again")))


def _all(count: int) -> bytes:
    return ((1 << count) - 1).to_bytes((count + 7) // 8, "little")

"""The swarm: decides which receiver pulls which chunk of one image from whom; it moves nothing and reads no clock."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from raynixl.errors import ConfigError
from raynixl.weights.accusations import Accusations
from raynixl.weights.assignment import ORIGIN, Assignment, Policy, Topology, Why
from raynixl.weights.bitmap import from_bytes, indices, of, to_bytes
from raynixl.weights.choice import Choice, Origin
from raynixl.weights.holders import Holders, Member, Pulling
from raynixl.weights.parking import Parking

_STALL_TIMES, _STALL_SECONDS = 10.0, 2.0  # times the slowest pull, at least so long: machines are busy at times
_FAULTS = 3  # corrupt pulls of one chunk from the origin, before it is asked for that no more


class Swarm:
    """Who pulls what from whom, for the chunks 0 to `chunks` - 1 of one image.

    Receivers join, ask for chunks with `next`, and say what became of each: `done` once it is verified and can be
    served, or `failed`. One that gets nothing is parked: `dispatch`, to be called after any other call, hands out
    what has become possible since. A pull that was assigned stays assigned to that receiver, whatever else
    happens, until the receiver says `done` or `failed` or leaves: only it knows that nothing more lands there.
    Rarest chunks first, from the least busy holder, on the same host where one is; a host brings a chunk in once,
    and the origin gives each chunk once while some receiver that has it stays. With `holds_origin` it gives none
    before `open_origin`: others are to bring everything. Not safe in threads.
    """

    def __init__(
        self,
        chunks: int,
        *,
        origin_hosts: Sequence[str],
        topology: Topology | str = Topology.AUTO,
        policy: Policy | None = None,
        holds_origin: bool = False,
    ) -> None:
        if topology not in list(Topology):
            raise ConfigError(f"there is no topology {topology!r}", hint="take auto, direct or relay")
        self.chunks = chunks
        self.topology = Topology(topology)
        self.policy = Policy() if policy is None else policy
        draw = random.Random(self.policy.seed).random
        self._holders = Holders(chunks, self.policy.uploads, draw)
        hosts = frozenset(origin_hosts)
        self._uplinks = float(len(hosts)) if self.policy.uplinks is None else self.policy.uplinks
        uploads = max(1, round(self.policy.uploads * self._uplinks))
        self._origin = Origin(hosts, uploads, is_gone=not hosts, is_held=holds_origin)
        self._choice = Choice(self._holders, self._origin, self.policy, draw)
        self._parking = Parking(self._choice, self._holders)
        self._members: dict[str, Member] = {}
        self._accusations = Accusations()
        self._is_few: bool | None = None
        self._late = 0  # members that came midway
        self._slowest = 0.0  # seconds, of the pulls that are done

    # membership

    def join(self, receiver: str, host: str, has: bytes | None = None, *, is_late: bool = False) -> None:
        """Let a receiver take part, with the chunks that it has verified already (a bitmap, see `bitmap`).

        The origin gives one that is late only what nobody has, and waits for it no longer than for others.

        Raises:
            ConfigError: it takes part already, or has no name.
        """
        if receiver == ORIGIN or receiver in self._members:
            raise ConfigError(f"{receiver!r} takes part already", hint="let it leave first")
        present = 0 if has is None else from_bytes(has, self.chunks)
        member = Member(
            receiver, self._holders.host(host), present, self._holders.full & ~present, is_late=is_late
        )  # fmt: skip
        self._members[receiver] = member
        member.host.members.append(member)
        self._late += is_late
        member.is_serving = False
        if receiver not in self._accusations.liars:
            self._resume(member)
        self._is_few = None

    def leave(self, receiver: str) -> None:
        """Forget a receiver that left or died; those that pull from it will say so themselves."""
        member = self._members.pop(receiver, None)
        if member is None:
            return
        self._late -= member.is_late
        self._parking.forget(member)
        for pulling in member.pending.values():
            self._choice.write_off(member, pulling)
        self._holders.withdraw(member)
        member.host.members.remove(member)
        self._is_few = None

    def release_origin(self) -> None:
        """Assign nothing more to the origin: its sources are free, or dead."""
        self._origin.is_gone = True

    def open_origin(self) -> None:
        """Have the origin give what nobody has, after all."""
        self._origin.is_held = False

    # assignments

    def next(self, receiver: str, room: int, now: float) -> list[Assignment]:
        """Return up to `room` chunks for a receiver to pull, all of them where it pulls straight from the origin.

        None: it has, or is pulling, all that it can get now; it is parked until `dispatch`, or until it asks again.

        Raises:
            ConfigError: it does not take part.
        """
        member = self._members.get(receiver)
        if member is None:
            raise ConfigError(f"{receiver!r} takes no part in this push", hint="let it join first")
        if member.avoid or member.resumes is not None:
            self._catch_up(member, now)
        self._parking.forget(member)
        found = (
            self._choice.direct(member, self._turn(member), now)
            if self._is_direct(member)
            else self._choice.relay(member, room, now)
        )
        if not found:
            self._parking.park(member, room)
        return found

    def dispatch(self, now: float) -> list[tuple[str, list[Assignment]]]:
        """Return what parked receivers can get by now; they are parked no more."""
        return [(member.name, found) for member, found in self._parking.dispatch(now).items()]

    @property
    def is_direct(self) -> bool:
        """Whether all who take part pull straight from the origin, which then needs not be asked chunk by chunk."""
        return all(self._is_direct(member) for member in self._members.values())

    def _turn(self, member: Member) -> float:
        return list(self._members).index(member.name) / len(self._members)

    def _is_direct(self, member: Member) -> bool:
        if self._origin.is_shut or self.topology is Topology.RELAY or ORIGIN in member.avoid:
            return False
        if self.topology is Topology.DIRECT:
            return True
        if self._is_few is None:
            self._is_few = self._are_links_enough()
        return self._is_few and not any(
            other.has & ~member.has for other in self._members.values() if other is not member
        )

    def _are_links_enough(self) -> bool:
        hosts = [host for host in self._holders.hosts.values() if host.members]
        remote = [host for host in hosts if host.name not in self._origin.hosts]
        local = sum(len(host.members) for host in hosts if host.name in self._origin.hosts)
        is_alone = all(len(host.members) == 1 for host in remote)
        return is_alone and len(remote) <= self._uplinks and local <= self.policy.local_direct * len(self._origin.hosts)

    # what became of them

    def done(self, receiver: str, chunks: Iterable[int], now: float) -> None:
        """Note that a receiver has verified chunks, and serves them from now on."""
        member = self._members.get(receiver)
        if member is None:
            return  # it left, and this was on its way
        if member.avoid or member.resumes is not None:
            self._catch_up(member, now)
        member.progressed = now
        for chunk in chunks:
            pulling = member.pending.pop(chunk, None)
            if pulling is not None:
                self._choice.write_off(member, pulling)
                self._slowest = max(self._slowest, now - pulling.since)
                if pulling.holder is not None:
                    pulling.holder.complaints.clear()
                    member.is_rebuffed = False
            if 0 <= chunk < self.chunks:
                self._holders.gain(member, chunk)
        self._choice.freed[member.host] = None

    def failed(self, receiver: str, chunk: int, holder: str, why: Why, now: float) -> None:
        """Note that a pull ended without the chunk; it is free to be assigned again, from another holder."""
        member = self._members.get(receiver)
        pulling = None if member is None else member.pending.get(chunk)
        if member is None or pulling is None or holder != (pulling.holder.name if pulling.holder else ORIGIN):
            return  # it left, or this was answered already
        self._catch_up(member, now)
        self._drop(member, chunk)
        if why is Why.CORRUPT:
            self._accuse(member, pulling)
            return
        member.avoid[holder] = now + self.policy.pause_seconds
        source = pulling.holder
        if source is None:
            return
        member.is_rebuffed = True
        source.complaints.add(receiver)
        if why is Why.STALE:
            self._holders.withdraw(source)
        elif len(source.complaints) > 1 and source.name not in self._accusations.liars:
            self._holders.withdraw(source)
            source.resumes = now + self.policy.pause_seconds

    def _accuse(self, member: Member, pulling: Pulling) -> None:
        holder = pulling.holder
        self._accusations.add(member.name, ORIGIN if holder is None else holder.name)
        if holder is None:
            faults = self._origin.faults[pulling.chunk] = self._origin.faults.get(pulling.chunk, 0) + 1
            if faults >= _FAULTS:
                self._origin.hopeless |= 1 << pulling.chunk
            return
        member.avoid[holder.name] = float("inf")
        for other in self._members.values():
            if other.name in self._accusations.liars:
                self._holders.withdraw(other)
                other.resumes = None
            elif other.name in self._accusations.cleared and other.resumes is None:
                self._resume(other)

    def _drop(self, member: Member, chunk: int) -> Pulling | None:
        pulling = member.pending.pop(chunk, None)
        if pulling is not None:
            self._choice.write_off(member, pulling)
            member.wants |= 1 << chunk & ~member.has
        return pulling

    def _resume(self, member: Member) -> None:
        self._holders.resume(member)
        self._choice.freed[member.host] = None

    def _catch_up(self, member: Member, now: float) -> None:
        """Note what has passed by now."""
        if member.avoid:
            member.avoid = {holder: until for holder, until in member.avoid.items() if until > now}
        if member.resumes is not None and member.resumes <= now:
            member.resumes = None
            member.complaints.clear()
            self._resume(member)

    def tick(self, now: float) -> list[tuple[str, Assignment]]:
        """Write off pulls that take too long, and return them; call it now and then, and `dispatch` after it.

        Those are of receivers that finished nothing in `stall_seconds`, or in less where chunks come fast. Others may
        bring these chunks in from then on; they themselves are to be told to give them up and to say `failed`, and get
        them again only then.
        """
        self._choice.freed.update(dict.fromkeys(self._holders.hosts.values()))  # pauses may have passed
        overdue: list[tuple[str, Assignment]] = []
        limit = now - self._patience()
        for member in self._members.values():
            self._catch_up(member, now)
            if member.progressed > limit:
                continue
            for pulling in member.pending.values():
                if pulling.is_counted and pulling.since <= limit:
                    self._choice.write_off(member, pulling)
                    overdue.append(
                        (member.name, Assignment(pulling.chunk, pulling.holder.name if pulling.holder else ORIGIN))
                    )
        return overdue

    def _patience(self) -> float:
        """Return how long a receiver may finish nothing: chunks are alike, and so the slowest says what to expect."""
        longest = self.policy.stall_seconds
        return min(longest, max(_STALL_SECONDS, _STALL_TIMES * self._slowest)) if self._slowest else longest

    # how it stands

    @property
    def receivers(self) -> tuple[str, ...]:
        """Who takes part."""
        return tuple(self._members)

    def __contains__(self, receiver: object) -> bool:
        return receiver in self._members

    def is_complete(self, receiver: str) -> bool:
        """Whether a receiver that takes part has every chunk."""
        return self._members[receiver].has == self._holders.full

    @property
    def is_finished(self) -> bool:
        """Whether every receiver has every chunk."""
        return all(member.has == self._holders.full for member in self._members.values())

    @property
    def is_held(self) -> bool:
        """Whether the origin gives nothing before `open_origin`."""
        return self._origin.is_held

    @property
    def is_scarce(self) -> bool:
        """Whether there are chunks that no receiver can give."""
        return bool(self._holders.scarce[0])

    @property
    def has_rebuffed(self) -> bool:
        """Whether some receiver could not pull from the others."""
        return any(member.is_rebuffed for member in self._members.values())

    @property
    def is_released(self) -> bool:
        """Whether the origin is needed no more, should a receiver die, too (where there are two)."""
        needed = min(self.policy.copies, len(self._members) - self._late or len(self._members), 2)
        return needed > 0 and not any(self._holders.scarce[:needed])

    @property
    def lost(self) -> tuple[int, ...]:
        """The chunks that nobody can give any more: unless somebody joins who has them, not all can complete."""
        gone = self._holders.scarce[0]
        if gone and not self._origin.is_gone:
            gone &= self._origin.hopeless
        if not gone:
            return ()
        for member in self._members.values():
            gone &= ~of(member.pending)
            gone &= ~member.has if member.resumes is not None else -1
        return tuple(indices(gone).tolist())

    @property
    def liars(self) -> tuple[str, ...]:
        """The receivers that served corrupt chunks, and serve no more."""
        return tuple(sorted(self._accusations.liars - {ORIGIN}))

    @property
    def origin_chunks(self) -> int:
        """How many chunks were assigned to the origin so far."""
        return self._origin.given

    def has(self, receiver: str) -> bytes:
        """Return the bitmap of the chunks that a receiver has, as `join` takes it."""
        return to_bytes(self._members[receiver].has, self.chunks)


def bitmap(chunks: Iterable[int], count: int) -> bytes:
    """Return some of `count` chunks as the bitmap that `join` takes."""
    return to_bytes(of(chunks), count)

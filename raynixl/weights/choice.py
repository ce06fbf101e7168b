"""The choice of what a receiver pulls next and from whom, and the books of what is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raynixl.weights.assignment import ORIGIN, Assignment, Policy
from raynixl.weights.bitmap import indices, pick
from raynixl.weights.holders import Holders, Host, Member, Pulling

_HOSTS_TRIED = 6  # hosts that are looked at for anything of use: more are not worth it, and `Parking` finds them
_SOLE = 1  # chunks that a host has yet to pass on, from which on the origin prefers those that have less
_CHUNKS_TRIED = 4  # chunks that are looked at for one with a free holder on the same host


@dataclass(slots=True)
class Origin:
    """What the sources are doing."""

    hosts: frozenset[str]
    uploads: int
    is_gone: bool
    is_held: bool = False  # it is asked for nothing while receivers may come to have everything
    load: int = 0
    given: int = 0  # chunks, over all
    sending: int = 0  # bitmap of the chunks that are on their way
    faults: dict[int, int] = field(default_factory=dict)  # corrupt chunks
    hopeless: int = 0  # bitmap of those with too many

    @property
    def is_shut(self) -> bool:
        """Whether it gives nothing now."""
        return self.is_gone or self.is_held


class Choice:
    """Assigns chunks to receivers: the rarest first, from the least busy holder."""

    def __init__(self, holders: Holders, origin: Origin, policy: Policy, random: Callable[[], float]) -> None:
        self._holders = holders
        self._origin = origin
        self._extra = int(holders.full.bit_length() * policy.extra_share)  # chunks that it may yet give twice
        self._random = random
        self.active = 0  # pulls that count
        self.waiting: dict[Member, int] = {}  # receivers that could get nothing, and the room that they have
        self.freed: dict[Host, None] = {}  # hosts that gave or gained something: they may have something to give now

    def direct(self, member: Member, turn: float, now: float) -> list[Assignment]:
        """Return everything from the origin; receivers begin at other places, so that they spread over its sources."""
        numbers = indices(member.wants & ~self._origin.hopeless).tolist()
        first = int(len(numbers) * turn)
        return [self._assign(member, chunk, None, now=now) for chunk in [*numbers[first:], *numbers[:first]]]

    def relay(self, member: Member, room: int, now: float) -> list[Assignment]:
        """Return up to `room` chunks, each from whoever can best give it."""
        found: list[Assignment] = []
        while len(found) < room:
            one = self._one(member, now)
            if one is None:
                break
            found.append(one)
        return found

    def search(self, member: Member, room: int, now: float) -> list[Assignment]:
        """Return up to `room` chunks, having looked at every host if need be."""
        found = self.relay(member, room, now)
        for host in self._holders.hosts.values():
            while len(found) < room and self._holders.is_free(host) and host is not member.host:
                one = self.from_host(member, host, now)
                if one is None:
                    break
                found.append(one)
        return found

    def _one(self, member: Member, now: float) -> Assignment | None:
        """From the same host where one has it, but always something on the way from elsewhere, too."""
        if member.remote == 0:
            return self._remote(member, now) or self.local(member, now)
        return self.local(member, now) or self._remote(member, now)

    def local(self, member: Member, now: float) -> Assignment | None:
        """Assign something that another receiver on the same host has."""
        want = member.wants & member.host.has
        for _ in range(_CHUNKS_TRIED):
            if not want:
                return None
            chunk = pick(want, self._random)
            holder = self._holders.local(member, chunk)
            if holder is not None:
                return self._assign(member, chunk, holder, now=now)
            want ^= 1 << chunk
        return None

    def from_host(self, member: Member, host: Host, now: float) -> Assignment | None:
        """Assign the rarest chunk of use that a host has."""
        if useful := self._wanted(member) & host.has:
            chunk = self._holders.rarest(useful)
            holder = self._holders.on(host, member, chunk)
            if holder is not None:
                return self._assign(member, chunk, holder, now=now)
        return None

    def has_fresh(self) -> bool:
        """Whether the origin is free, and has something that it has given nobody."""
        origin = self._origin
        if origin.is_shut or origin.load >= origin.uploads:
            return False
        return bool(self._holders.rarity[0] & ~origin.sending & ~origin.hopeless)

    def fresh(self, member: Member, now: float) -> Assignment | None:
        """Assign something that nobody has yet."""
        origin = self._origin
        fresh = self._wanted(member) & self._holders.rarity[0] & ~origin.sending & ~origin.hopeless
        if fresh and self._can_origin(member):
            return self._assign(member, pick(fresh, self._random), None, now=now)
        return None

    def _wanted(self, member: Member) -> int:
        """What a receiver would have to bring in to its host."""
        host = member.host
        if len(host.members) == 1:
            return member.wants
        return member.wants & ~(host.arriving if member.is_rebuffed else host.has | host.arriving)

    def _remote(self, member: Member, now: float) -> Assignment | None:
        want = self._wanted(member)
        if not want:
            return None
        if self.has_fresh() and (found := self.fresh(member, now)):
            return found
        if found := self._useful(member, now):
            return found
        origin = self._origin
        want &= ~origin.hopeless
        if want and member.is_rebuffed and self._can_origin(member):
            return self._assign(member, self._holders.rarest(want), None, now=now)
        is_idle = not (origin.load or self._holders.rarity[0])
        if want and is_idle and self._extra > 0 and not member.is_late and self._can_origin(member):
            self._extra -= 1
            return self._assign(member, self._holders.rarest(want), None, now=now)
        return None

    def _useful(self, member: Member, now: float) -> Assignment | None:
        """Assign the rarest that one of the least busy hosts has."""
        for host in self._holders.free_hosts(_HOSTS_TRIED):
            if host is not member.host and (found := self.from_host(member, host, now)):
                return found
        return None

    def _can_origin(self, member: Member) -> bool:
        origin = self._origin
        if origin.is_shut or origin.load >= origin.uploads or ORIGIN in member.avoid:
            return False
        sole = member.host.sole
        if sole < _SOLE:
            return True
        return not any(other.host.sole < sole for other in self.waiting)

    def _assign(self, member: Member, chunk: int, holder: Member | None, *, now: float) -> Assignment:
        bit, host = 1 << chunk, member.host
        is_local = holder is not None and holder.host is host
        member.pending[chunk] = Pulling(chunk, holder, now, is_local)
        member.wants ^= bit
        self.active += 1
        if not is_local:
            member.remote += 1
            host.arriving |= bit
        if holder is None:
            self._origin.load += 1
            self._origin.given += 1
            self._origin.sending |= bit
            host.sole += 1
            return Assignment(chunk, ORIGIN)
        self._holders.take(holder, is_local=is_local)
        return Assignment(chunk, holder.name)

    def write_off(self, member: Member, pulling: Pulling) -> None:
        """Count on a pull no more: others may bring the chunk in, and its holder is free for them."""
        if not pulling.is_counted:
            return
        pulling.is_counted = False
        self.active -= 1
        bit = 1 << pulling.chunk
        if not pulling.is_local:
            member.remote -= 1
            member.host.arriving &= ~bit
        if pulling.holder is not None:
            self._holders.give_back(pulling.holder, is_local=pulling.is_local)
            self.freed[pulling.holder.host] = None
        else:
            self._origin.load -= 1
            self._origin.sending &= ~bit
            member.host.sole -= 1

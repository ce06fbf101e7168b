"""Holders: which receiver and which host has which chunks, how rare they are, and how busy each host is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from raynixl.weights.bitmap import indices, pick


@dataclass(slots=True, eq=False)
class Host:
    """A machine: its receivers share its link, and bring a chunk in once."""

    name: str
    index: int
    members: list[Member] = field(default_factory=list)
    has: int = 0  # chunks that some member here has and serves
    arriving: int = 0  # chunks that some member is bringing in
    load: int = 0  # chunks being pulled from here by other hosts
    level: int = 0  # that for each of its members
    sole: int = 0  # chunks that only this host has, or is being sent by the origin: what it has to pass on


@dataclass(slots=True, eq=False)
class Pulling:
    """One chunk on its way to a receiver. `holder` is None for the origin."""

    chunk: int
    holder: Member | None
    since: float
    is_local: bool
    is_counted: bool = True  # until it is done, failed, or written off


@dataclass(slots=True, eq=False)
class Member:
    """A receiver: what it has, what it is pulling, and whom it should not pull from."""

    name: str
    host: Host
    has: int
    wants: int  # what it neither has nor is pulling
    pending: dict[int, Pulling] = field(default_factory=dict)
    remote: int = 0  # how many of them come from other hosts
    is_serving: bool = True
    serving: int = 0  # chunks being pulled from it, by whomever
    copying: int = 0  # those of them that stay on its host
    avoid: dict[str, float] = field(default_factory=dict)  # holders, and until when
    complaints: set[str] = field(default_factory=set)  # who could not pull from it, since somebody last could
    resumes: float | None = None  # when it serves again, after complaints
    progressed: float = 0.0
    is_rebuffed: bool = False  # it could not pull from others since it last could: the origin gives it anything
    is_late: bool = False  # it joined midway: the origin gives it nothing that others have


class Holders:
    """Tables over all receivers that serve, kept in step with every chunk that one gains or loses."""

    def __init__(self, count: int, uploads: int, random: Callable[[], float]) -> None:
        self.full = (1 << count) - 1
        self.uploads = uploads
        self.hosts: dict[str, Host] = {}
        self._by_index: list[Host] = []
        self._random = random
        self._where = [0] * count  # chunk -> bitmap of hosts
        self._hosts_with = [0] * count
        self._copies = [0] * count  # receivers, where hosts have several
        self.scarce = [self.full, 0]  # chunks with no copy, and with one
        self.rarity = [self.full]  # [k]: chunks that 2**(k-1) to 2**k - 1 hosts have; [0]: that none has
        self._free = [0] * uploads  # [load]: bitmap of hosts with that load

    def host(self, name: str) -> Host:
        """Return the host of that name, a new one if it is the first of it."""
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(name, len(self._by_index))
            self._by_index.append(host)
            self._free[0] |= 1 << host.index
        return host

    # what is held

    def gain(self, member: Member, chunk: int) -> None:
        """Note that a receiver has a chunk."""
        bit = 1 << chunk
        if member.has & bit:
            return
        member.has |= bit
        if member.wants & bit:
            member.wants ^= bit
        if member.is_serving:
            self._offer(member.host, chunk, bit)

    def _offer(self, host: Host, chunk: int, bit: int) -> None:
        copies = self._copies[chunk] = self._copies[chunk] + 1
        if copies <= 2:
            self.scarce[copies - 1] ^= bit
            if copies == 1:
                self.scarce[1] |= bit
        if not host.has & bit:
            host.has |= bit
            self._recount(chunk, bit, self._where[chunk] | 1 << host.index)

    def _recount(self, chunk: int, bit: int, where: int) -> None:
        before, after = self._hosts_with[chunk], where.bit_count()
        if before == 1:
            self._by_index[self._where[chunk].bit_length() - 1].sole -= 1
        if after == 1:
            self._by_index[where.bit_length() - 1].sole += 1
        self._where[chunk] = where
        self._hosts_with[chunk] = after
        old, new = before.bit_length(), after.bit_length()
        if old != new:
            if new == len(self.rarity):
                self.rarity.append(0)
            self.rarity[old] ^= bit
            self.rarity[new] |= bit

    def resume(self, member: Member) -> None:
        """Let a receiver serve (again) what it has."""
        if not member.is_serving:
            member.is_serving = True
            for chunk in indices(member.has).tolist():
                self._offer(member.host, chunk, 1 << chunk)

    def withdraw(self, member: Member) -> None:
        """Let a receiver serve no more: for others it has nothing."""
        if not member.is_serving:
            return
        member.is_serving = False
        host, rest = member.host, 0
        for other in host.members:
            rest |= other.has if other.is_serving else 0
        for chunk in indices(member.has).tolist():
            bit = 1 << chunk
            copies = self._copies[chunk] = self._copies[chunk] - 1
            if copies <= 1:
                self.scarce[copies] |= bit
                if copies == 0:
                    self.scarce[1] ^= bit
            if not rest & bit:
                self._recount(chunk, bit, self._where[chunk] ^ 1 << host.index)
        host.has = rest

    # how busy they are

    def take(self, holder: Member, *, is_local: bool) -> None:
        """Count one more chunk that is pulled from a holder."""
        holder.serving += 1
        if is_local:
            holder.copying += 1
        else:
            self._reload(holder.host, 1)

    def give_back(self, holder: Member, *, is_local: bool) -> None:
        """Count one less."""
        holder.serving -= 1
        if is_local:
            holder.copying -= 1
        else:
            self._reload(holder.host, -1)

    def _reload(self, host: Host, change: int) -> None:
        host.load += change
        count, before = len(host.members), host.level
        level = host.load // count if count > 1 else host.load
        if level != before:
            bit = 1 << host.index
            if before < self.uploads:
                self._free[before] ^= bit
            if level < self.uploads:
                self._free[level] |= bit
            host.level = level

    def is_free(self, host: Host) -> bool:
        """Whether a host can give a chunk to another one."""
        return host.level < self.uploads

    # who gives

    def on(self, host: Host, member: Member, chunk: int) -> Member | None:
        """Return the least busy receiver of a host that can give this chunk."""
        members, bit = host.members, 1 << chunk
        if len(members) == 1 and not member.avoid:
            return members[0]
        able = [other for other in members if other.is_serving and other.has & bit and other.name not in member.avoid]
        return min(able, key=lambda other: other.serving) if able else None

    def local(self, member: Member, chunk: int) -> Member | None:
        """Return the least busy receiver on the same host that can give this chunk now."""
        bit, least, found = 1 << chunk, self.uploads, None
        for other in member.host.members:
            if other.is_serving and other.has & bit and other.copying < least and other.name not in member.avoid:
                least, found = other.copying, other
        return found

    def free_hosts(self, tries: int) -> Iterator[Host]:
        """Yield some hosts that can give something, the least busy ones first."""
        random = self._random
        for level in self._free:
            left = level
            while left and tries > 0:
                index = pick(left, random)
                left ^= 1 << index
                tries -= 1
                yield self._by_index[index]

    def rarest(self, chunks: int) -> int:
        """Return one of the rarest of these chunks; there must be one."""
        for level in self.rarity:
            if found := chunks & level:
                return pick(found, self._random)
        raise AssertionError("every chunk has its level")

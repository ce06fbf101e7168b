"""Parked receivers: those that could get nothing, and what they get as holders become free or gain chunks."""

from __future__ import annotations

from raynixl.weights.assignment import Assignment
from raynixl.weights.choice import Choice
from raynixl.weights.holders import Holders, Host, Member

_TRIED = 8  # parked receivers that are asked whether a free host has anything for them

Handed = dict[Member, list[Assignment]]


class Parking:
    """Hands out what has become possible: it starts from the hosts where something changed, not from who waits."""

    def __init__(self, choice: Choice, holders: Holders) -> None:
        self._choice = choice
        self._holders = holders
        self._waiting = choice.waiting

    def park(self, member: Member, room: int) -> None:
        """Let a receiver wait for up to `room` chunks, if there are any that it is not pulling yet."""
        if room > 0 and member.wants:
            self._waiting[member] = room

    def forget(self, member: Member) -> None:
        """Let a receiver wait no more."""
        self._waiting.pop(member, None)

    def dispatch(self, now: float) -> Handed:
        """Return what waiting receivers get; they wait no more."""
        handed: Handed = {}
        freed = self._choice.freed
        self._from_origin(handed, now)
        while freed and self._waiting:
            host, _ = freed.popitem()
            self._inside(host, handed, now)
            self._from_host(host, handed, now)
        freed.clear()
        if not self._choice.active:
            self._retry(handed, now)  # or there would be no event to go on from
        for member in handed:
            self.forget(member)
        return handed

    def _retry(self, handed: Handed, now: float) -> None:
        """Try every host for all that wait."""
        for member in list(self._waiting):
            for assignment in self._choice.search(member, self._waiting[member], now):
                self._hand(member, assignment, handed)

    def _hand(self, member: Member, assignment: Assignment, handed: Handed) -> None:
        handed.setdefault(member, []).append(assignment)
        room = self._waiting.pop(member) - 1
        if room:
            self._waiting[member] = room  # behind the others

    def _from_origin(self, handed: Handed, now: float) -> None:
        tries = _TRIED
        while tries and self._waiting and self._choice.has_fresh():
            tries -= 1
            member = self._next_waiting()
            found = self._choice.fresh(member, now)
            if found is not None:
                self._hand(member, found, handed)

    def _inside(self, host: Host, handed: Handed, now: float) -> None:
        for member in host.members if len(host.members) > 1 else ():
            while member in self._waiting and (found := self._choice.local(member, now)):
                self._hand(member, found, handed)

    def _from_host(self, host: Host, handed: Handed, now: float) -> None:
        tries = _TRIED
        while tries and self._waiting and self._holders.is_free(host):
            tries -= 1
            member = self._next_waiting()
            if not member.wants & host.has or member.host is host:
                continue
            found = self._choice.from_host(member, host, now)
            if found is not None:
                self._hand(member, found, handed)

    def _next_waiting(self) -> Member:
        """Return who has waited longest; it is asked last the next time."""
        member = next(iter(self._waiting))
        self._waiting[member] = self._waiting.pop(member)
        return member

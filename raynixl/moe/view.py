"""Views: who takes part in a layer of two stages, as all of them have agreed; and the messages by which they agree."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raynixl.moe.grid import Grid, by_host, make_grid
from raynixl.moe.hello import Token
from raynixl.record import Name, Unsigned, Wire

Ranks = Annotated[tuple[Unsigned, ...], Field(max_length=1 << 16)]
Host = Annotated[str, Field(max_length=200)]
NOT_YET = -1


class Member(Wire):
    """One member by name: where it runs, and by which token its present session is known; it may take part or not."""

    name: Name
    host: Host = ""
    token: Token | None = None
    """None while it does not take part."""


class View(Wire):
    """Who takes part from an operation on. Views are numbered; of two with one number the lower leader's counts."""

    number: Unsigned
    leader: Unsigned
    since: Unsigned
    """The operation, counted from the beginning of the layer, from which it holds at the earliest."""
    is_joining: bool
    """Whether ranks come in: then it holds from a dispatch of tokens on, which may be their first operation."""
    members: Annotated[tuple[Member, ...], Field(max_length=1 << 16)]
    groups: Annotated[tuple[Ranks, ...], Field(max_length=1 << 16)]
    """All ranks, in the groups of the grid; those that do not take part keep their place."""
    is_given: bool
    """Whether the grid was given, and not made by hosts."""

    @property
    def live(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return tuple(rank for rank, member in enumerate(self.members) if member.token is not None)

    def has(self, rank: int, token: str) -> bool:
        """Whether this session of a rank takes part."""
        return rank < len(self.members) and self.members[rank].token == token

    def token(self, rank: int) -> str | None:
        """Return the token of a rank that takes part."""
        return self.members[rank].token if rank < len(self.members) else None

    @property
    def order(self) -> tuple[int, int]:
        """What tells the later of two views."""
        return self.number, -self.leader

    def grid(self) -> tuple[Grid, tuple[int, ...]]:
        """Return the grid of those that take part, numbered as they lie in `live`, and these."""
        live = self.live
        place = {rank: number for number, rank in enumerate(live)}
        groups = (tuple(place[rank] for rank in group if rank in place) for group in self.groups)
        return Grid(tuple(group for group in groups if group)), live

    def changed(
        self, *, leader: int, since: int, members: tuple[Member, ...], is_joining: bool, number: int | None = None
    ) -> View:
        """Return the next view; where ranks come that no group has, or from other hosts, groups are made anew."""
        groups = self.groups
        hosts = [member.host for member in members]
        if len(members) > len(self.members) or hosts != [member.host for member in self.members]:
            groups = _added(groups, len(members)) if self.is_given else make_grid(len(members), hosts).groups
        return View(
            number=self.number + 1 if number is None else number, leader=leader, since=since, is_joining=is_joining,
            members=members, groups=groups, is_given=self.is_given,
        )  # fmt: skip


def first_view(members: tuple[Member, ...], grid: Grid | None) -> View:
    """Return the view with which a layer begins."""
    hosts = [member.host for member in members]
    groups = make_grid(len(members), _numbers(hosts)).groups if grid is None else grid.groups
    return View(
        number=0, leader=0, since=0, is_joining=False, members=members, groups=groups, is_given=grid is not None
    )


def _numbers(hosts: list[str]) -> list[int]:
    numbers = {rank: number for number, ranks in enumerate(by_host(hosts)) for rank in ranks}
    return [numbers[rank] for rank in range(len(hosts))]


def _added(groups: tuple[tuple[int, ...], ...], world: int) -> tuple[tuple[int, ...], ...]:
    """Put ranks that no group has into the smallest ones."""
    made = [list(group) for group in groups]
    for rank in range(sum(map(len, groups)), world):
        min(made, key=len).append(rank)
    return tuple(tuple(group) for group in made)


class Ask(Wire):
    """What one session asks another."""

    LIMIT: ClassVar[int] = 1 << 24

    kind: Literal["hello", "report", "prepare", "commit", "state"]
    rank: Unsigned
    token: Token
    scene: Annotated[str, Field(max_length=2000)] = ""
    """What all ranks must have alike, for people to read; with a hello."""
    host: Host = ""
    number: Unsigned = 0
    """Of the view that is prepared."""
    suspects: Annotated[tuple[tuple[Unsigned, Token], ...], Field(max_length=1 << 16)] = ()
    """Ranks that are lost, each with the token of the session that is."""
    view: View | None = None


class Answer(Wire):
    """What it answers."""

    LIMIT: ClassVar[int] = 1 << 24

    rank: Unsigned
    token: Token
    scene: Annotated[str, Field(max_length=2000)]
    host: Host
    is_running: bool
    """Whether it has met all others already, and takes the asker for one who joins."""
    view: View | None
    """The latest that it has heard of."""
    adopted: int
    """The number of the view that it works in, or is about to, or -1."""
    position: int
    """How many operations it has ended, or -1 where it does not know."""
    is_busy: bool
    """Whether it is amid an operation."""
    granted: int = NOT_YET
    """The highest number of a view for which it has promised anything."""
    barred: Ranks
    names: Annotated[tuple[Name, ...], Field(max_length=1 << 16)]
    holders: Annotated[tuple[int, ...], Field(max_length=1 << 20)] = ()
    """Where experts are; only to who asks for the state."""
    is_refused: bool = False
    """Whether somebody else, with a lower rank, prepares a view."""

"""Hellos: what two ranks tell each other before they exchange lines; checked, since it comes from elsewhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raynixl.moe.lines import NOWHERE
from raynixl.record import Incarnation, Name, RegionRecord, Wire
from raynixl.region import Region, RemoteRegion

Number = Annotated[int, Field(ge=0, le=NOWHERE)]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Reader = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]


class Arena(Wire):
    """A region as it travels."""

    owner: Name
    incarnation: Incarnation
    record: RegionRecord

    @staticmethod
    def of(region: Region) -> Arena:
        """Describe a region of ours."""
        remote = region.describe()
        return Arena(owner=remote.owner, incarnation=remote.incarnation, record=remote.record)

    @property
    def remote(self) -> RemoteRegion:
        """Return it as agents take it."""
        return RemoteRegion(self.owner, self.incarnation, self.record)


class Hello(Wire):
    """One rank of one session: where its board and its first slot are, and what all ranks must have alike."""

    rank: Number
    token: Token
    """Of this session of the rank: another one comes with each time that it joins."""
    ranks: Number
    scene: str = Field(max_length=2000)
    """What all ranks must have alike, for people to read."""
    members: tuple[Name, ...] = Field(max_length=1 << 16)
    """By rank."""
    host: str = Field(max_length=200)
    pid: Number
    is_running: bool
    """Whether it has met all others already: who asks and is unknown to it joins later."""
    board: Arena
    lane: Number = NOWHERE
    """The cells of the board into which the session `to`, and no other, writes."""
    to: Reader = ""
    slot: Number
    arena: Arena

"""Hellos: what two ranks tell each other before they exchange lines; checked, since it comes from elsewhere."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from raynixl.moe.lines import NOWHERE
from raynixl.record import Incarnation, Name, RegionRecord, parse
from raynixl.region import Region, RemoteRegion

LIMIT: Final = 1 << 20
Number = Annotated[int, Field(ge=0, le=NOWHERE)]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
W = TypeVar("W", bound="Wire")


class Wire(BaseModel):
    """A message that travels as JSON and is never trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls: type[W], data: bytes) -> W:
        """Parse a message.

        Raises:
            IntegrityError: it is malformed.
        """
        return parse(cls, data, what=cls.__name__, limit=LIMIT)


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
    pid: Number
    is_running: bool
    """Whether it has met all others already: who asks and is unknown to it joins later."""
    board: Arena
    slot: Number
    arena: Arena

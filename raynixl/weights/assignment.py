"""What the swarm is told and what it answers: chunks, who gives them, why one failed, and what may be tuned."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, NamedTuple

ORIGIN: Final = ""  # the holder that is the sources together; no agent has an empty name


class Topology(enum.StrEnum):
    """Whether receivers feed each other."""

    AUTO = "auto"  # direct while the receivers' links do not exceed the origin's
    DIRECT = "direct"
    RELAY = "relay"


class Why(enum.StrEnum):
    """Why a chunk could not be pulled."""

    LOST = "lost"  # the holder is gone, or cannot be reached from here
    STALLED = "stalled"
    CORRUPT = "corrupt"
    STALE = "stale"  # the holder has that version no more


class Assignment(NamedTuple):
    """A chunk, and who gives it."""

    chunk: int
    holder: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be tuned.

    `uplinks` is how many receivers' links the origin's are worth, for this image; by default one for each origin host.
    `copies`: how many receivers must have every chunk before the origin may go (fewer where there are fewer).
    """

    uploads: int = 4  # chunks being pulled from one host at a time; from the origin, for each of its uplinks
    uplinks: float | None = None
    copies: int = 2
    local_direct: int = 4  # receivers on the origin's own host that it feeds itself
    extra_share: float = 0.05  # of the image: what an idle origin may give a second time, to end sooner
    stall_seconds: float = 5.0
    pause_seconds: float = 1.0  # for which a holder that could not be reached is left alone
    seed: int = 0

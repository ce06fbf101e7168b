"""Rounds: one push on its way, from the sources' copy to the targets' flip, with what it has to report."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from raynixl.errors import RaynixlError
from raynixl.weights.assembly import Assembled
from raynixl.weights.plan import Plan
from raynixl.weights.protocol import Answer
from raynixl.weights.report import PushReport, RankReport


@dataclass(slots=True)
class Round:
    """One push: how much time it has, what it has planned and frozen, and who has come how far."""

    version: int
    began: float
    timeout: float
    push: str = field(default_factory=lambda: secrets.token_hex(16))
    plan: Plan | None = None
    image_of: dict[str, int] = field(default_factory=dict)
    chunk_nbytes: int = 0
    """The size of chunks, which all are told with the plan."""
    assembled: Assembled | None = None
    pulled: dict[str, Answer] = field(default_factory=dict)
    flipped: dict[str, Answer] = field(default_factory=dict)
    excluded: dict[str, RaynixlError] = field(default_factory=dict)
    deltas: int = 0
    replans: int = 0
    liars: tuple[str, ...] = ()
    late: set[str] = field(default_factory=set)  # targets that joined midway
    released: float = 0.0
    seconds: float = 0.0

    def left(self, share: float = 1.0) -> float:
        """Return a share of the time that is left."""
        return max(0.001, (self.began + self.timeout - time.monotonic()) * share)

    def deadline(self, share: float = 1.0) -> float:
        """Return when a share of the time that is left will have passed."""
        return time.monotonic() + self.left(share)

    @property
    def froze(self) -> Assembled:
        """What the sources froze."""
        assert self.assembled is not None
        return self.assembled

    @property
    def plan_key(self) -> str:
        """What the plan is called in messages."""
        return self.planned.key(self.chunk_nbytes)

    @property
    def planned(self) -> Plan:
        """The plan."""
        assert self.plan is not None
        return self.plan

    def report(self, digest: str, targets: int) -> PushReport:
        """Return what there is to tell."""
        ranks = {name: _rank(self.pulled[name], answer) for name, answer in self.flipped.items()}
        froze = self.assembled
        nbytes = max((rank.nbytes for rank in ranks.values()), default=0)
        return PushReport(
            version=self.version, seconds=self.seconds, nbytes=nbytes,
            gbps=sum(rank.nbytes for rank in ranks.values()) / self.seconds / 1e9,
            copy_out_seconds=0.0 if froze is None else froze.copy_out_seconds,
            digest_seconds=0.0 if froze is None else froze.digest_seconds,
            flip_seconds=max((rank.flip_seconds for rank in ranks.values()), default=0.0), digest=digest,
            excluded=self.excluded, ranks=ranks, targets=targets, release_seconds=self.released,
            origin_nbytes=sum(answer.origin_nbytes for answer in self.pulled.values()),
            peer_nbytes=sum(answer.peer_nbytes for answer in self.pulled.values()), deltas=self.deltas,
            liars=self.liars, replans=self.replans,
        )  # fmt: skip


def _rank(pulled: Answer, flipped: Answer) -> RankReport:
    return RankReport(
        seconds=pulled.seconds + flipped.seconds, pull_seconds=pulled.pull_seconds,
        verify_seconds=pulled.verify_seconds, flip_seconds=flipped.seconds, nbytes=pulled.nbytes, note=flipped.note,
        origin_nbytes=pulled.origin_nbytes,
    )  # fmt: skip

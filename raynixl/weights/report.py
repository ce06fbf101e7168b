"""Reports: what a push did, for each rank, and a text that people read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raynixl.errors import RaynixlError


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one target did. Pull and verify overlap on several threads: their times are averages over these."""

    seconds: float
    pull_seconds: float
    verify_seconds: float
    flip_seconds: float
    nbytes: int
    note: str = ""
    """What on_flip raised, if it did."""
    origin_nbytes: int = 0
    """Bytes that the sources gave it."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did. `nbytes` is one copy of the version, `gbps` counts all receivers together."""

    version: int
    seconds: float
    nbytes: int
    gbps: float
    copy_out_seconds: float
    digest_seconds: float
    flip_seconds: float
    digest: str
    excluded: Mapping[str, RaynixlError] = field(default_factory=dict)
    ranks: Mapping[str, RankReport] = field(default_factory=dict)
    targets: int = 0
    """How many targets there were; sources that took no part are among the excluded too."""
    release_seconds: float = 0.0
    """When the sources were needed no more, from the beginning of the push."""
    origin_nbytes: int = 0
    """Bytes that the sources gave; the others, `peer_nbytes`, receivers gave to each other."""
    peer_nbytes: int = 0
    deltas: int = 0
    """How many targets got what had changed since the version that they served, instead of everything."""
    liars: tuple[str, ...] = ()
    """Receivers and sources that gave corrupt chunks to others, which then got them elsewhere."""
    replans: int = 0
    """How often chunks had to come from somebody else than planned: the holder died, stalled or lied."""

    def __str__(self) -> str:
        head = (
            f"version {self.version}: {self.nbytes / 1e6:,.1f} MB to {len(self.ranks)} of {self.targets} "
            f"in {self.seconds * 1e3:,.1f} ms, {self.gbps:.2f} GB/s "
            f"(copy out {self.copy_out_seconds * 1e3:.1f} ms, digest {self.digest_seconds * 1e3:.1f} ms, "
            f"flip {self.flip_seconds * 1e3:.2f} ms; sources gave {self.origin_nbytes / 1e6:,.1f} MB, peers "
            f"{self.peer_nbytes / 1e6:,.1f} MB; sources free after {self.release_seconds * 1e3:,.1f} ms)"
        )
        liars = [f"  {name} gave corrupt chunks to others" for name in self.liars]
        return "\n".join([head, *_rows(self.ranks), *_excluded(self.excluded), *liars])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the table as it is in notebooks."""
        text = str(self).replace("&", "&amp;").replace("<", "&lt;")
        return f"<pre>{text}</pre>"

    def raise_for_excluded(self) -> None:
        """Raise the first error of an excluded target or source, if there is one."""
        for error in self.excluded.values():
            raise error


def _rows(ranks: Mapping[str, RankReport]) -> list[str]:
    if not ranks:
        return []
    width = max(len("target"), *(len(name) for name in ranks))
    lines = [f"  {'target':<{width}}  {'ms':>9}  {'pull':>9}  {'verify':>9}  {'flip':>8}  {'MB':>10}"]
    for name, rank in ranks.items():
        times = (rank.seconds, rank.pull_seconds, rank.verify_seconds)
        cells = "  ".join(f"{seconds * 1e3:>9.1f}" for seconds in times)
        note = f"  {rank.note}" if rank.note else ""
        lines.append(f"  {name:<{width}}  {cells}  {rank.flip_seconds * 1e3:>8.2f}  {rank.nbytes / 1e6:>10,.1f}{note}")
    return lines


def _excluded(excluded: Mapping[str, RaynixlError]) -> list[str]:
    return [f"  excluded {name}: {type(error).__name__}: {error}" for name, error in excluded.items()]

"""The receiver: brings the chunks of a version into a slot, each checked by its digest right after it landed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import IntegrityError, PeerLost, PeerRestarted, RegionStale, TransferCancelled, TransferTimeout
from raynixl.weights.digest import chunk_digest
from raynixl.weights.workers import run_workers

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.region import RemoteRegion
    from raynixl.weights.arenas import Arenas
    from raynixl.weights.protocol import Pull

_MAX_NAMES = 4
_GONE = (PeerLost, PeerRestarted, RegionStale)


@dataclass(frozen=True, slots=True)
class PullTimes:
    """How long a pull took: by the clock, and its two parts, averaged over the threads."""

    seconds: float
    pull_seconds: float
    verify_seconds: float


@dataclass(slots=True)
class Receiver:
    """One pull of one version. `stop` ends it early, between two chunks."""

    agent: Agent
    request: Pull
    slot: Arenas
    deadline: float
    stop: threading.Event
    _holders: list[list[RemoteRegion]] = field(default_factory=list)
    _digests: Sequence[bytes] = ()
    _rows: list[tuple[int, int, int]] = field(default_factory=list)
    _times: list[tuple[float, float]] = field(default_factory=list)

    def run(self, *, threads: int) -> PullTimes:
        """Bring everything in, or fail; after a failure the slot's bytes are undefined.

        Raises:
            IntegrityError: a chunk does not match its digest, or the manifest does not fit the layout.
            RaynixlError: a transfer failed at every holder.
        """
        began = time.monotonic()
        self._rows = [tuple(row) for row in self.slot.layout.chunks(self.request.manifest.chunk_nbytes).tolist()]
        self._digests = self.request.manifest.chunk_digests()
        self._holders = [holder.remotes() for holder in self.request.holders]
        self._check()
        run_workers(self._bring, len(self._rows), threads=threads)
        count = max(1, min(threads, len(self._rows)))
        pull, verify = (sum(times) / count for times in zip(*self._times, strict=True)) if self._times else (0.0, 0.0)
        return PullTimes(time.monotonic() - began, pull, verify)

    def _check(self) -> None:
        sizes = list(self.slot.layout.arenas)
        fits = all([region.nbytes for region in regions] == sizes for regions in self._holders)
        if len(self._digests) != len(self._rows) or not fits:
            raise IntegrityError("the manifest does not fit the layout", hint="run one version of raynixl everywhere")

    def _bring(self, number: int) -> None:
        """Bring one chunk in, from the first holder that still lives."""
        if self.stop.is_set():
            raise TransferCancelled("a newer push has begun", hint="its version comes instead")
        for regions in self._holders[:-1]:
            try:
                return self._take(number, regions)
            except _GONE:
                continue
        return self._take(number, self._holders[-1])

    def _take(self, number: int, regions: Sequence[RemoteRegion]) -> None:
        arena, offset, nbytes = self._rows[number]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TransferTimeout(f"version {self.request.manifest.version} did not come in time", peer=self.agent.name)
        began = time.monotonic()
        source, target = regions[arena], self.slot.regions[arena]
        self.agent.read(source.span(offset, nbytes), target.span(offset, nbytes), timeout=left).wait()
        landed = time.monotonic()
        digest = chunk_digest(number, self.slot.arrays[arena][offset : offset + nbytes])
        if digest != self._digests[number]:
            raise IntegrityError(
                f"chunk {number} of version {self.request.manifest.version} from {source.owner!r} is not what was "
                f"published; it holds {self._names(arena, offset, nbytes)}",
                hint="the old version stays; push again", peer=source.owner,
            )  # fmt: skip
        self._times.append((landed - began, time.monotonic() - landed))

    def _names(self, arena: int, offset: int, nbytes: int) -> str:
        """Name the tensors that lie in a chunk, the first few of many."""
        names = [
            entry.name
            for entry in self.slot.layout.entries
            if entry.arena == arena and entry.offset < offset + nbytes and offset < entry.offset + entry.nbytes
        ]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return ", ".join(repr(name[:100]) for name in names[:_MAX_NAMES]) + more

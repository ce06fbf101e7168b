"""The receiver: brings the chunks of a cargo into a slot, each checked by its digest right after it has landed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import (
    IntegrityError,
    PeerLost,
    PeerRestarted,
    RaynixlError,
    RegionStale,
    RegionUnknown,
    TransferCancelled,
    TransferTimeout,
)
from raynixl.weights.assignment import ORIGIN, Why
from raynixl.weights.cargo import Cargo, Giver, Share, digest_table
from raynixl.weights.digest import digest_rows
from raynixl.weights.throttle import Throttle

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.transfer import Transfer
    from raynixl.region import Region

GONE = (PeerLost, PeerRestarted, RegionStale, RegionUnknown)
_ELSEWHERE = (*GONE, TransferTimeout)
STALL_SECONDS = 5.0
_SLOWEST = 1e8  # bytes a second that a source with replicas should give


@dataclass(frozen=True, slots=True)
class PullTimes:
    """How long a pull took: by the clock, and its two parts, averaged over the threads; and the bytes by giver."""

    seconds: float
    pull_seconds: float
    verify_seconds: float
    origin_nbytes: int
    peer_nbytes: int

    def plus(self, tally: Tally) -> PullTimes:
        """Return these with what came afterwards."""
        return replace(
            self,
            origin_nbytes=self.origin_nbytes + tally.origin_nbytes,
            peer_nbytes=self.peer_nbytes + tally.peer_nbytes,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cargo goes: registered arenas, and the same memory as arrays."""

    regions: Sequence[Region]
    arrays: Sequence[NDArray[np.uint8]]


@dataclass(slots=True)
class Tally:
    """What several threads have measured."""

    lock: threading.Lock = field(default_factory=threading.Lock)  # protects the numbers
    pull: float = 0.0
    verify: float = 0.0
    origin_nbytes: int = 0
    peer_nbytes: int = 0

    def add(self, pull: float, verify: float, nbytes: int, *, is_origin: bool) -> None:
        """Count one chunk."""
        with self.lock:
            self.pull += pull
            self.verify += verify
            if is_origin:
                self.origin_nbytes += nbytes
            else:
                self.peer_nbytes += nbytes


@dataclass(slots=True)
class Receiver:
    """One pull of one cargo. `stop` ends it early, between two chunks; `names` says what lies in a chunk."""

    agent: Agent
    cargo: Cargo
    slot: Place
    version: int
    digests: NDArray[np.uint64]
    givers: Mapping[int, Sequence[Giver]]
    deadline: float
    stop: threading.Event
    names: Callable[[int], str]
    throttle: Throttle
    tally: Tally = field(default_factory=Tally)
    _bases: Sequence[int] = ()
    _turn: int = 0

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.cargo.chunks):
            raise IntegrityError("the manifest does not fit the image", hint="run one version of raynixl everywhere")
        self._bases = [array.ctypes.data for array in self.slot.arrays]
        self._turn = sum(self.agent.name.encode())  # receivers spread over the replicas of a part

    def times(self, began: float, threads: int) -> PullTimes:
        """Return what was measured."""
        count, tally = max(1, min(threads, len(self.digests))), self.tally
        return PullTimes(
            time.monotonic() - began, tally.pull / count, tally.verify / count, tally.origin_nbytes, tally.peer_nbytes
        )

    def from_origin(self, chunk: int) -> None:
        """Bring one chunk in from the sources.

        Raises:
            IntegrityError: it does not match its digest.
            RaynixlError: nobody could give it, or it did not come in time.
        """
        shares = self.cargo.shares(chunk)
        began = self._begin(chunk)
        failed: dict[int, set[str]] = {}
        names: set[str] = set()
        while shares:
            started = self._start_all(chunk, shares, failed)
            ends = [(share, giver.name, _end(transfer)) for share, giver, transfer in started]
            names |= {name for _, name, error in ends if error is None}
            for share, name, error in ends:
                failed.setdefault(share.part, set()).add(name)
                if error is not None and (not isinstance(error, _ELSEWHERE) or self._is_last(share.part, failed)):
                    raise error
            shares = [share for share, _, error in ends if error is not None]
        self._verify(chunk, began, who=", ".join(sorted(names)), is_origin=True)

    def _start_all(
        self, chunk: int, shares: Sequence[Share], failed: Mapping[int, set[str]]
    ) -> list[tuple[Share, Giver, Transfer]]:
        """Begin to read all shares, or none: what goes on alone would land in a slot that is another version's then."""
        started: list[tuple[Share, Giver, Transfer]] = []
        try:
            for share in shares:
                started.append((share, *self._start(chunk, share, failed.get(share.part, set()))))  # noqa: PERF401
        except BaseException:
            for _, _, transfer in started:
                transfer.cancel()
                _end(transfer)
            raise
        return started

    def _is_last(self, part: int, failed: Mapping[int, set[str]]) -> bool:
        return all(giver.name in failed[part] for giver in self.givers[part])

    def from_peer(self, chunk: int, giver: Giver) -> None:
        """Bring one chunk in from a receiver that has it whole.

        Raises:
            IntegrityError, RaynixlError: as `from_origin`.
        """
        arena, offset, nbytes = self.cargo.chunks[chunk].tolist()
        began = self._begin(chunk)
        if arena >= len(giver.regions):
            raise RegionStale(f"{giver.name!r} does not have all of the image", peer=giver.name)
        source, target = giver.regions[arena], self.slot.regions[arena]
        self.agent.read(source.span(offset, nbytes), target.span(offset, nbytes), timeout=self._patience()).wait()
        self._verify(chunk, began, who=giver.name, is_origin=False)

    def is_whole(self, chunk: int) -> bool:
        """Whether a chunk in the slot matches its digest."""
        out = np.zeros((1, 2), np.uint64)
        digest_rows(digest_table(self.cargo, chunk, self._bases), out, seed=self.version, native=self.agent.native)
        return bool(np.array_equal(out[0], self.digests[chunk]))

    def left(self) -> float:
        """Return the time that is left.

        Raises:
            TransferTimeout: none is.
            TransferCancelled: a newer push has begun.
        """
        if self.stop.is_set():
            raise TransferCancelled("a newer push has begun", hint="its version comes instead")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TransferTimeout(f"version {self.version} did not come in time", peer=self.agent.name)
        return left

    def _patience(self) -> float:
        return min(self.left(), STALL_SECONDS)

    def _begin(self, chunk: int) -> float:
        self.throttle.take(int(self.cargo.chunks[chunk, 2]), self.left())
        return time.monotonic()

    def _start(self, chunk: int, share: Share, gone: set[str]) -> tuple[Giver, Transfer]:
        givers = [giver for giver in self.givers.get(share.part, ()) if giver.name not in gone]
        if not givers:
            raise PeerLost(f"nobody gives part {share.part} any more", hint="push again")
        giver = givers[(self._turn + chunk) % len(givers)]
        target = self.slot.regions[int(self.cargo.chunks[chunk, 0])]
        nbytes = int(self.cargo.chunks[chunk, 2])
        timeout = self.left() if len(givers) == 1 else min(self.left(), STALL_SECONDS + nbytes / _SLOWEST)
        return giver, self.agent.read(share.far(giver), share.near(target), timeout=timeout)

    def _verify(self, chunk: int, began: float, *, who: str, is_origin: bool) -> None:
        landed = time.monotonic()
        if not self.is_whole(chunk):
            raise IntegrityError(
                f"chunk {chunk} of version {self.version} from {who!r} is not what was published; "
                f"it holds {self.names(chunk)}",
                hint="the old version stays; push again", peer=who,
            )  # fmt: skip
        nbytes = int(self.cargo.extents(chunk)[:, 1].sum()) if is_origin else int(self.cargo.chunks[chunk, 2])
        self.tally.add(landed - began, time.monotonic() - landed, nbytes, is_origin=is_origin)


def _end(transfer: Transfer) -> RaynixlError | None:
    """Wait for a transfer; return how it failed, if it did. All of a chunk are waited for, whatever becomes of one."""
    try:
        transfer.wait()
    except RaynixlError as exc:
        return exc
    return None


def reason(error: RaynixlError) -> Why:
    """Return how the swarm calls a failure."""
    if isinstance(error, IntegrityError):
        return Why.CORRUPT
    if isinstance(error, TransferTimeout):
        return Why.STALLED
    return Why.STALE if isinstance(error, RegionStale | RegionUnknown) else Why.LOST


def is_origin(holder: str) -> bool:
    """Whether a holder is the sources together."""
    return holder == ORIGIN

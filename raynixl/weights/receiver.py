"""The receiver: brings the chunks of a cargo into a slot, each checked by its digest right after it has landed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import (
    AgentClosed,
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
from raynixl.weights.digest import ARENA_BIT
from raynixl.weights.givers import Givers
from raynixl.weights.pace import Pace
from raynixl.weights.reads import Reads
from raynixl.weights.throttle import Throttle

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.transfer import Transfer
    from raynixl.region import Region
    from raynixl.weights.bank import Bank

_LOOK_SECONDS = 0.1
GONE = (PeerLost, PeerRestarted, RegionStale, RegionUnknown)


@dataclass(frozen=True, slots=True)
class PullTimes:
    """How long a pull took: by the clock, and its two parts, averaged over the threads; and the bytes by giver."""

    seconds: float
    pull_seconds: float
    verify_seconds: float
    origin_nbytes: int
    peer_nbytes: int
    failures: tuple[RaynixlError, ...] = ()
    """How sources failed that others stood in for."""

    def plus(self, after: Receiver) -> PullTimes:
        """Return these with what came afterwards."""
        return replace(
            self,
            origin_nbytes=self.origin_nbytes + after.tally.origin_nbytes,
            peer_nbytes=self.peer_nbytes + after.tally.peer_nbytes,
            failures=self.failures + after.sources.failures,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cargo goes: registered arenas, the bank that they make up, and the reads into them."""

    regions: Sequence[Region]
    bank: Bank
    reads: Reads = field(default_factory=Reads)


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
    pace: Pace = field(default_factory=Pace)
    sources: Givers = field(init=False)
    _spent: TransferTimeout | None = None

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.cargo.chunks):
            raise IntegrityError("the manifest does not fit the image", hint="run one version of raynixl everywhere")
        self.slot.reads.begin()
        self.sources = Givers(self.givers, sum(self.agent.name.encode()))

    def times(self, began: float, threads: int) -> PullTimes:
        """Return what was measured."""
        count, tally = max(1, min(threads, len(self.digests))), self.tally
        return PullTimes(
            time.monotonic() - began, tally.pull / count, tally.verify / count, tally.origin_nbytes, tally.peer_nbytes,
            self.sources.failures,
        )  # fmt: skip

    def from_origin(self, chunk: int) -> None:
        """Bring one chunk in from the sources. What one of them does not give, or not as it was, its replica does.

        Raises:
            IntegrityError: it does not match its digest.
            RaynixlError: nobody could give it, or it did not come in time.
        """
        shares = self.cargo.shares(chunk)
        began = self._begin(chunk)
        read = _Read(chunk)
        self._bring(read, shares)
        self._verify(chunk, read, shares, began=began, is_origin=True)

    def _bring(self, read: _Read, shares: Sequence[Share]) -> None:
        """Have shares of a chunk come, from one source of each part or another."""
        while shares:
            self._wait_quiet()
            began = time.monotonic()
            started = self._start_all(read, shares)
            ends = [(share, giver.name, transfer, self._end(transfer)) for share, giver, transfer in started]
            for share, name, transfer, error in ends:
                read.tried[name] += 1
                if error is None:
                    read.gave[share.part] = name
                    read.landed[share.part] = transfer
                    self.pace.landed(time.monotonic() - began)
                else:
                    self._note(read, share.part, name, error, began)
            shares = [share for share, _, _, error in ends if error is not None]

    def _note(self, read: _Read, part: int, name: str, error: RaynixlError, began: float) -> None:
        """Note how a source failed, or raise that if nobody else can be asked."""
        self.left()
        if isinstance(error, TransferTimeout):
            self.pace.stalled(began, time.monotonic())
        elif isinstance(error, GONE):
            is_last = self.sources.is_alone(part, read.gone)
            read.gone.add(name)
            if is_last:
                raise error
        else:
            raise error
        self.sources.note(name, error)

    def _bring_elsewhere(self, read: _Read, shares: Sequence[Share]) -> None:
        """Bring what is corrupt in from other sources, a part at a time: so it is found out who gave it.

        Raises:
            IntegrityError: it is corrupt whoever gives it.
        """
        wrong = self._corrupt(read)
        for share in shares:
            suspect = read.gave[share.part]
            while not self.sources.is_alone(share.part, read.gone):
                read.gone.add(read.gave[share.part])
                self._bring(read, [share])
                if self.is_whole(read.chunk):
                    blame = f"{suspect!r} gave wrong bytes of chunk {read.chunk} of version {self.version}"
                    hint = "look at its memory and its links"
                    self.sources.note(suspect, IntegrityError(blame, hint=hint, peer=suspect))
                    return
        raise wrong

    def _start_all(self, read: _Read, shares: Sequence[Share]) -> list[tuple[Share, Giver, Transfer]]:
        """Begin to read all shares, or none: what goes on alone would land in a slot that is another version's then."""
        started: list[tuple[Share, Giver, Transfer]] = []
        try:
            for share in shares:
                started.append((share, *self._start(read, share)))  # noqa: PERF401
        except BaseException:
            for _, _, transfer in started:
                transfer.cancel()
                self._end(transfer)
            raise
        return started

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
        read = self.slot.reads.get(
            (self.cargo.key, chunk, giver.key),
            lambda: self.agent.prepare("read", source.span(offset, nbytes), target.span(offset, nbytes)),
        )
        self._wait_quiet()
        timeout = min(self.left(), self.pace.patience(nbytes))
        transfer = read.post(timeout=timeout, digest=self._wish(arena))
        error = self._end(transfer)
        if isinstance(error, TransferTimeout):
            self.pace.stalled(began, time.monotonic())
        if error is not None:
            raise error
        self.pace.landed(time.monotonic() - began)
        self._verify(chunk, _Read(chunk, gave={0: giver.name}, landed={0: transfer}), (), began=began, is_origin=False)

    def is_whole(self, chunk: int) -> bool:
        """Whether a chunk in the slot matches its digest."""
        self._wait_quiet()
        out = np.zeros((1, 2), np.uint64)
        self.slot.bank.digest(digest_table(self.cargo, chunk, self.slot.bank.addresses), out, seed=self.version)
        return bool(np.array_equal(out[0], self.digests[chunk]))

    def left(self) -> float:
        """Return the time that is left.

        Raises:
            TransferTimeout: none is, or too little for all to have its turn.
            TransferCancelled: a newer push has begun.
            AgentClosed: nothing can come any more.
        """
        if self._spent is not None:
            raise self._spent
        if self.agent.is_closed:
            raise AgentClosed(f"{self.agent.name!r} was closed", hint="subscribe again")
        if self.stop.is_set():
            raise TransferCancelled("a newer push has begun", hint="its version comes instead")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TransferTimeout(f"version {self.version} did not come in time", peer=self.agent.name)
        return left

    def _is_over(self) -> bool:
        return self.stop.is_set() or self.agent.is_closed

    def _begin(self, chunk: int) -> float:
        """Wait for a chunk's turn; return when it came. That there is none left is our own fault, and ends the pull."""
        try:
            self.throttle.take(int(self.cargo.chunks[chunk, 2]), self.left(), self._is_over)
        except TransferTimeout as exc:
            self._spent = exc
            raise
        return time.monotonic()

    def _start(self, read: _Read, share: Share) -> tuple[Giver, Transfer]:
        giver = self.sources.choose(share.part, read.chunk, read.tried, read.gone)
        target = self.slot.regions[int(self.cargo.chunks[read.chunk, 0])]
        timeout = self.left()
        if not self.sources.is_alone(share.part, read.gone):
            patience = self.pace.patience(int(self.cargo.chunks[read.chunk, 2]))
            timeout = min(timeout, patience * 2 ** read.tried[giver.name])
        prepared = self.slot.reads.get(
            (self.cargo.key, read.chunk, share.part, giver.key),
            lambda: self.agent.prepare("read", share.far(giver), share.near(target)),
        )
        return giver, prepared.post(timeout=timeout, digest=self._wish(int(self.cargo.chunks[read.chunk, 0])))

    def _end(self, transfer: Transfer) -> RaynixlError | None:
        """Wait for a read; return how it failed, if it did. All of a chunk are waited for, whatever becomes of one."""
        try:
            transfer.wait()
        except RaynixlError as exc:
            self.slot.reads.failed(transfer)
            return exc
        return None

    def _wait_quiet(self) -> None:
        """Wait until no read that was given up, now or by an earlier pull, writes into the slot any more.

        Raises:
            RaynixlError: as `left`.
        """
        while not self.slot.reads.wait_quiet(_LOOK_SECONDS):
            self.left()

    def _wish(self, arena: int) -> tuple[int, int]:
        """Return how transfers into an arena digest what they bring, in the same pass where they can."""
        return arena << ARENA_BIT, self.version

    def _has_landed(self, chunk: int, transfers: Sequence[Transfer]) -> bool:
        """Whether what transfers brought is the chunk: by the digests that they made, or by looking at it."""
        found = [transfer.digest for transfer in transfers]
        digests = [one for one in found if one is not None]
        if len(digests) < len(found):
            return self.is_whole(chunk)
        total = np.array(digests, np.uint64).reshape(-1, 2).sum(axis=0, dtype=np.uint64)
        return bool(np.array_equal(total, self.digests[chunk]))

    def _corrupt(self, read: _Read) -> IntegrityError:
        names = sorted(set(read.gave.values()))
        return IntegrityError(
            f"chunk {read.chunk} of version {self.version} from {', '.join(map(repr, names))} is not what was "
            f"published; it holds {self.names(read.chunk)}",
            hint="the old version stays; push again", peer=names[0] if len(names) == 1 else "",
        )  # fmt: skip

    def _verify(
        self, chunk: int, read: _Read, shares: Sequence[Share], *, began: float, is_origin: bool
    ) -> None:  # fmt: skip
        """Check a chunk that has landed; what of it can be had elsewhere is brought in again if it is corrupt."""
        landed = time.monotonic()
        if not self._has_landed(chunk, list(read.landed.values())):
            self._bring_elsewhere(read, shares)
        nbytes = int(self.cargo.extents(chunk)[:, 1].sum()) if is_origin else int(self.cargo.chunks[chunk, 2])
        self.tally.add(landed - began, time.monotonic() - landed, nbytes, is_origin=is_origin)


@dataclass(slots=True)
class _Read:
    """How the reading of one chunk stands: how often each source was asked, who is gone, and who gave what."""

    chunk: int
    tried: Counter[str] = field(default_factory=Counter)
    gone: set[str] = field(default_factory=set)
    gave: dict[int, str] = field(default_factory=dict)
    landed: dict[int, Transfer] = field(default_factory=dict)


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

"""Rows for peers whose memory is not mapped here: gathered in an outbox, written one-sided, and followed by lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raynixl.errors import PeerLost, PeerRestarted, RangeError, RaynixlError, RegionStale, TransferTimeout
from raynixl.moe.channel import Source
from raynixl.native import CANCELLED

if TYPE_CHECKING:
    from raynixl.agents import Agent, Transfer
    from raynixl.agents.window import Window
    from raynixl.region import Region

OUTBOX_NBYTES: Final = 1 << 20
_ALIGNMENT: Final = 64
_SLICE: Final = 5e-4
"""Seconds for which one transfer is waited for before the others are looked at."""


class Put:
    """Rows on their way to one peer, and the lines that follow them. Made by `RemoteRows.start`."""

    __slots__ = ("_transfer", "deadline", "error", "lines", "nbytes", "window")

    def __init__(self, window: Window, nbytes: int, deadline: float) -> None:
        self.window = window
        self.nbytes = nbytes
        self.deadline = deadline
        self.error: RaynixlError | None = None
        """Why the rows, or a line, did not reach the peer; None while that is not known."""
        self.lines: list[tuple[str, bytes]] = []
        """What is to be sent yet."""
        self._transfer: Transfer | None = None

    def __repr__(self) -> str:
        state = self.error or ("under way" if self._transfer is not None else "done")
        return f"Put({self.nbytes} bytes to {self.window.remote.owner!r}, {state})"

    @property
    def is_under_way(self) -> bool:
        """Whether the rows are not there yet, nor known not to come."""
        return self._transfer is not None and self.error is None

    @property
    def is_open(self) -> bool:
        """Whether rows or lines are to reach the peer yet."""
        return self.error is None and (self._transfer is not None or bool(self.lines))

    @property
    def is_settled(self) -> bool:
        """Whether nothing reads the outbox for it any more; after a failure that takes a moment."""
        transfer = self._transfer
        return transfer is None or (transfer.done and all(job.settled for job in transfer.jobs))

    def post(self, local: Region, table: np.ndarray[Any, Any]) -> None:
        """Begin to write rows that lie in a region of ours."""
        try:
            self._transfer = self.window.write(local, table, timeout=max(1e-3, self.deadline - time.monotonic()))
        except (PeerLost, PeerRestarted, RegionStale) as exc:
            self.error = exc

    def look(self) -> None:
        """Find out whether the rows are there."""
        transfer = self._transfer
        if transfer is not None and self.error is None and transfer.done:
            self.error = transfer.error
            if self.error is None:
                self._transfer = None

    def wait(self, seconds: float) -> None:
        """Wait for the rows, a moment; an error is not waited out, as `Transfer.wait` would."""
        transfer = self._transfer
        if transfer is None or self.error is not None:
            return
        for job in transfer.jobs:
            if not job.wait(seconds):
                return
        if not transfer.done:  # it is not connected yet
            time.sleep(min(seconds, _SLICE))

    def give_up(self) -> None:
        """End it: its time is over."""
        peer = self.window.remote.owner
        self.fail(TransferTimeout(f"rows for {peer!r} were still under way at their deadline", peer=peer))

    def fail(self, error: RaynixlError) -> None:
        """End it with an error, unless it has ended."""
        if not self.is_open:
            return
        self.error = error
        transfer = self._transfer
        jobs = () if transfer is None else transfer.jobs
        for job in jobs:
            job.cancel(CANCELLED)
        if transfer is not None and not jobs:  # it waits for a new path
            transfer.cancel()

    def send_lines(self, agent: Agent) -> None:
        """Send the lines, now that the rows are there."""
        while self.lines and self.error is None:
            topic, line = self.lines.pop(0)
            self.error = self.window.error
            try:
                if self.error is None:
                    agent.send(
                        self.window.remote.owner, topic, line, timeout=max(1e-3, self.deadline - time.monotonic())
                    )
            except RaynixlError as exc:
                self.error = exc


class _Space:
    """A region of the outbox. What is used of it is used again once all that was put from there has settled."""

    def __init__(self, agent: Agent, nbytes: int) -> None:
        self.region = agent.empty(nbytes)
        self.used = 0
        self._puts: list[Put] = []

    def has_room(self, nbytes: int) -> bool:
        return self.used + nbytes <= self.region.nbytes

    def take(self, nbytes: int, put: Put) -> int:
        """Return where `nbytes` for a put begin."""
        at, self.used = self.used, self.used + nbytes
        self._puts.append(put)
        return at

    def tidy(self) -> bool:
        """Use it from the start again if nothing is read from it any more; whether that is so."""
        self._puts = [put for put in self._puts if not put.is_settled]
        if not self._puts:
            self.used = 0
        return not self._puts


class RemoteRows:
    """Puts rows into memory of peers that is not mapped here: one block for each field, however many rows.

    All puts may be started before the first is waited for. Lines to a peer go once all rows that were put to it before
    are there, and in order. One thread at a time.
    """

    def __init__(self, agent: Agent, nbytes: int = OUTBOX_NBYTES) -> None:
        self._agent = agent
        self._nbytes = nbytes
        self._space: _Space | None = None
        self._retired: list[_Space] = []
        self._pending: list[Put] = []

    def __repr__(self) -> str:
        return f"RemoteRows({self.outbox_nbytes} bytes, {len(self._pending)} under way)"

    @property
    def outbox_nbytes(self) -> int:
        """How large the outbox is, with what is left of smaller ones."""
        spaces = [*self._retired, *([] if self._space is None else [self._space])]
        return sum(space.region.nbytes for space in spaces)

    def start(
        self, window: Window, sources: Sequence[Source], places: Sequence[int], count: int, *, deadline: float
    ) -> Put:
        """Gather `count` rows of each field and begin to write them to `places`, byte offsets in the peer's region.

        The rows at the source may change when this returns. What the peer does is carried by the handle.

        Raises:
            RangeError: a field lies outside the peer's region, or there is not a place for each.
            AgentClosed: the agent was closed.
        """
        self._agent.check_open()
        if len(sources) != len(places):
            raise RangeError(f"{len(sources)} fields but {len(places)} places", hint="give one place for each field")
        sizes = [count * source.nbytes for source in sources]
        for place, size in zip(places, sizes, strict=True):
            if place < 0 or size < 0 or place + size > window.remote.nbytes:
                raise RangeError(f"{size} bytes at {place} lie outside {window.remote.label}", hint="mend the places")
        put = Put(window, sum(sizes), deadline)
        put.error = window.error
        if put.nbytes and put.error is None:
            self._write(put, sources, places, sizes)
        return put

    def follow(self, put: Put, topic: str, line: bytes) -> None:
        """Send a line to the put's peer once its rows are there: now, or within `finish`."""
        put.lines.append((topic, line))
        if put.error is None and put not in self._pending:
            self._pending.append(put)
        self._look()

    def finish(self, deadline: float, puts: Sequence[Put] | None = None) -> list[Put]:
        """Wait until the rows of these puts, or of all, are there and their lines sent; return those that failed.

        Returns by the monotonic deadline: what is under way then has failed. Lines of other puts are sent meanwhile.
        """
        wanted = list(self._pending if puts is None else puts)
        while True:
            self._look()
            if not any(put.is_open for put in wanted):
                break
            left = deadline - time.monotonic()
            if left <= 0:
                for put in wanted:
                    put.give_up()
            first = next((put for put in self._pending if put.is_under_way), None)
            if first is not None:
                first.wait(max(0.0, left if len(self._pending) == 1 else min(left, _SLICE)))
        self._tidy()
        return [put for put in wanted if put.error is not None]

    def close(self) -> None:
        """Give up what is under way and let go of the outbox; idempotent."""
        for put in self._pending:
            put.give_up()
        self._pending.clear()
        spaces = [*self._retired, *([] if self._space is None else [self._space])]
        self._retired, self._space = [], None
        for space in spaces:
            self._drop(space)

    def _write(self, put: Put, sources: Sequence[Source], places: Sequence[int], sizes: Sequence[int]) -> None:
        """Gather into the outbox, each field at a multiple of 64, and post."""
        room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        space = self._room(sum(room))
        region = space.region
        begins = space.take(sum(room), put) + np.concatenate([[0], np.cumsum(room)[:-1]]).astype(np.uint64)
        for source, begin, size in zip(sources, begins.tolist(), sizes, strict=True):
            if size:
                code = self._agent.native.put_rows(
                    source.address, source.stride, source.nbytes, source.index, region.memory.address + begin,
                    [region.gate], size // source.nbytes,
                )  # fmt: skip
                if code:
                    self._agent.check_open()
                    raise RegionStale("the outbox was deregistered", hint="make new RemoteRows")
        put.post(region, np.stack([begins, np.array(places, np.uint64), np.array(sizes, np.uint64)], axis=1))
        if put.is_under_way:
            self._pending.append(put)
            self._look()

    def _room(self, nbytes: int) -> _Space:
        """Return a space with so much room; one that grows leaves the old one to what is read from it."""
        space = self._space
        if space is not None and not space.has_room(nbytes):
            space.tidy()
        if space is None or not space.has_room(nbytes):
            least = self._nbytes if space is None else 2 * space.region.nbytes
            if space is not None:
                self._retired.append(space)
            space = self._space = _Space(self._agent, max(least, nbytes))
        return space

    def _look(self) -> None:
        """See which rows are there by now, and send the lines that follow them."""
        busy: set[str] = set()
        broken: dict[str, RaynixlError] = {}
        for put in self._pending:
            peer = put.window.remote.owner
            put.look()
            if peer in broken:
                put.fail(broken[peer].afresh())
            if put.is_under_way or peer in busy:
                busy.add(peer)
            else:
                put.send_lines(self._agent)
            if put.error is not None:
                broken[peer] = put.error
        self._pending = [put for put in self._pending if put.is_open]

    def _tidy(self) -> None:
        """Use the outbox from its start again if nothing reads it, and let go of smaller ones."""
        if self._space is not None:
            self._space.tidy()
        for old in list(self._retired):
            if old.tidy():
                self._retired.remove(old)
                self._drop(old)

    def _drop(self, space: _Space) -> None:
        if space.region.is_registered and not self._agent.is_closed:
            self._agent.deregister(space.region)

"""Dispatching: counts go out, rows go straight to where they belong, and the result is a view of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.errors import IntegrityError, RaynixlError
from raynixl.moe.arrival import Arrival, arrange
from raynixl.moe.calls import DispatchCall
from raynixl.moe.channel import Place, Source
from raynixl.moe.landing import Landing, Piece
from raynixl.moe.lines import Line
from raynixl.moe.result import Dispatched
from raynixl.moe.routing import Routing
from raynixl.moe.session import ANY, Session

I64 = npt.NDArray[np.int64]
COPY_RATE = 5e8
"""Bytes a second with which rows come at the very least, once counts have."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What stays the same from call to call: sizes that all ranks share."""

    topk: int
    max_tokens: int
    world: int
    placement: int
    local_experts: int
    is_eager: bool
    """Whether rows go to fixed places in every layout, and are copied together where that wants them so."""


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where rows go, as far as each rank can tell by itself."""

    offsets: I64
    """By rank: the row at which ours begin there, or -1."""
    extent: I64
    """By rank: how many rows it gets from all."""
    arriving: I64
    """By source: the row at which its rows begin here."""
    is_exact: bool
    """Whether all ranks are known to reckon alike."""


@dataclass(slots=True)
class Dispatch:
    """One dispatch of one rank."""

    session: Session
    scene: Scene
    call: DispatchCall
    routing: Routing
    error: RaynixlError | None
    deadline: float

    def run(self) -> Dispatched:
        """Send our rows, take in the others'.

        Raises:
            RangeError, ConfigError: a rank's call is wrong; all ranks raise it.
            Masked: the others go on without us.
        """
        session, call = self.session, self.call
        form = call.form(self.scene.topk)
        signature = ANY if self.error is not None else call.signature(self.scene.placement)
        places = self._exchange_counts(_of_counts(signature)) if self.needs_counts else self._known_places()
        landing = Landing(session, form, session.phase + 1, session.turn(), self.scene.max_tokens)
        try:
            arrival = self._exchange_rows(landing, places, signature)
            return arrange(arrival, self.scene, call, self.routing)
        except BaseException:
            landing.release()
            raise

    @property
    def needs_counts(self) -> bool:
        """Whether ranks must tell each other first how many rows they send."""
        return self.call.handle is None and self.call.layout != "slots" and not self.scene.is_eager

    def _exchange_counts(self, signature: int) -> Places:
        """Tell all ranks our counts, and hear theirs."""
        session, me = self.session, self.session.members.me
        line = session.line(signature, self.error)
        line.counts(self.routing.counts)
        for rank in session.members.in_turn:
            session.post(rank, line)
        heard, is_whole = session.gather(signature, self._counts_by(), error=self.error)
        counts = np.zeros((session.members.limit, session.members.limit), np.int64)
        for rank in heard:
            counts[rank] = session.board.counts(rank, session.phase & 1)
        counts[me] = self.routing.counts
        if counts.max() > self.scene.max_tokens:
            raise self._too_many(counts)
        arriving = np.cumsum(counts[:, me]) - counts[:, me]
        return Places(counts[:me].sum(axis=0), counts.sum(axis=0), arriving, is_whole)

    def _too_many(self, counts: I64) -> IntegrityError:
        rank = int(np.flatnonzero(counts.max(axis=1) > self.scene.max_tokens)[0])
        name = self.session.members.names.get(rank, "")
        return IntegrityError(
            f"rank {rank} ({name!r}) tells of {counts[rank].max()} rows of {self.scene.max_tokens} tokens at most",
            hint="its memory or its version of raynixl is damaged", peer=name,
        )  # fmt: skip

    def _known_places(self) -> Places:
        """Return the places of a layout that is known: that of a handle, or of fixed slots."""
        limit, me = self.session.members.limit, self.session.members.me
        handle = self.call.handle
        if handle is None or self.call.layout == "slots":
            most = self.scene.max_tokens
            return Places(
                np.full(limit, me * most), np.full(limit, self.scene.world * most), most * np.arange(limit), True
            )
        return Places(handle.offsets, handle.extent, handle.arriving, True)

    def _exchange_rows(self, landing: Landing, places: Places, signature: int) -> Arrival:
        session, me = self.session, self.session.members.me
        counts = self.routing.counts.tolist() if self.error is None else [0] * session.members.limit
        if places.is_exact and int(places.extent[me]) > landing.capacity():
            landing.shared_for(int(places.extent[me]), places.arriving)
        own = self._own_place(landing, places) if counts[me] else None
        packed = self._packed()
        line = session.line(signature, self.error)
        asked = []
        for rank in session.members.in_turn:
            place = self._place(landing, rank, places) if counts[rank] else None
            if not counts[rank]:
                self._post(line, rank, None, 0)
            elif place is None:
                landing.ask(rank, counts[rank])
                asked.append(rank)
            elif landing.put(rank, place, self._rows(packed, rank), counts[rank], self.deadline):
                self._post(line, rank, place, counts[rank])
        if own is not None:
            landing.put_here(own, self._rows(packed, me), counts[me])
        for rank, place in landing.places(asked, self.deadline):
            if landing.put(rank, place, self._rows(packed, rank), counts[rank], self.deadline):
                self._post(line, rank, place, counts[rank])
        heard, _ = session.gather(signature, self.deadline, landing=landing, error=self.error)
        piece = None if own is None else Piece(me, landing.slots[own.slot], own.offset, counts[me])
        offsets = places.offsets if places.is_exact else np.full(session.members.limit, -1)
        pieces, (_, total) = landing.pieces(heard, piece), self._backs()
        return Arrival(landing, pieces, heard, offsets, places.extent, places.arriving, total)

    def _own_place(self, landing: Landing, places: Places) -> Place:
        """Return where our own rows lie: in a larger slot if the announced one does not hold what comes."""
        offset = int(places.offsets[self.session.members.me])
        if not places.is_exact or offset < 0:
            return Place(landing.take(self.scene.max_tokens).number, 0)
        return Place((landing.announced if landing.shared is None else landing.shared[0]).number, offset)

    def _place(self, landing: Landing, rank: int, places: Places) -> Place | None:
        """Return where our rows go at a rank, if we can tell."""
        slot, offset = int(self.session.slots[rank]), int(places.offsets[rank])
        if not places.is_exact or offset < 0:
            return None
        capacity = self.session.channels[rank].capacity(landing.form, slot, self.deadline)
        return Place(slot, offset) if capacity >= places.extent[rank] else None

    def _packed(self) -> list[Source]:
        """Return where the fields lie that are in row order already: ids, weights and tokens."""
        call, routing = self.call, self.routing
        found = []
        if call.handle is None:
            found.append(_source(routing.row_ids))
        if call.sends_weights:
            assert routing.row_weights is not None
            found.append(_source(routing.row_weights))
        if call.handle is None:
            found.append(_source(routing.order))
        return found

    def _rows(self, packed: list[Source], rank: int) -> list[Source]:
        """Return where the rows come from that go to one rank."""
        rows = self.routing.rows_of(rank)
        index = self.routing.order[rows]
        sources = [column.source(index) for column in self.call.columns]
        first = rows.start
        sources += [Source(one.address + first * one.nbytes, one.nbytes, one.nbytes) for one in packed]
        return sources

    def _post(self, line: Line, rank: int, place: Place | None, count: int) -> None:
        """Write the line behind the rows that a rank has got."""
        backs, total = self._backs()
        self.session.post_rows(rank, line, place, count, back=int(backs[rank]), total=total)

    def _backs(self) -> tuple[I64, int]:
        """Return where what comes back from each rank begins, and how much comes back in all."""
        by_pair = self.call.weights_at == "source"
        begins = self.routing.pair_begins if by_pair else self.routing.begins
        return begins, int(begins[-1])

    def _counts_by(self) -> float:
        """Return by when counts must have come, so that there is time for rows."""
        form = self.call.form(self.scene.topk)
        needed = sum(form.fields) * self.scene.max_tokens * self.scene.world / COPY_RATE
        return self.deadline - self.session.kept(self.deadline, needed)


def _source(array: npt.NDArray[Any]) -> Source:
    nbytes = array.strides[0]
    return Source(array.ctypes.data, nbytes, nbytes)


def _of_counts(signature: int) -> int:
    """Return what the lines of counts are signed with, lest a rank take them for those behind rows."""
    return ANY if signature == ANY else signature ^ 1 or 2

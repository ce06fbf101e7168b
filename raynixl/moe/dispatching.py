"""Dispatching: counts go out, rows go straight to where they belong, and the result is a view of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raynixl.errors import RaynixlError
from raynixl.moe.arrival import Arrival, arrange
from raynixl.moe.calls import DispatchCall
from raynixl.moe.channel import Place, Source
from raynixl.moe.landing import Landing, Piece
from raynixl.moe.result import Dispatched
from raynixl.moe.routing import Routing
from raynixl.moe.session import ANY, GRACE, Session, status_of

if TYPE_CHECKING:
    from raynixl.moe.fields import RowFormat

I64 = npt.NDArray[np.int64]
COPY_RATE = 5e8
"""Bytes a second at which rows come at the very least, for how long those of ranks that came late are waited for."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What stays the same from call to call: sizes that all ranks share."""

    topk: int
    max_tokens: int
    world: int
    placement: int
    local_experts: int


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
        places = self._exchange_counts(signature) if self.needs_counts else self._known_places()
        landing = Landing(session, form, signature, session.phase + 1, session.turn(), self.scene.max_tokens)
        try:
            arrival = self._exchange_rows(landing, places)
            return arrange(arrival, self.scene, call, self.routing)
        except BaseException:
            landing.release()
            raise

    @property
    def needs_counts(self) -> bool:
        """Whether ranks must tell each other first how many rows they send."""
        return self.call.handle is None and self.call.layout != "slots"

    def _exchange_counts(self, signature: int) -> Places:
        """Tell all ranks our counts, and hear theirs."""
        session, me = self.session, self.session.members.me
        line = session.line(signature)
        line["counts"] = self.routing.counts
        self._say(line)
        for rank in session.members.in_turn:
            session.post(rank, line)
        lines, came, is_whole = session.gather(signature, self.deadline, error=self.error)
        counts = np.zeros((session.members.limit, session.members.limit), np.int64)
        counts[came] = lines["counts"][came]
        counts[me] = self.routing.counts
        arriving = np.cumsum(counts[:, me]) - counts[:, me]
        return Places(counts[:me].sum(axis=0), counts.sum(axis=0), arriving, is_whole)

    def _known_places(self) -> Places:
        """Return the places of a layout that is known: that of a handle, or of fixed slots."""
        limit, me = self.session.members.limit, self.session.members.me
        handle = self.call.handle
        if self.call.layout == "slots":
            most = self.scene.max_tokens
            return Places(
                np.full(limit, me * most), np.full(limit, self.scene.world * most), most * np.arange(limit), True
            )
        assert handle is not None
        return Places(handle.offsets, handle.extent, handle.begins[:-1], True)

    def _exchange_rows(self, landing: Landing, places_of: Places) -> Arrival:
        session, routing, me = self.session, self.routing, self.session.members.me
        rows = [(rank, int(routing.counts[rank])) for rank in [*session.members.in_turn, me]]
        own_slot = self._own_slot(landing, places_of)
        sources = self._sources()
        places: dict[int, Place] = {}
        asked = []
        for rank, count in rows if self.error is None else ():
            if not count:
                continue
            place = (
                self._own_place(landing, places_of, own_slot) if rank == me else self._place(landing, rank, places_of)
            )
            if place is None:
                landing.ask(rank, count)
                asked.append((rank, count))
            elif landing.put(rank, place, self._cut(sources, rank), count, self.deadline):
                places[rank] = place
                if rank != me:
                    self._post(landing, rank, place)
        for rank, count in asked:
            place = landing.wait_place(rank, self._late(landing.form))
            if place is not None and landing.put(rank, place, self._cut(sources, rank), count, self.deadline):
                places[rank] = place
                self._post(landing, rank, place)
        for rank in session.members.in_turn:
            if rank not in places:
                self._post(landing, rank, None)
        lines, came, _ = session.gather(landing.signature, self._late(landing.form), landing=landing, error=self.error)
        own = None
        if me in places:
            own = Piece(me, landing.slots[places[me].slot], places[me].offset, rows[-1][1])
        return Arrival(
            landing,
            landing.pieces(lines, came, own),
            lines,
            came,
            places_of.offsets,
            places_of.extent,
            self._back(me)[1],
        )

    def _own_slot(self, landing: Landing, places: Places) -> int:
        """Return the slot in which our own rows lie: a larger one if the announced one does not hold what comes."""
        rows = int(places.extent[self.session.members.me])
        if places.is_exact and rows > landing.capacity():
            return landing.enlarge(rows, places.arriving).number
        return landing.announced.number

    def _own_place(self, landing: Landing, places: Places, slot: int) -> Place:
        offset = int(places.offsets[self.session.members.me])
        if places.is_exact and offset >= 0:
            return Place(slot, offset)
        return Place(landing.take(self.scene.max_tokens).number, 0)

    def _place(self, landing: Landing, rank: int, places: Places) -> Place | None:
        """Return where our rows go at a rank, if we can tell."""
        slot, offset = int(self.session.slots[rank]), int(places.offsets[rank])
        if not places.is_exact or offset < 0:
            return None
        capacity = self.session.channels[rank].capacity(landing.form, slot)
        return Place(slot, offset) if capacity >= places.extent[rank] else None

    def _sources(self) -> list[Source]:
        """Return where the fields of all our rows come from, in row order."""
        call, routing = self.call, self.routing
        sources = [column.source(routing.order) for column in call.columns]
        if call.handle is None:
            sources.append(_packed(routing.row_ids))
        if call.sends_weights:
            assert routing.row_weights is not None
            sources.append(_packed(routing.row_weights))
        if call.handle is None:
            sources.append(_packed(routing.order))
        return sources

    def _cut(self, sources: list[Source], rank: int) -> list[Source]:
        """Return the sources of the rows that go to one rank."""
        rows = self.routing.rows_of(rank)
        return [
            replace(source, index=source.index[rows]) if source.index is not None
            else replace(source, address=source.address + rows.start * source.stride)
            for source in sources
        ]  # fmt: skip

    def _post(self, landing: Landing, rank: int, place: Place | None) -> None:
        """Write the line behind the rows that a rank has got."""
        session, routing = self.session, self.routing
        line = session.line(landing.signature)
        back, total = self._back(rank)
        line["back"], line["total"] = back, total
        if place is not None:
            line["place"], line["offset"], line["count"] = place.slot, place.offset, routing.counts[rank]
        self._say(line)
        session.post(rank, line)

    def _back(self, rank: int) -> tuple[int, int]:
        """Return where what comes back from a rank begins, and how much comes back in all."""
        if self.call.weights_at == "holder":
            return int(self.routing.begins[rank]), int(self.routing.begins[-1])
        pairs = self.routing.pair_counts
        return int(pairs[:rank].sum()), int(pairs.sum())

    def _say(self, line: Any) -> None:
        if self.error is not None:
            line["status"] = status_of(self.error)
            line["text"] = str(self.error).encode()[:200]

    def _late(self, form: RowFormat) -> float:
        """Return the deadline of the rows: those of a step whose counts came late are given time to come."""
        nbytes = sum(form.fields) * self.scene.max_tokens * self.scene.world
        return max(self.deadline, time.monotonic() + GRACE + nbytes / COPY_RATE)


def _packed(array: npt.NDArray[Any]) -> Source:
    nbytes = array.strides[0]
    return Source(array.ctypes.data, nbytes, nbytes)

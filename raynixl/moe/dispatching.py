"""Dispatching: counts go out, rows go straight to where they belong, and the result is a view of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.errors import IntegrityError, RaynixlError
from raynixl.moe.arrival import Arrival, arrange
from raynixl.moe.calls import DispatchCall
from raynixl.moe.channel import Rows, Source, address_of
from raynixl.moe.landing import Landing, Piece
from raynixl.moe.result import Dispatched
from raynixl.moe.routing import Routing
from raynixl.moe.sending import Sending, post_to_all
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
        post_to_all(session, line)
        heard, is_whole = session.gather(signature, self._counts_by(), error=self.error)
        counts = np.zeros((session.members.limit, session.members.limit), np.int64)
        for rank in heard:
            counts[rank] = session.board.counts(rank, session.phase & 1)
        counts[me] = self.routing.counts
        if counts.max() > self.scene.max_tokens:
            raise self._too_many(counts)
        ends = counts.cumsum(axis=0)
        own = counts[:, me]
        return Places(ends[me] - counts[me], ends[-1], ends[:, me] - own, is_whole)

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
        is_fine = self.error is None
        counts = self.routing.counts.tolist() if is_fine else [0] * session.members.limit
        offsets = places.offsets if places.is_exact else np.full(session.members.limit, -1)
        if places.is_exact and int(places.extent[me]) > landing.capacity():
            landing.shared_for(int(places.extent[me]), places.arriving)
        rows, begins = self._rows() if is_fine else Rows([]), self.routing.begins.tolist()
        backs = self._backs()
        line = session.line(signature, self.error)
        sending = Sending(landing, line, rows, begins, counts, self.deadline, backs)
        asked = sending.to_all(offsets.tolist(), places.extent.tolist())
        own = self._put_own(landing, places, rows) if counts[me] else None
        for rank, place in landing.places(asked, self.deadline):
            sending.to_one(rank, place)
        heard, _ = session.gather(signature, self.deadline, landing=landing, error=self.error)
        return Arrival(
            landing, landing.pieces(heard, own), heard, offsets, places.extent, places.arriving, backs[-1]
        )  # fmt: skip

    def _put_own(self, landing: Landing, places: Places, rows: Rows) -> Piece:
        """Copy our own rows to their place: in a larger slot if the announced one does not hold what comes."""
        me = self.session.members.me
        slot, offset = landing.announced, int(places.offsets[me])
        if not places.is_exact or offset < 0:
            slot, offset = landing.take(self.scene.max_tokens), 0
        elif landing.shared is not None:
            slot = landing.shared[0]
        begin, count = int(self.routing.begins[me]), int(self.routing.counts[me])
        landing.put_here(slot, offset, rows, begin, count)
        return Piece(me, slot, offset, count)

    def _rows(self) -> Rows:
        """Return what goes out, by row: the columns, and ids, weights and tokens as far as they are not known."""
        call, routing = self.call, self.routing
        sources = [column.source(routing.order) for column in call.columns]
        if call.handle is None:
            sources.append(_source(routing.row_ids))
        if call.sends_weights:
            assert routing.row_weights is not None
            sources.append(_source(routing.row_weights))
        if call.handle is None:
            sources.append(_source(routing.order))
        return Rows(sources)

    def _backs(self) -> list[int]:
        """Return where what comes back from each rank begins, and how much comes back in all."""
        by_pair = self.call.weights_at == "source"
        begins: list[int] = (self.routing.pair_begins if by_pair else self.routing.begins).tolist()
        return begins

    def _counts_by(self) -> float:
        """Return by when counts must have come, so that there is time for rows."""
        form = self.call.form(self.scene.topk)
        needed = sum(form.fields) * self.scene.max_tokens * self.scene.world / COPY_RATE
        return self.deadline - self.session.kept(self.deadline, needed)


def _source(array: npt.NDArray[Any]) -> Source:
    nbytes = array.strides[0]
    return Source(address_of(array), nbytes, nbytes)


def _of_counts(signature: int) -> int:
    """Return what the lines of counts are signed with, lest a rank take them for those behind rows."""
    return ANY if signature == ANY else signature ^ 1 or 2

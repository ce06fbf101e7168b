"""Landing: where the rows of one phase come to lie here, and where ours go at the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from raynixl.errors import IntegrityError
from raynixl.moe.channel import Place, Rows, Source
from raynixl.moe.fields import RowFormat
from raynixl.moe.lines import NOWHERE, Cell, Heard
from raynixl.moe.session import OUT_OF_REACH

if TYPE_CHECKING:
    from raynixl.moe.session import Session
    from raynixl.moe.slot import Slot


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows that one source has put here."""

    source: int
    slot: Slot
    offset: int
    count: int


@dataclass(slots=True)
class Landing:
    """The slots of one phase. Rows go where all ranks can tell by themselves, else where the receiver says."""

    session: Session
    form: RowFormat
    number: int
    """The phase whose lines stand behind the rows."""
    announced: Slot
    limit: int
    """The most rows that one source may put."""
    slots: dict[int, Slot] = field(default_factory=dict)
    placed: set[int] = field(default_factory=set)
    shared: tuple[Slot, np.ndarray[Any, Any]] | None = None
    """A slot for all rows where the announced one is too small, and by source where its rows go."""

    def __post_init__(self) -> None:
        self.slots[self.announced.number] = self.announced

    def capacity(self) -> int:
        """Return how many rows our announced slot holds."""
        return self.form.layout(self.announced.nbytes).capacity

    def shared_for(self, rows: int, offsets: np.ndarray[Any, Any]) -> Slot:
        """Return a slot for all rows, taken now if there is none yet; such slots are announced from now on."""
        if self.shared is not None:
            return self.shared[0]
        slot = self.take(rows)
        self.shared = (slot, offsets)
        self.session.pool.nbytes = max(self.session.pool.nbytes, slot.nbytes)
        return slot

    def take(self, rows: int) -> Slot:
        """Take one more slot, for so many rows."""
        slot = self.session.pool.take(self.form.slot_nbytes(rows))
        self.slots[slot.number] = slot
        return slot

    def serve(self) -> None:
        """Answer those who ask where to put their rows: in a slot that holds all, or else in one of each one's own."""
        session = self.session
        for rank in session.members.ranks:
            if rank in self.placed or session.board.number(rank, Cell.WANT) < self.number:
                continue
            count = session.board.read(rank, Cell.WANT).count
            if self.shared is not None:
                slot, offset = self.shared[0], int(self.shared[1][rank])
            else:
                slot, offset = self.take(max(1, min(count, self.limit))), 0
            session.pool.announce(slot, 1 << rank)
            self._tell(rank, Place(slot.number, offset))

    def _tell(self, rank: int, place: Place) -> None:
        self.placed.add(rank)
        self.session.tell(rank, Cell.PLACE, self.number, place=place.slot, offset=place.offset)

    def ask(self, rank: int, count: int) -> None:
        """Ask a rank where our rows go."""
        self.session.tell(rank, Cell.WANT, self.number, count=count)

    def places(self, ranks: list[int], deadline: float) -> Iterator[tuple[int, Place]]:
        """Wait for the answers of ranks that were asked, and yield them as they come: one that is lost has none."""
        if not ranks:
            return
        for rank, line in self.session.wait_places(ranks, self.number, deadline, self.serve):
            if line.place != NOWHERE:
                yield rank, Place(line.place, line.offset)

    def put(self, rank: int, place: Place, rows: Rows, first: int, count: int, deadline: float) -> bool:
        """Put rows from one on at another rank; masks it if that fails."""
        if self.session.channels[rank].put(self.form, place, rows, first, count, deadline):
            return True
        self.session.lose(rank, OUT_OF_REACH)
        return False

    def put_here(self, slot: Slot, offset: int, rows: Rows, first: int, count: int) -> None:
        """Copy rows from one on into a slot of our own."""
        starts = self.form.layout(slot.nbytes).table
        self.session.agent.native.put_fields(rows.table, first, starts, slot.address, offset, [], count)

    def rows_in(self, slot: Slot) -> Rows:
        """Return the rows that lie in a slot."""
        starts = self.form.layout(slot.nbytes).starts
        fields = zip(starts, self.form.fields, strict=True)
        return Rows([Source(slot.address + start, nbytes, nbytes) for start, nbytes in fields])

    def pieces(self, heard: dict[int, Heard], own: Piece | None) -> list[Piece]:
        """Return what the lines say has come, by source.

        Raises:
            IntegrityError: a line names rows where none can be.
        """
        found = []
        for rank, line in heard.items():
            count, offset = line.count, line.offset
            if not count:
                continue
            slot = self.slots.get(line.place)
            if slot is None or count > self.limit or offset + count > self.form.layout(slot.nbytes).capacity:
                name = self.session.members.names.get(rank, "")
                raise IntegrityError(
                    f"rank {rank} ({name!r}) says that it has put {count} rows at {offset}, where they cannot be",
                    hint="its memory or its version of raynixl is damaged", peer=name,
                )  # fmt: skip
            found.append(Piece(rank, slot, offset, count))
        if own is not None:
            found.append(own)
        self._check_apart(found)
        found.sort(key=attrgetter("source"))
        return found

    def _check_apart(self, pieces: list[Piece]) -> None:
        """Refuse pieces of which one lies upon another: then ranks do not reckon alike."""
        ends: dict[int, int] = {}
        for piece in sorted(pieces, key=attrgetter("offset")):
            if piece.offset < ends.get(piece.slot.number, 0):
                raise IntegrityError(
                    f"rows of rank {piece.source} lie upon those of another rank",
                    hint="it reckons with other members than the others do: all ranks rejoin()",
                )
            ends[piece.slot.number] = piece.offset + piece.count

    def answered(self, came: Iterable[int]) -> None:
        """Note who has answered: those that have not may still write into the slots that they know of."""
        ranks = sum(1 << rank for rank in came)
        for slot in self.slots.values():
            self.session.pool.answered(slot, ranks)

    def release(self) -> None:
        """Give up our hold on all slots; those that are leased belong to their tensors."""
        for slot in self.slots.values():
            self.session.pool.put_back(slot)
        self.slots.clear()


def collect(landing: Landing, pieces: list[Piece], targets: list[int], rows: int) -> tuple[Slot | None, int]:
    """Return the slot in which all pieces lie at their targets, and the row from which those count.

    That is the announced slot in the usual course. Else they are copied together, also where a rank that was lost may
    still write between them.
    """
    if not pieces:
        return None, 0
    first = pieces[0]
    shift = first.offset - targets[0]
    layout = landing.form.layout(first.slot.nbytes)
    has_holes = rows > sum(piece.count for piece in pieces)
    fits = shift >= 0 and shift + rows <= layout.capacity and not (has_holes and first.slot.writers)
    if fits and all(p.slot is first.slot and p.offset - t == shift for p, t in zip(pieces, targets, strict=True)):
        return first.slot, shift
    slot = landing.take(rows)
    rows_in = {slot: landing.rows_in(slot) for slot in {piece.slot for piece in pieces}}
    for piece, target in zip(pieces, targets, strict=True):
        landing.put_here(slot, target, rows_in[piece.slot], piece.offset, piece.count)
    return slot, 0

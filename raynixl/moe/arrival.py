"""Arrival: the rows that have come, arranged as the caller wants them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from raynixl.errors import IntegrityError
from raynixl.moe.calls import DispatchCall
from raynixl.moe.channel import address_of
from raynixl.moe.landing import Landing, Piece, collect
from raynixl.moe.lines import Heard
from raynixl.moe.major import expert_major
from raynixl.moe.result import Dispatched, Handle, sources_of

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.dispatching import Scene
    from raynixl.moe.routing import Routing
    from raynixl.moe.slot import Slot


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """What the lines say has come."""

    landing: Landing
    pieces: list[Piece]
    heard: dict[int, Heard]
    offsets: npt.NDArray[np.int64]
    extent: npt.NDArray[np.int64]
    arriving: npt.NDArray[np.int64]
    total: int
    """How many rows, or pairs, come back to us in all."""

    def counts(self) -> npt.NDArray[np.int64]:
        """Return by source how many rows came."""
        counts = np.zeros(self.landing.session.members.limit, np.int64)
        for piece in self.pieces:
            counts[piece.source] = piece.count
        return counts


def arrange(arrival: Arrival, scene: Scene, call: DispatchCall, routing: Routing) -> Dispatched:
    """Turn what came into a result; the slot it lies in is leased to its tensors, all others are put back."""
    return _Arranging(arrival, scene, call, routing).result()


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """The ids of all rows, for the handle and for the caller, and how many pairs each expert has."""

    row_ids: npt.NDArray[np.int32]
    ids: Tensor
    counts: Tensor


class _Arranging:
    def __init__(self, arrival: Arrival, scene: Scene, call: DispatchCall, routing: Routing) -> None:
        self.arrival, self.scene, self.call, self.routing = arrival, scene, call, routing
        self.landing = arrival.landing
        self.session = arrival.landing.session
        if call.handle is not None:
            self._check_counts(call.handle)
        self.counts = self._expected()
        self.begins = [0, *itertools.accumulate(self.counts.tolist())]
        """By source: the first of its rows here, and one more at the end."""
        self.rows = self.begins[-1]
        self.missing: list[int] = []
        """Sources of a handle whose rows did not come: they were lost since."""
        if call.handle is not None:
            came = {piece.source for piece in arrival.pieces}
            self.missing = [source for source in np.flatnonzero(self.counts).tolist() if source not in came]

    @property
    def chosen(self) -> npt.NDArray[np.bool_]:
        """By token and k: whether the source named an expert."""
        if self.call.handle is not None:
            return self.call.handle.chosen
        assert self.call.ids is not None
        return self.call.ids >= 0

    def _check_counts(self, handle: Handle) -> None:
        """Refuse other rows than those of the handle, in whose places they lie."""
        known = handle.counts.tolist()
        for rank, line in self.arrival.heard.items():
            if line.count != known[rank]:
                name = self.session.members.names.get(rank, "")
                raise IntegrityError(
                    f"rank {rank} ({name!r}) has put {line.count} rows, where the handle knows of {known[rank]}",
                    hint="dispatch with ids: that rank was lost when the handle was made, or its memory is damaged",
                    peer=name,
                )

    def _expected(self) -> npt.NDArray[np.int64]:
        """Return by source how many rows the result has: those of a handle, also where a rank is lost since."""
        handle = self.call.handle
        return self.arrival.counts() if handle is None else handle.counts

    def result(self) -> Dispatched:
        call, handle = self.call, self.call.handle
        is_slots, most = call.layout == "slots", self.scene.max_tokens
        targets = [piece.source * most if is_slots else self.begins[piece.source] for piece in self.arrival.pieces]
        total = self.scene.world * most if is_slots else self.rows
        slot, shift = collect(self.landing, self.arrival.pieces, targets, total)
        if slot is None and total:
            slot = self.landing.take(total)
        rows_at = self._rows_at() if is_slots else None
        fields = self._behind(slot, shift, rows_at)
        ids = handle.row_ids if handle is not None else next(fields)
        row_weights = next(fields).copy() if call.sends_weights else None
        if row_weights is not None:
            for source in self.missing:
                row_weights[self.begins[source] : self.begins[source + 1]] = 0
        elif handle is not None and call.weights is None and call.weights_at == "holder":
            row_weights = handle.row_weights
        tokens = handle.tokens if handle is not None else next(fields).reshape(-1).copy()
        columns = self._columns(slot, shift, total)
        self._blank_holes(columns)
        told = self._told(ids)
        self.landing.release()
        return self._dispatched(columns, told, row_weights, tokens, rows_at)

    def _behind(
        self, slot: Slot | None, shift: int, rows_at: npt.NDArray[np.int64] | None
    ) -> Iterator[npt.NDArray[Any]]:
        """Return what lies behind the columns, by row and not copied: ids, weights, tokens, as far as they came."""
        call, topk, skipped = self.call, self.scene.topk, len(self.call.columns)
        kinds: list[tuple[type, int]] = []
        if call.handle is None:
            kinds.append((np.int32, topk))
        if call.sends_weights:
            kinds.append((np.float32, topk))
        if call.handle is None:
            kinds.append((np.int32, 1))
        if slot is None:
            yield from (np.zeros((0, width), kind) for kind, width in kinds)
            return
        starts = self.landing.form.layout(slot.nbytes).starts[skipped:]
        for (kind, width), start in zip(kinds, starts, strict=True):
            if rows_at is None:
                yield np.ndarray((self.rows, width), kind, slot.bytes, start + shift * 4 * width)
            else:
                rows = (shift + self.scene.world * self.scene.max_tokens, width)
                yield np.ndarray(rows, kind, slot.bytes, start)[rows_at + shift]

    def _told(self, came: npt.NDArray[np.int32]) -> _Told:
        """Copy the ids of all rows, and count them.

        Raises:
            IntegrityError: there is none of these experts here.
        """
        ids = np.empty(came.shape, np.int32) if self.call.handle is None else came
        wide = np.empty(came.shape, np.int64) if self.call.ids_dtype == torch.int64 else None
        counts = np.empty(self.scene.local_experts, np.int64)
        try:
            self.session.agent.native.take_ids(address_of(came), ids, wide, counts)
        except ValueError as exc:
            raise IntegrityError(
                f"rows came for experts that are not here: {exc}",
                hint="the ranks run different versions of raynixl, or one's memory is damaged",
            ) from exc
        return _Told(ids, torch.from_numpy(ids.copy() if wide is None else wide), torch.from_numpy(counts))

    def _columns(self, slot: Slot | None, shift: int, total: int) -> list[Tensor]:
        """Return x, its scales and what came beside as tensors: views of the slot, which they lease."""
        shapes = [(column.dtype, column.shape) for column in self.call.columns]
        if slot is None:
            return [torch.zeros((total, *shape), dtype=dtype) for dtype, shape in shapes]
        form = self.landing.form
        lease = self.session.pool.lease(slot)
        return [
            lease.tensor(dtype, (total, *shape), start + shift * nbytes)
            for (dtype, shape), start, nbytes in zip(shapes, form.layout(slot.nbytes).starts, form.fields, strict=False)
        ]

    def _blank_holes(self, fields: list[Tensor]) -> None:
        """Clear what nobody has written: the rows of sources that are missing."""
        for source in self.missing:
            begin = source * self.scene.max_tokens if self.call.layout == "slots" else self.begins[source]
            for field in fields:
                field[begin : begin + int(self.counts[source])].zero_()

    def _rows_at(self) -> npt.NDArray[np.int64]:
        """Return at which row of fixed slots each row that came lies."""
        sources = sources_of(self.counts)
        begins = np.array(self.begins, np.int64)
        return sources * np.int64(self.scene.max_tokens) + np.arange(self.rows) - begins[sources]

    def _dispatched(
        self,
        columns: list[Tensor],
        told: _Told,
        row_weights: npt.NDArray[np.float32] | None,
        tokens: npt.NDArray[np.int32],
        rows_at: npt.NDArray[np.int64] | None,
    ) -> Dispatched:
        call, scene = self.call, self.scene
        major = None
        ids, row_ids = told.ids, told.row_ids
        weights = None if row_weights is None else torch.from_numpy(row_weights)
        offsets = None
        if call.layout == "experts":
            major = expert_major(row_ids, scene.local_experts, call.alignment)
            columns = [self._by_expert(column, major) for column in columns]
            offsets = torch.from_numpy(major.offsets.copy())
            weights = None if row_weights is None else torch.from_numpy(major.weights(row_weights))
        elif rows_at is None:
            weights = None if weights is None else weights.clone()  # the handle keeps its own
        else:
            at = torch.from_numpy(rows_at)
            ids, weights = self._in_slots(ids, at, -1), None if weights is None else self._in_slots(weights, at, 0)
            columns = [column.view(scene.world, scene.max_tokens, *column.shape[1:]) for column in columns]
        scales, extra = (columns[1], columns[2:]) if call.has_scales else (None, columns[1:])
        return Dispatched(
            columns[0], scales, ids, weights, told.counts, offsets,
            torch.from_numpy(tokens.copy()), tuple(extra), self._lost(),
            self._handle(row_ids, row_weights, tokens, major),
        )  # fmt: skip

    def _lost(self) -> tuple[int, ...]:
        """Return who was lost in this operation, and whose rows of a handle did not come since it was lost before."""
        return tuple(sorted({*self.session.members.lost, *self.missing}))

    def _by_expert(self, column: Tensor, major: Any) -> Tensor:
        """Copy rows into expert order, padded with zeros, in memory that was touched before."""
        padded = len(major.rows)
        nbytes = column[0].numel() * column.element_size() if len(column) else 0
        if not padded or not nbytes:
            return column.new_zeros((padded, *column.shape[1:]))
        slot = self.session.pool.take(padded * nbytes)
        out = self.session.pool.lease(slot).tensor(column.dtype, (padded, *column.shape[1:]))
        source = column.view(torch.uint8).reshape(len(column), nbytes).numpy()
        major.gather(source, out.view(torch.uint8).reshape(padded, nbytes).numpy(), self.session.agent.native)
        return out

    def _in_slots(self, rows: Tensor, at: Tensor, blank: int) -> Tensor:
        scene = self.scene
        out = torch.full((scene.world * scene.max_tokens, *rows.shape[1:]), blank, dtype=rows.dtype)
        out[at] = rows
        return out.view(scene.world, scene.max_tokens, *rows.shape[1:])

    def _handle(self, row_ids: Any, row_weights: Any, tokens: Any, major: Any) -> Handle:
        call, arrival = self.call, self.arrival
        if call.handle is not None:
            return self._renewed(call.handle, row_weights, major)
        backs, totals = self._backs()
        return Handle(
            call.layout, call.weights_at, call.alignment, self.routing, call.weights, self.scene.placement,
            self.scene.topk, arrival.offsets, arrival.extent, backs, totals, self.counts, row_ids, row_weights, tokens,
            major, call.ids_dtype, self.chosen, self.scene.world, self.scene.max_tokens, self.session.phase,
            self.session.key, arrival.arriving, self._lost(),
        )  # fmt: skip

    def _renewed(self, handle: Handle, row_weights: Any, major: Any) -> Handle:
        """Return the handle of rows that came by another one."""
        call, scene = self.call, self.scene
        has_moved = call.weights_at != handle.weights_at
        backs, totals = self._backs() if has_moved else (handle.backs, handle.totals)
        return replace(
            handle, layout=call.layout, weights_at=call.weights_at, alignment=call.alignment,
            weights=handle.weights if call.weights is None else call.weights, row_weights=row_weights, major=major,
            backs=backs, totals=totals, world=scene.world, max_tokens=scene.max_tokens, lost=self._lost(),
            number=self.session.phase if call.sends_weights else handle.number,
        )  # fmt: skip

    def _backs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return by source where it wants what goes back from here, and how much it gets back in all."""
        members = self.session.members
        backs, totals = np.zeros(members.limit, np.int64), np.zeros(members.limit, np.int64)
        for rank, line in self.arrival.heard.items():
            backs[rank], totals[rank] = line.back, line.total
        totals[members.me] = self.arrival.total
        return backs, totals

"""Combining: what the experts made of the rows goes back to their sources, which add it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from raynixl.errors import IntegrityError, RaynixlError
from raynixl.moe.calls import number_of, with_handle
from raynixl.moe.fields import RowFormat
from raynixl.moe.landing import Landing, Piece
from raynixl.moe.lines import Heard
from raynixl.moe.outgoing import Outgoing, outgoing, spaced
from raynixl.moe.result import Combined, Handle
from raynixl.moe.sending import Sending
from raynixl.moe.session import ANY, Session
from raynixl.moe.summing import Terms, lost_scale, pair_table, sum_terms, terms_of

if TYPE_CHECKING:
    from torch import Tensor

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class CombineCall:
    """One combine, checked: y as layout and weights of the handle want it."""

    y: Tensor
    handle: Handle
    weights: Tensor | None
    """What comes back beside y, float32 [rows, topk]."""
    biases: tuple[Tensor, ...]
    out: Tensor
    is_summed: bool
    renormalises: bool

    def form(self) -> RowFormat:
        """Return what goes back for each row, or pair."""
        fields = [self.y.shape[-1] * self.y.element_size()]
        if self.weights is not None:
            fields.append(4 if self.handle.weights_at == "source" else 4 * self.handle.topk)
        return RowFormat(tuple(fields))

    def signature(self) -> int:
        """Return what must be alike on all ranks, as a number."""
        handle = self.handle
        same = number_of((
            "combine", self.y.dtype, self.y.shape[-1], handle.layout, handle.weights_at, handle.alignment,
            handle.placement, self.weights is None, self.is_summed,
        ))  # fmt: skip
        return with_handle(same, handle)


@dataclass(slots=True)
class Combine:
    """One combine of one rank."""

    session: Session
    call: CombineCall
    error: RaynixlError | None
    deadline: float

    @property
    def signature(self) -> int:
        """Return what must be alike on all ranks."""
        return ANY if self.error is not None else self.call.signature()

    def run(self) -> Combined:
        """Send the rows back, take in those of our tokens, and add them up.

        Raises:
            ConfigError: a rank's call is wrong; all ranks raise it.
            Masked: the others go on without us.
        """
        session, call = self.session, self.call
        landing = Landing(session, call.form(), session.phase + 1, session.turn(), 1 << 30)
        try:
            sent = outgoing(landing, call.y, call.handle, call.weights)
            pieces = self._exchange(landing, sent)
            out = self._add_up(landing, pieces, sent)
            weights = None if call.weights is None else self._weights_back(landing, pieces, sent)
            return Combined(out, weights, tuple(sorted(session.members.lost)))
        finally:
            landing.release()

    def _exchange(self, landing: Landing, sent: Outgoing) -> list[Piece]:
        session, handle, signature = self.session, self.call.handle, self.signature
        expected = int(handle.totals[session.members.me])
        if expected > landing.capacity() and self.error is None:
            landing.shared_for(expected, self._starts_here())
        line = session.line(signature, self.error)
        counts, begins = sent.counts.tolist(), sent.begins.tolist()
        nothing = [0] * len(begins)  # comes back of what goes back
        sending = Sending(landing, line, sent.rows(), begins, counts, self.deadline, nothing)
        asked = sending.to_all(handle.backs.tolist(), handle.totals.tolist())
        for rank, place in landing.places(asked, self.deadline):
            sending.to_one(rank, place)
        # who waits here for longer than others do comes later to their dispatch, which they have begun
        kept = 2 * session.kept(self.deadline)
        heard, _ = session.gather(signature, self.deadline, landing=landing, error=self.error, kept=kept)
        self._check_counts(heard)
        return landing.pieces(heard, None)

    def _check_counts(self, heard: dict[int, Heard]) -> None:
        """Refuse more or less than what went to a holder: each item that comes back has its place in the sums."""
        begins = self._starts_here().tolist()
        for rank, line in heard.items():
            sent = begins[rank + 1] - begins[rank]
            if line.count != sent:
                name = self.session.members.names.get(rank, "")
                raise IntegrityError(
                    f"rank {rank} ({name!r}) has sent back {line.count} rows of {sent}",
                    hint="it was lost when the handle was made, or its memory is damaged", peer=name,
                )  # fmt: skip

    def _starts_here(self) -> I64:
        """Return by holder where what it sends back begins here, and one more at the end."""
        routing = self.call.handle.routing
        return routing.begins if self.call.handle.weights_at == "holder" else routing.pair_begins

    def _came(self, landing: Landing, pieces: list[Piece], sent: Outgoing) -> _Came:
        """Return where each item that came back lies, and which did not come."""
        begins, nbytes = self._starts_here(), landing.form.fields[0]
        total, me = int(self.call.handle.totals[self.session.members.me]), self.session.members.me
        own = slice(int(begins[me]), int(begins[me]) + int(sent.counts[me]))
        first = {piece.slot.address + (piece.offset - int(begins[piece.source])) * nbytes for piece in pieces}
        if sum(piece.count for piece in pieces) + own.stop - own.start == total and len(first) < 2:
            start = first.pop() + landing.form.layout(pieces[0].slot.nbytes).starts[0] if first else 0
            at = spaced(start, total, nbytes)
            at[own] = sent.addresses(me)
            return _Came(at, None)
        at, is_there = np.zeros(total, np.uint64), np.zeros(total, np.bool_)
        for piece in pieces:
            begin = int(begins[piece.source])
            start = landing.form.layout(piece.slot.nbytes).starts[0]
            start += piece.slot.address + piece.offset * nbytes
            at[begin : begin + piece.count] = spaced(start, piece.count, nbytes)
            is_there[begin : begin + piece.count] = True
        at[own], is_there[own] = sent.addresses(me), True
        return _Came(at, None if is_there.all() else is_there)

    def _add_up(self, landing: Landing, pieces: list[Piece], sent: Outgoing) -> Tensor:
        call = self.call
        came = self._came(landing, pieces, sent)
        if not call.is_summed:
            return self._pairs(came)
        terms, scale = terms_of(call.handle), None
        if call.renormalises and not (came.is_there is None and call.handle.is_whole):
            scale = lost_scale(call.handle, came.is_there)
        if came.is_there is not None:
            terms = terms.only(came.is_there)
        sum_terms(self.session.agent.native, terms, came.at, call.y, call.out, call.biases, scale)
        return call.out

    def _pairs(self, came: _Came) -> Tensor:
        """Return the pairs of our tokens in (token, k) order, as they came; zeros for those that did not."""
        terms = terms_of(self.call.handle)
        there = np.ones(len(terms.items), np.bool_) if came.is_there is None else came.is_there[terms.items]
        starts = np.concatenate([[0], np.cumsum(there)]).astype(np.int64)
        out = self.call.y.new_empty((len(terms.items), self.call.y.shape[-1]))
        pairs = Terms(starts, terms.items[there], None)
        sum_terms(self.session.agent.native, pairs, came.at, self.call.y, out, (), None)
        return out

    def _weights_back(self, landing: Landing, pieces: list[Piece], sent: Outgoing) -> Tensor:
        """Return by token and k the sum over holders of the weights that came back."""
        handle, me = self.call.handle, self.session.members.me
        routing, begins = handle.routing, self._starts_here()
        assert sent.weights is not None
        width = sent.weights.shape[1]
        rows = np.zeros((int(handle.totals[me]), width), np.float32)
        for piece in pieces:
            start = landing.form.layout(piece.slot.nbytes).starts[1] + piece.offset * 4 * width
            block = piece.slot.bytes[start : start + piece.count * 4 * width].view(np.float32)
            rows[int(begins[piece.source]) : int(begins[piece.source]) + piece.count] = block.reshape(-1, width)
        own = slice(int(sent.begins[me]), int(sent.begins[me + 1]))
        rows[int(begins[me]) : int(begins[me]) + int(sent.counts[me])] = sent.weights[own]
        out = np.zeros((routing.tokens, handle.topk), np.float32)
        if handle.weights_at == "source":
            table = pair_table(handle)
            out[table >= 0] = rows[table[table >= 0], 0]
        else:
            valid = routing.row_ids >= 0
            picked, ks = np.nonzero(valid)
            out[routing.order[picked], ks] = rows[picked, ks]
        return torch.from_numpy(out)


@dataclass(frozen=True, slots=True, eq=False)
class _Came:
    """By item that is to come back: where it lies, and whether it came."""

    at: npt.NDArray[np.uint64]
    is_there: npt.NDArray[np.bool_] | None
    """None if all came."""

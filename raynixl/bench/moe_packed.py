"""The baselines of the MoE benchmark: rows packed by destination, exchanged by a library's all-to-all, and summed.

Written as somebody would who knows the library: buffers are made once, in huge pages; counts, ids and weights travel
together in one exchange of fixed size, and rows are packed while that one is under way. Tokens are routed and rows are
summed by the code that ours uses, so that the way in between is what differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from raynixl.bench.moe_load import Load, Received, Tokens, run_experts
from raynixl.bench.pages import huge_memory
from raynixl.config import from_env
from raynixl.moe.routing import Routing, route
from raynixl.native import load as load_core
from raynixl.native.moe import BF16, F16, F32

if TYPE_CHECKING:
    import torch

Piece = tuple[slice, "torch.Tensor"]
Reduce = Callable[[Sequence[Piece], Routing, "torch.Tensor"], None]
"""Sums each token's rows into the last argument; the first says where all rows lie, piece by piece."""


class Exchange(Protocol):
    """A library's all-to-all. Tensors are two-dimensional, of bytes."""

    skips_own: bool
    """Whether a rank's rows for itself can be left out, as gaps: they need not be copied twice then."""

    def begin_equal(self, source: torch.Tensor, into: torch.Tensor) -> Callable[[], object]:
        """Begin to exchange one row with each rank; return what waits for the end."""

    def rows(self, source: torch.Tensor, sent: list[int], into: torch.Tensor, received: list[int]) -> None:
        """Exchange so many rows with each rank; with ourselves, unless it skips them."""


class PackedWay:
    """Dispatch and combine by an all-to-all."""

    def __init__(self, exchange: Exchange, load: Load, rank: int, reduce: Reduce, *, buffer: Buffer) -> None:
        self._exchange, self._load, self._rank, self._reduce, self._buffer = exchange, load, rank, reduce, buffer
        self._core, self._headers = load_core(from_env().native), Headers(load)
        self._holders, self._local = load.holders(), load.local_ids()
        self._held = len(load.held(rank))
        self._send = rows_of(load, load.most_sent)  # of a dispatch; in a combine the rows come back to it
        self._receive = rows_of(load, load.most_received)
        self._out = rows_of(load, load.tokens)
        self._routed: Routing | None = None
        self._counts: list[int] = []
        self._received: Received | None = None

    def variant(self, exchange: Exchange, reduce: Reduce) -> PackedWay:
        """Return one that exchanges or sums in another way, with the same buffers."""
        other = copy.copy(self)
        other._exchange, other._reduce = exchange, reduce
        return other

    def dispatch(self, tokens: Tokens) -> None:
        """Bring rows, ids and weights to the ranks that hold the experts."""
        import torch

        routed = self._routed = self._route(tokens)
        send = self._send[: len(routed.order)]
        order, own = torch.from_numpy(routed.order), self._own(routed)
        finish = self._exchange.begin_equal(*self._headers.fill(routed))
        for part in (slice(0, own.start), slice(own.stop, len(order))):
            torch.index_select(tokens.x, 0, order[part], out=send[part])
        finish()
        self._counts, ids, weights = self._headers.read()
        rows = self._receive[: len(ids)]
        torch.index_select(tokens.x, 0, order[own], out=rows[self._arrived(own)])
        self._exchange.rows(as_bytes(send), routed.counts.tolist(), as_bytes(rows), self._counts)
        self._received = Received(rows, ids, weights, torch.bincount(ids[ids >= 0], minlength=self._held))

    def received(self) -> Received:
        """Return what came."""
        assert self._received is not None
        return self._received

    def compute(self) -> int:
        """Let the experts work; return how many rows they got."""
        received = self.received()
        run_experts(self._load, self._rank, received, self._buffer.rows(len(received.x)))
        return len(received.x)

    def combine(self) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token."""
        routed, y = self._routed, self._buffer.rows(sum(self._counts))
        assert routed is not None
        back = self._send[: len(routed.order)]
        self._exchange.rows(as_bytes(y), self._counts, as_bytes(back), routed.counts.tolist())
        own, end = self._own(routed), len(back)
        pieces = [(part, back[part]) for part in (slice(0, own.start), slice(own.stop, end)) if part.start < part.stop]
        self._reduce([*pieces[:1], (own, y[self._arrived(own)]), *pieces[1:]], routed, self._out)
        return self._out

    def _own(self, routed: Routing) -> slice:
        """Return the rows for this rank itself that the exchange leaves out, in what is sent."""
        return routed.rows_of(self._rank) if self._exchange.skips_own else slice(0, 0)

    def _arrived(self, own: slice) -> slice:
        """Return where these rows are in what is received."""
        start = sum(self._counts[: self._rank])
        return slice(start, start + own.stop - own.start)

    def _route(self, tokens: Tokens) -> Routing:
        ids, weights = tokens.ids.numpy(), tokens.weights.numpy()
        ranks = self._load.ranks
        return route(self._core, ids, weights, holders=self._holders, local=self._local, ranks=ranks)


class Headers:
    """What each rank tells each other of the rows that come: how many, their ids, their weights."""

    def __init__(self, load: Load) -> None:
        shape = load.ranks, 1 + 2 * load.tokens * load.topk
        self._topk = load.topk
        self._out, self._into = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def fill(self, routed: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes to send, one row for each rank, and those to receive."""
        import torch

        weights = routed.row_weights
        assert weights is not None
        for rank, line in enumerate(self._out):
            rows, count = routed.rows_of(rank), int(routed.counts[rank])
            ids, their_weights = self._parts(line, count)
            line[0], ids[:], their_weights[:] = count, routed.row_ids[rows], weights[rows]
        return torch.from_numpy(self._out).view(torch.uint8), torch.from_numpy(self._into).view(torch.uint8)

    def read(self) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Return how many rows come from each rank, and all their ids and weights."""
        import torch

        counts: list[int] = self._into[:, 0].tolist()
        parts = [self._parts(line, count) for line, count in zip(self._into, counts, strict=True)]
        ids, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
        return counts, torch.from_numpy(ids), torch.from_numpy(weights)

    def _parts(self, line: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return where a line has the ids and the weights of so many rows."""
        ids = line[1 : 1 + count * self._topk]
        weights = line[1 + count * self._topk : 1 + 2 * count * self._topk]
        return ids.reshape(count, self._topk), weights.view(np.float32).reshape(count, self._topk)


class Sum:
    """Sums each token's rows in one pass, in float32, as ours does."""

    def __init__(self, load: Load) -> None:
        self._core, self._nbytes = load_core(from_env().native), load.row_nbytes
        self._code = {"bfloat16": BF16, "float16": F16, "float32": F32}[load.dtype]

    def __call__(self, pieces: Sequence[Piece], routed: Routing, out: torch.Tensor) -> None:
        at = np.empty(len(routed.order), np.uint64)
        for rows, tensor in pieces:
            at[rows] = tensor.data_ptr() + np.arange(len(tensor)) * self._nbytes
        self._core.reduce_rows(
            out.data_ptr(), self._nbytes, self._code, routed.starts, at[routed.positions], self._code, None,
            out.shape[1], np.empty(0, np.uint64), 0, 0, [],
        )  # fmt: skip


def sum_by_index_add(pieces: Sequence[Piece], routed: Routing, out: torch.Tensor) -> None:
    """Add each row to its token's, in the dtype of the rows: what is written most."""
    import torch

    out.zero_()
    for rows, tensor in pieces:
        out.index_add_(0, torch.from_numpy(routed.order[rows]), tensor)


class Buffer:
    """What the experts of a rank give: the same memory for all ways, which all send the same."""

    def __init__(self, load: Load) -> None:
        self._load, self._memory = load, rows_of(load, 0)

    def rows(self, count: int) -> torch.Tensor:
        """Return so many rows; what was in them stays unless there were fewer."""
        if len(self._memory) < count:
            self._memory = rows_of(self._load, count)
        return self._memory[:count]


def rows_of(load: Load, count: int) -> torch.Tensor:
    """Return touched memory for rows, in huge pages."""
    import torch

    memory = huge_memory(max(1, count) * load.row_nbytes)
    return torch.from_numpy(memory).view(load.torch_dtype).view(-1, load.hidden)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Return the bytes of rows."""
    import torch

    return rows.view(torch.uint8)

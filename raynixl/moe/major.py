"""Expert-major order: the pairs of a rank's rows put together by expert, each expert's padded to an alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError, RangeError
from raynixl.native import Native

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Major:
    """Where the pairs (row, k) of some rows lie in expert-major order: by expert, then row, then k."""

    counts: Int64s
    """How many pairs each expert has."""
    offsets: Int64s
    """Where each expert's begin, multiples of the alignment, and where the last one's padding ends."""
    rows: Int32s
    """The row of each place, -1 for padding."""
    slots_k: Int32s
    """The k of each place, -1 for padding."""
    positions: Int32s
    """The place of each pair, pairs in the order of (row, k)."""
    pairs: Int32s
    """The number row * topk + k of each pair, ascending."""

    @property
    def padded(self) -> int:
        """How many places there are, padding included."""
        return len(self.rows)

    def gather(self, source: NDArray[np.uint8], out: NDArray[np.uint8], native: Native) -> None:
        """Copy rows of bytes (rows, nbytes) to their places (padded, nbytes), and zeros to the padding."""
        nbytes = out.shape[1]
        assert out.flags.c_contiguous, "places lie end to end"
        assert len(out) == self.padded, "there is a row for each place"
        assert source.shape[1] == nbytes, "rows are as long as places"
        if nbytes and self.padded:
            assert source.strides[1] == 1 or nbytes == 1, "a row is in one piece"
            code = native.put_rows(
                source.ctypes.data, source.strides[0], nbytes, self.rows, out.ctypes.data, (), self.padded
            )
            assert code == 0, "there is no gate that could refuse"

    def weights(self, row_weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the weight of each place from those of the rows (rows, topk), 0 for padding."""
        out = np.zeros(self.padded, np.float32)
        out[self.positions] = row_weights.ravel().take(self.pairs)
        return out


def expert_major(row_ids: Int32s, experts: int, alignment: int = 1) -> Major:
    """Return the expert-major order of rows with these ids of local experts (rows, topk), -1 for none.

    Pure, and quick: rows that come in one order lie in that order, whoever works it out.

    Raises:
        RangeError: an id of no local expert.
        ConfigError: an alignment below 1.
    """
    if alignment < 1:
        raise ConfigError(f"alignment={alignment}", hint="give 1 or more rows")
    flat = row_ids.ravel()
    pairs = np.flatnonzero(flat >= 0).astype(np.int32)
    ids = flat.take(pairs)
    if len(ids) and ids.max() >= experts:
        raise RangeError(
            f"a row names the local expert {ids.max()} of {experts}", hint="ranks differ in what they call"
        )
    counts = np.bincount(ids, minlength=experts).astype(np.int64, copy=False)
    offsets = np.zeros(experts + 1, np.int64)
    np.cumsum(-(-counts // alignment) * alignment, out=offsets[1:])
    order = np.argsort(_narrow(ids, experts), kind="stable")
    places = np.arange(len(ids))
    places += np.repeat(offsets[:-1] - (np.cumsum(counts) - counts), counts)
    positions = np.empty(len(ids), np.int32)
    positions[order] = places
    sorted_pairs, topk = pairs.take(order), np.int32(max(1, row_ids.shape[1]))
    sorted_rows = sorted_pairs // topk
    rows, slots_k = np.full((2, int(offsets[-1])), -1, np.int32)
    rows[places] = sorted_rows
    slots_k[places] = sorted_pairs - sorted_rows * topk
    return Major(counts, offsets, rows, slots_k, positions, pairs)


def _narrow(ids: Int32s, experts: int) -> NDArray[Any]:
    """Return ids in as few bits as hold them: numpy sorts 8 and 16 bits by counting, several times as fast."""
    return ids.astype(np.uint8 if experts <= 1 << 8 else np.uint16 if experts <= 1 << 16 else np.int32)

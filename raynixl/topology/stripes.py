"""How the blocks of one transfer are cut over several rails; pure, numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raynixl.blocks import as_unsigned
from raynixl.errors import ConfigError, RangeError


@dataclass(frozen=True, slots=True)
class Stripes:
    """Pieces of blocks: row i is bytes [offset[i], offset[i] + nbytes[i]) of block[i], and goes over rail[i].

    In the order of the blocks; no row is empty, no byte is missing or twice.
    """

    block: NDArray[np.int64]
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]
    rail: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.nbytes)


def stripe(nbytes: ArrayLike, rails: int, *, min_nbytes: int, align: int, first: int = 0) -> Stripes:
    """Cut blocks of these lengths over `rails`: one run of neighbouring bytes for each rail.

    Runs differ by at most 2 * `align`, since cuts inside a block are made at multiples of it. A rail is used only if
    its run is about `min_nbytes` long: small transfers stay on one, the `first` (callers rotate it, so that small
    transfers spread). There are at most `rails` - 1 rows more than blocks.

    Raises:
        RangeError: the lengths are no unsigned integers, or sum up to 2^63 or more.
        ConfigError: `rails`, `min_nbytes` or `align` is less than 1.
    """
    lengths = as_unsigned(nbytes, "lengths")
    if min(rails, min_nbytes, align) < 1:
        raise ConfigError(f"{rails} rails, at least {min_nbytes} bytes each, cut at multiples of {align}: all are >= 1")
    total = _total(lengths)
    used = max(1, min(rails, total // max(min_nbytes, align)))
    block = np.flatnonzero(lengths)
    sizes = lengths[block]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    cuts = _cuts(starts, ends, np.array([total * i // used for i in range(1, used)], np.uint64), align)
    cut_block = np.searchsorted(ends, cuts)
    is_inside = ends[cut_block] != cuts
    inside, cut_block = cuts[is_inside], cut_block[is_inside]
    rows = np.insert(np.arange(len(block)), cut_block + 1, cut_block)  # blocks again, those with a cut more than once
    pieces = np.insert(starts, cut_block + 1, inside)
    rail = np.zeros(len(rows), np.int64)
    rail[np.searchsorted(pieces, cuts)] = 1
    pieces_nbytes = np.diff(pieces, append=np.uint64(total))
    return Stripes(block[rows], pieces - starts[rows], pieces_nbytes, (np.cumsum(rail) + first) % rails)


def _cuts(
    starts: NDArray[np.uint64], ends: NDArray[np.uint64], at: NDArray[np.uint64], align: int
) -> NDArray[np.uint64]:
    """Move cuts of the stream of all blocks to the nearest multiple of `align` within their block, or to its end.

    They are at least `align` apart before, so no two meet.
    """
    if not len(at):
        return at
    block = np.searchsorted(ends, at, side="right")
    step = np.uint64(align)
    into = (at - starts[block] + step // np.uint64(2)) // step * step
    moved: NDArray[np.uint64] = np.minimum(starts[block] + into, ends[block])
    return moved


def _total(lengths: NDArray[np.uint64]) -> int:
    """Add lengths up.

    Raises:
        RangeError: 2^63 bytes or more.
    """
    most = int(lengths.max()) if len(lengths) else 0
    if most * len(lengths) >= 1 << 63 and sum(lengths.tolist()) >= 1 << 63:
        raise RangeError("the blocks have 2^63 bytes or more", hint="split the transfer")
    return int(lengths.sum())

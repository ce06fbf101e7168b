"""Programs of one-sided reads and writes over UCX in ctypes: rows, checked and cut once, and run many times."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from raynixl.native import twin_ucp as ucp
from raynixl.native.codes import CLOSED, LOST
from raynixl.native.twin_endpoint import RemoteKey
from raynixl.native.twin_job import Gate, deadline_after
from raynixl.native.twin_rma_job import RmaJob
from raynixl.native.twin_ucx import Mapping

__all__ = ["Rma", "rma"]

_PIECE = 8 << 20  # what one operation moves at most, so that a cancel waits for little
_SMALL_PIECE = 8 << 10  # and at least, where an endpoint bounds what may be read at a time, unless to less than this,
_LEAST_PIECE = 1 << 10  # and at least then
_SHARES = 8  # so many programs may read over such an endpoint at once
_WINDOW_NBYTES = 64 << 20
_WINDOW_ROWS = 2048  # operations that UCX has at a time: each costs it some 500 bytes

Rows = npt.NDArray[np.uint64]
Path = tuple[Mapping, RemoteKey]


class Rma:
    """A list of one-sided operations, checked and cut once and run many times."""

    def __init__(self, is_write: bool, paths: Sequence[Path], rows: Rows, gates: Sequence[Gate], inline: int) -> None:
        self.is_write: Final = is_write
        self.count: Final = len(rows)
        self.nbytes: Final = int(rows[:, 3].sum())
        self.inline_nbytes: Final = inline
        self.paths: Final = tuple(paths)
        self.endpoints: Final = tuple(dict.fromkeys(key.endpoint for _, key in paths))
        self.rails: Final = tuple(dict.fromkeys(endpoint.rail for endpoint in self.endpoints))
        limit = min((one.read_limit for one in self.endpoints if one.read_limit and not is_write), default=0)
        small = max(min(_SMALL_PIECE, limit), _LEAST_PIECE)  # what is read at a time comes in one message
        piece = max(small, limit // _SHARES // 2) if limit else _PIECE
        cut = _cut(rows, piece)
        self.rows: Final = _in_turn(cut) if limit and len(paths) > 1 else cut
        self.done_nbytes: Final = np.cumsum(self.rows[:, 3])
        self.params: Final = [_param(mapping, is_single=len(self.rows) == 1) for mapping, _ in paths]
        self.flush: Final = ucp.RequestParam()
        ring = ctypes.cast(self.rails[0].on_completed, ctypes.c_void_p)
        self.ringing_flush: Final = ucp.RequestParam(op_attr_mask=ucp.FIELD_CALLBACK, send=ring)
        window = min(max(_WINDOW_NBYTES // (self.nbytes // len(self.rows) + 1), 4), _WINDOW_ROWS)
        # Two batches are under way at a time.
        self.batch: Final = max(1, limit // _SHARES // 2 // int(self.rows[:, 3].max())) if limit else window // 2
        self._gates = tuple(gates)

    @property
    def is_usable(self) -> bool:
        """Whether all its rails are open, and this is the process that made them."""
        return all(rail.is_usable for rail in self.rails)

    def run(self, timeout: float, out_of_line: bool = False) -> int | RmaJob:
        """Enter all gates and post; the code if it is over at once, else a job."""
        job = RmaJob(self, deadline_after(timeout))
        keeper = self.rails[0]
        if not self.is_usable:
            return CLOSED
        if any(endpoint.code for endpoint in self.endpoints):
            return LOST
        keeper.enlist(job)
        refused = self._enter() if self.is_usable else CLOSED  # closing waits for the jobs that it sees
        if refused:
            keeper.retire(job)
            return refused
        job.start(self.nbytes <= self.inline_nbytes and not out_of_line)
        # The rail's thread may be about to say with what it ends: then it is a job like others.
        return job.code if job.settled and not out_of_line else job

    def leave(self) -> None:
        """Leave all gates."""
        for gate in self._gates:
            gate.leave()

    def closed(self) -> int:
        """Return the code of the first gate whose closing stops those inside, else 0."""
        return next((gate.aborted for gate in self._gates if gate.aborted), 0)

    def _enter(self) -> int:
        for i, gate in enumerate(self._gates):
            if refused := gate.enter():
                for entered in self._gates[:i]:
                    entered.leave()
                return refused
        return 0


def rma(is_write: bool, paths: Sequence[tuple[Any, Any]], rows: Rows, gates: Sequence[Any], inline_nbytes: int) -> Rma:
    """Compile rows of (path, our address, the peer's address, nbytes) into a program."""
    pairs: list[Any] = [tuple(path) for path in paths]
    _check_types(pairs, rows, gates)
    if len(rows) == 0 or not pairs:
        raise ValueError("a program needs at least one segment")
    if (rows[:, 0] >= len(pairs)).any():
        raise ValueError("a segment without a path")
    if not rows[:, 3].all():
        raise ValueError("a segment of 0 bytes")
    for side, column in enumerate(("our", "the peer's")):
        places = np.array([(pair[side].address, pair[side].nbytes) for pair in pairs], dtype=np.uint64)
        if not _are_inside(rows[:, side + 1], rows[:, 3], places[rows[:, 0].astype(np.intp)]):
            raise ValueError(f"a segment outside {column} memory")
    return Rma(is_write, pairs, rows.copy(), gates, inline_nbytes)


def _check_types(pairs: Sequence[Any], rows: Any, gates: Sequence[Any]) -> None:
    shaped = isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] == 4
    if not (shaped and rows.dtype == np.uint64 and rows.flags.c_contiguous):
        raise TypeError("rows must be a C-contiguous (N, 4) array of uint64")
    for pair in pairs:
        if len(pair) != 2 or not (isinstance(pair[0], Mapping) and isinstance(pair[1], RemoteKey)):
            raise TypeError("a path is a mapping and a remote key of this core")
    if not all(isinstance(gate, Gate) for gate in gates):
        raise TypeError("gates must be gates of this core")


def _are_inside(starts: Rows, lengths: Rows, places: Rows) -> bool:
    """Whether each range lies in its (address, nbytes); nothing here can wrap round where it counts."""
    fits = (starts >= places[:, 0]) & (lengths <= places[:, 1])
    return bool((fits & (starts - places[:, 0] <= places[:, 1] - lengths)).all())


def _cut(rows: Rows, piece: int) -> Rows:
    """Split rows larger than a piece."""
    lengths = rows[:, 3]
    parts = ((lengths - np.uint64(1)) // np.uint64(piece) + np.uint64(1)).astype(np.int64)
    if int(parts.max()) == 1:
        return rows
    row = np.repeat(np.arange(len(rows)), parts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    offset = nth.astype(np.uint64) * np.uint64(piece)
    cut = rows[row]
    cut[:, 1:3] += offset[:, None]
    cut[:, 3] = np.minimum(cut[:, 3] - offset, np.uint64(piece))
    return cut


def _in_turn(rows: Rows) -> Rows:
    """Order rows so that they take the paths in turn: where each lets little pass at a time, none waits for another."""
    nth = np.empty(len(rows), np.int64)
    for path in np.unique(rows[:, 0]):
        of_path = np.flatnonzero(rows[:, 0] == path)
        nth[of_path] = np.arange(len(of_path))
    return np.ascontiguousarray(rows[np.lexsort((rows[:, 0], nth))])


def _param(mapping: Mapping, *, is_single: bool) -> ucp.RequestParam:
    mask = ucp.FIELD_MEMH | ucp.FIELD_MEMORY_TYPE | (0 if is_single else ucp.MULTI_SEND)
    return ucp.RequestParam(op_attr_mask=mask, memory_type=mapping.memory_type, memh=mapping.memh)

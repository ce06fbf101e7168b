"""Transit: small tables on their way to a GPU's memory, through pinned memory, on a stream of their own."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.nvlink_slabs import Piece, Slabs
from raynixl.errors import TransferTimeout

_LOOK_SECONDS, _PAUSE_SHARE, _MOST_PAUSE = 100e-6, 1 / 16, 2e-3
_CLOSE_SECONDS = 5.0


class Arrival:
    """Memory of the GPU that is being filled. Streams follow it until it is known to be there."""

    __slots__ = ("__weakref__", "_back", "_device", "_event", "_pinned", "piece")

    def __init__(self, transit: Transit, piece: Piece, pinned: Piece | None, event: int) -> None:
        self.piece = piece
        self._device = transit.device
        self._pinned = pinned
        self._event = event
        self._back = weakref.finalize(self, transit.events.append, event)  # also of one that is dropped on its way
        self._back.atexit = False

    def precede(self, stream: int) -> bool:
        """Return whether it is there; if not, what is put on the stream from now on waits. One thread at a time."""
        if self.is_there():
            return True
        with cuda.on(self._device):
            cuda.stream_wait_event(stream, self._event)
        return False

    def is_there(self) -> bool:
        """Whether it is there."""
        if self._event:
            with cuda.on(self._device):
                if not cuda.event_query(self._event):
                    return False
            self._event, self._pinned = 0, None
            self._back()
        return True


class Transit:
    """One stream, in order: memory that is filled anew is filled after what was on its way there before."""

    def __init__(self, device: int, tables: Slabs, pinned: Slabs) -> None:
        self.device = device
        self._tables = tables
        self._pinned = pinned
        self.events: deque[int] = deque()
        """Those that nobody uses; appending and popping need no lock."""
        self._made: list[int] = []
        with cuda.on(device):
            self._stream = cuda.stream_create(is_urgent=True)

    def upload(self, table: npt.NDArray[np.uint64]) -> Arrival:
        """Copy a table to the GPU's memory; nobody waits for that here.

        Raises:
            RangeError: the GPU has no memory for it.
        """
        flat = np.ascontiguousarray(table).view(np.uint8).reshape(-1)
        nbytes = max(1, len(flat))
        piece, pinned = self._tables.take(nbytes), self._pinned.take(nbytes)
        np.frombuffer(cuda.host_bytes(pinned.address, len(flat)), np.uint8)[:] = flat
        with cuda.on(self.device):
            cuda.memcpy_h2d_async(piece.address, pinned.address, len(flat), self._stream)
            return Arrival(self, piece, pinned, self._mark())

    def zero(self, piece: Piece) -> Arrival:
        """Fill memory of the GPU with zeros; nobody waits for that here."""
        with cuda.on(self.device):
            cuda.memset_async(piece.address, 0, piece.nbytes, self._stream)
            return Arrival(self, piece, None, self._mark())

    def close(self) -> None:
        """Give everything back.

        Raises:
            TransferTimeout: something is still on its way.
        """
        with cuda.on(self.device):
            wait_until(lambda: cuda.stream_query(self._stream), _CLOSE_SECONDS, self.device)
            for event in self._made:
                cuda.event_destroy(event)
            cuda.stream_destroy(self._stream)

    def _mark(self) -> int:
        try:
            event = self.events.pop()
        except IndexError:
            event = cuda.event_create()
            self._made.append(event)
        cuda.event_record(event, self._stream)
        return event


def wait_until(is_so: Callable[[], bool], timeout: float, device: int) -> None:
    """Wait for a GPU by looking ever more seldom.

    Raises:
        TransferTimeout: it is not through in time.
    """
    began = time.monotonic()
    while not is_so():
        waited = time.monotonic() - began
        if waited > timeout:
            raise TransferTimeout(f"GPU {device} was not through after {timeout:g} s", hint="see nvidia-smi")
        if waited > _LOOK_SECONDS:
            time.sleep(min(_MOST_PAUSE, waited * _PAUSE_SHARE))

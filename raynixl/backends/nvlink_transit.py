"""Transit: small tables on their way to a GPU's memory and back, through a pinned buffer, on a stream of their own."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

from raynixl import cuda
from raynixl.backends.nvlink_slabs import Piece, Slabs
from raynixl.errors import TransferTimeout

_STAGING_NBYTES = 1 << 20
_UPLOAD_SECONDS = 30.0
_LOOK_SECONDS, _PAUSE_SHARE, _MOST_PAUSE = 100e-6, 1 / 16, 2e-3

Bytes = npt.NDArray[np.uint8]


class Transit:
    """One at a time; whoever brings something waits until it is there, some 20 us. Never behind a program."""

    def __init__(self, device: int, tables: Slabs, pinned: Slabs) -> None:
        self._device = device
        self._tables = tables
        self._lock = threading.Lock()  # protects all below; held while the GPU copies
        self._staging = pinned.take(_STAGING_NBYTES)
        self._view: Bytes = np.frombuffer(cuda.host_bytes(self._staging.address, _STAGING_NBYTES), np.uint8)
        self._late: Piece | None = None  # what the GPU may still write to
        with cuda.on(device):
            self._stream = cuda.stream_create(is_urgent=True)
            self._event = cuda.event_create()
            cuda.event_record(self._event, self._stream)

    def upload(self, table: npt.NDArray[np.uint64]) -> Piece:
        """Return a copy of a table in the GPU's memory, which has arrived there.

        Raises:
            RangeError: the GPU has no memory for it.
            TransferTimeout: the GPU does not take it.
        """
        flat = np.ascontiguousarray(table).view(np.uint8).reshape(-1)
        piece = self._tables.take(max(1, len(flat)))
        with self._lock, cuda.on(self._device):
            self._settle(_UPLOAD_SECONDS)
            self._late = piece
            for at in range(0, len(flat), _STAGING_NBYTES):
                part = flat[at : at + _STAGING_NBYTES]
                self._view[: len(part)] = part
                cuda.memcpy_h2d_async(piece.address + at, self._staging.address, len(part), self._stream)
                self._settle_now(_UPLOAD_SECONDS)
            self._late = None
        return piece

    def download(self, address: int, into: npt.NDArray[np.uint64], timeout: float) -> None:
        """Copy from the GPU's memory, where nobody writes any more.

        Raises:
            TransferTimeout: the GPU does not bring it.
        """
        flat = into.view(np.uint8).reshape(-1)
        with self._lock, cuda.on(self._device):
            self._settle(timeout)
            for at in range(0, len(flat), _STAGING_NBYTES):
                part = flat[at : at + _STAGING_NBYTES]
                cuda.memcpy_d2h_async(self._staging.address, address + at, len(part), self._stream)
                self._settle_now(timeout)
                part[:] = self._view[: len(part)]

    def zero(self, piece: Piece) -> None:
        """Fill memory of the GPU with zeros.

        Raises:
            TransferTimeout: the GPU does not do it.
        """
        with self._lock, cuda.on(self._device):
            cuda.memset_async(piece.address, 0, piece.nbytes, self._stream)
            self._settle_now(_UPLOAD_SECONDS)

    def close(self) -> None:
        """Give everything back; nothing is on its way."""
        cuda.event_destroy(self._event)
        cuda.stream_destroy(self._stream)
        self._staging.close()

    def _settle_now(self, timeout: float) -> None:
        cuda.event_record(self._event, self._stream)
        self._settle(timeout)

    def _settle(self, timeout: float) -> None:
        """Wait until the GPU is through; after one that was late, until then nothing else is put into the buffer."""
        wait_for_event(self._event, timeout, self._device)
        self._late = None


def wait_for_event(event: int, timeout: float, device: int) -> None:
    """Wait for an event, in the GPU's context, by looking at it ever more seldom.

    Raises:
        TransferTimeout: it does not come.
    """
    began = time.monotonic()
    while not cuda.event_query(event):
        waited = time.monotonic() - began
        if waited > timeout:
            raise TransferTimeout(f"GPU {device} was not through after {timeout:g} s", hint="see nvidia-smi")
        if waited > _LOOK_SECONDS:
            time.sleep(min(_MOST_PAUSE, waited * _PAUSE_SHARE))

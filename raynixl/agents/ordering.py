"""Ordering: transfers that follow what is on a stream of CUDA, and streams that follow a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raynixl import cuda
from raynixl.backends.base import can_be_followed
from raynixl.errors import BackendUnavailable, ConfigError, RaynixlError

if TYPE_CHECKING:
    from raynixl.agents.transfer import Transfer
    from raynixl.native import Job

_SPECIAL = (0, 1, 2)  # the default streams, which are never captured
_SHORTEST, _LONGEST = 20e-6, 1e-3  # pauses between two looks at an event


def handle_of(stream: Any, device: int) -> int:
    """Return the handle of a stream that transfers can be ordered with; `device` is meant by the default streams.

    Raises:
        ConfigError: that is no stream, or one that is being captured into a graph.
    """
    handle = cuda.stream_handle(stream)
    if not cuda.has_driver():
        raise ConfigError("streams need the NVIDIA driver, which is not here", hint="leave stream= away")
    with cuda.on(device):
        if handle not in _SPECIAL and cuda.stream_is_capturing(handle):
            raise ConfigError(
                "the stream is being captured into a CUDA graph", hint="use prepared.capture(stream), or order it later"
            )
    return handle


def order(jobs: Sequence[Job], stream: int) -> bool:
    """Have a stream wait for jobs that a GPU runs; False if others are among them, which the host must wait for."""
    on_gpu = [job for job in jobs if can_be_followed(job)]
    for job in on_gpu:
        job.order(stream)
    return len(on_gpu) == len(jobs)


def follow(transfer: Transfer, start: Callable[[], None]) -> None:
    """Start a transfer over a backend that knows no streams once its event has come; returns at once."""
    thread = threading.Thread(target=_follow, args=(transfer, start), name="raynixl-follow", daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:  # the process may have no more threads
        error = BackendUnavailable(f"{transfer!r} got no thread: {exc}", hint="raise the limit of threads (ulimit -u)")
        transfer.failed(error)


def _follow(transfer: Transfer, start: Callable[[], None]) -> None:
    event, pause = transfer.after, _SHORTEST
    try:
        while event is not None and not event.query():
            if transfer.done:  # its deadline has passed, or it was cancelled
                return
            time.sleep(pause)
            pause = min(_LONGEST, 2 * pause)
        if transfer.starts():
            start()
    except RaynixlError as exc:
        transfer.failed(exc)
    except Exception as exc:  # noqa: BLE001 - thread edge: the one who waits gets whatever it was
        error = ConfigError(f"{transfer!r} failed: {exc!r}", hint="please report this", peer=transfer.peer)
        error.__cause__ = exc
        transfer.failed(error)

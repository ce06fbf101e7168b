"""Ordering: transfers that follow what is on a stream of CUDA, and streams that follow a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raynixl import cuda
from raynixl.backends.base import can_be_followed
from raynixl.errors import BackendUnavailable, ConfigError, RaynixlError

if TYPE_CHECKING:
    from raynixl.agents.transfer import Transfer
    from raynixl.native import Job

_LEGACY = (0, 1)  # the default streams that are never captured; asking fails while others are, which they wait for
_SHORTEST, _LONGEST = 20e-6, 1e-3  # pauses between two looks at an event


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of CUDA by its handle, and the GPU that is meant: each has default streams under the same handles."""

    handle: int
    device: int


def stream_of(stream: Any, gpu: int | None) -> Stream:
    """Return a stream that transfers can be ordered with; `gpu` is meant by the default streams that name no other.

    Raises:
        ConfigError: that is no stream, or one that is being captured into a graph.
    """
    handle, device = cuda.stream_handle(stream), cuda.stream_device(stream)
    if not cuda.has_driver():
        raise ConfigError("streams need the NVIDIA driver, which is not here", hint="leave stream= away")
    if device is None:
        device = cuda.device_here() if gpu is None else gpu
    with cuda.on(device):
        if handle not in _LEGACY and cuda.stream_is_capturing(handle):
            raise ConfigError(
                "the stream is being captured into a CUDA graph", hint="use prepared.capture(stream), or order it later"
            )
    return Stream(handle, device)


def order(jobs: Sequence[Job], stream: Stream) -> bool:
    """Have a stream wait for jobs that a GPU runs; False if others are among them, which the host must wait for."""
    on_gpu = [job for job in jobs if can_be_followed(job)]
    for job in on_gpu:
        job.order(stream.handle, stream.device)
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

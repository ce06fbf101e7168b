"""Past: what was put on streams of GPUs, waited for before peers have the memory: they know nothing of streams."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from raynixl import cuda
from raynixl.agents.ordering import stream_of
from raynixl.errors import TransferTimeout

_SHORTEST, _LONGEST = 20e-6, 1e-3  # pauses between two looks


class Past:
    """What is on streams of some GPUs now: on `stream`, or several in a list, else on this thread's current ones.

    Raises:
        ConfigError: that is no stream, or one that is being captured into a graph.
    """

    def __init__(self, gpus: Iterable[int], stream: Any = None) -> None:
        named = stream if isinstance(stream, list) else [stream]
        meant = [
            stream_of(one, gpu) for gpu in sorted(gpus) for one in (current_streams(gpu) if stream is None else named)
        ]
        self._events = [cuda.record(one.handle, one.device) for one in dict.fromkeys(meant)]

    def wait(self, seconds: float) -> None:
        """Wait until it is through, for nothing else, and without the interpreter's lock between two looks.

        Raises:
            TransferTimeout: it is not, within `seconds`.
        """
        end = time.monotonic() + seconds
        try:
            for event in self._events:
                pause = _SHORTEST
                while not event.query():
                    if time.monotonic() >= end:
                        raise TransferTimeout(
                            f"what was put on GPU {event.device} before is not through after {seconds:g} s",
                            hint="see what the GPU does (nvidia-smi), or give it longer",
                        )
                    time.sleep(pause)
                    pause = min(_LONGEST, 2 * pause)
        finally:
            while self._events:
                self._events.pop().close()


def streams_of(gpus: Iterable[int]) -> list[int]:
    """Return this thread's current streams of some GPUs, for a thread that works in its place."""
    return list(dict.fromkeys(stream for gpu in sorted(gpus) for stream in current_streams(gpu)))


def current_streams(gpu: int) -> list[int]:
    """Return this thread's current streams of a GPU, each once: torch's and cupy's, where these are in use.

    Neither is imported: who has not done so has put nothing on a GPU by it. Tests put something else here.
    """
    torch, cupy = (getattr(sys.modules.get(name), "cuda", None) for name in ("torch", "cupy"))
    found = []
    if torch is not None and torch.is_initialized():
        found.append(int(torch.current_stream(gpu).cuda_stream))
    if cupy is not None:
        found.append(int(cupy.get_current_stream(gpu).ptr))
    return list(dict.fromkeys(found))

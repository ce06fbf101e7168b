"""Streams: keeps our work on a GPU apart from that of the trainers and engines whose tensors it touches.

Nothing here waits for a whole device. What others have put on their streams is known from read sections and updates,
each of which notes at its end what its thread has put on its current stream; besides, the stream that was current when
weights were published or subscribed to counts, and the default stream.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from raynixl import cuda
from raynixl.errors import TransferTimeout
from raynixl.weights.space import Space, gpus_of, space_of

if TYPE_CHECKING:
    import torch

_SPINS = 200  # looks without a pause: what is short is over by then
_PAUSE_SECONDS = 50e-6
_HUNG_SECONDS = 60.0
"""How long what we have put on a GPU may take: 100 GB are moved within it in 1 s."""


class Moment(Protocol):
    """All that was put on a stream until now."""

    def query(self) -> bool:
        """Whether it is through."""


class Gpu(Protocol):
    """What is asked of one GPU. Tests without one put something else in its place."""

    def ours(self) -> AbstractContextManager[Any]:
        """Put what this thread does meanwhile on our own stream."""

    def now(self) -> tuple[int, Moment] | None:
        """Return what was put on this thread's current stream, and the stream's number; None while it is captured."""

    def default(self) -> Moment:
        """Return what was put on the default stream."""

    def home(self) -> Callable[[], Moment]:
        """Return what tells, later, what was put on the stream that is this thread's current one now."""


class TorchMoment:
    """An event of torch's."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def query(self) -> bool:
        """See `Moment`."""
        with cuda.relaxed():
            return bool(self._event.query())  # type: ignore[no-untyped-call]


class TorchGpu:
    """A GPU as torch knows it."""

    def __init__(self, number: int) -> None:
        import torch

        self._torch = torch
        self._number = number
        self._ours = torch.cuda.Stream(number, priority=-1)  # type: ignore[no-untyped-call]

    @contextmanager
    def ours(self) -> Iterator[None]:
        """See `Gpu`. What is done meanwhile breaks no graph that another thread captures."""
        with cuda.relaxed(), self._torch.cuda.stream(self._ours):
            yield

    def now(self) -> tuple[int, Moment] | None:
        """See `Gpu`."""
        stream = self._torch.cuda.current_stream(self._number)
        with self._torch.cuda.device(self._number):
            if self._torch.cuda.is_current_stream_capturing():
                return None
        return stream.cuda_stream, self._past(stream)

    def default(self) -> Moment:
        """See `Gpu`."""
        return self._past(self._torch.cuda.default_stream(self._number))

    def home(self) -> Callable[[], Moment]:
        """See `Gpu`."""
        stream = self._torch.cuda.current_stream(self._number)
        return lambda: self._past(stream)

    def _past(self, stream: torch.cuda.Stream) -> Moment:
        return TorchMoment(stream.record_event())


@cache
def _torch_gpu(number: int) -> Gpu:
    return TorchGpu(number)


def gpu(space: Space) -> Gpu:
    """Return the GPU of a space; each has one stream of ours in a process. Tests put something else here."""
    return _torch_gpu(space.number)


def ours(space: Space) -> AbstractContextManager[Any]:
    """Put work on our own stream of a GPU; it is waited for by who puts it there."""
    return gpu(space).ours()


@contextmanager
def on_ours(spaces: Iterable[Space]) -> Iterator[None]:
    """Put work on our own streams of these GPUs, and wait at the end until it is through, also after an error.

    Raises:
        TransferTimeout: a GPU hangs.
    """
    gpus = [space for space in spaces if space.is_gpu]
    if not gpus:
        yield
        return
    with ExitStack() as stack:
        for space in gpus:
            stack.enter_context(gpu(space).ours())
        try:
            yield
        finally:
            _finish(gpus)


class Streams:
    """The streams of others on which tensors are used."""

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._tensors = tensors
        self._homes = {space: gpu(space).home() for space in self._spaces()}
        self._noted: dict[tuple[Space, int], Moment] = {}

    def __repr__(self) -> str:
        return f"Streams({sorted(space.name for space in self._homes)}, {len(self._noted)} noted)"

    def note(self) -> None:
        """Note what this thread has put on its current streams: who has the tensors alone next waits for it."""
        for first in itertools.islice(self._tensors(), 1):  # a model that was moved here is moved as a whole
            self._meet({space_of(first)})
        for space in list(self._homes):
            now = gpu(space).now()
            if now is not None:
                self._noted[space, now[0]] = now[1]

    @contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """Work on the tensors when what others did with them is through, and be through when they may go on.

        This thread's own streams stay as they are, also for an engine's loader that is called inside.

        Raises:
            TransferTimeout: what others did takes longer than `seconds`; nothing was begun. Or a GPU hangs.
        """
        spaces = self._spaces()
        self._meet(spaces)
        past = [gpu(space).default() for space in list(self._homes)]
        past += [home() for home in list(self._homes.values())]
        noted = dict(self._noted)
        _wait([*past, *noted.values()], seconds, "what others do with the weights on a GPU is not over after {:g} s")
        for key, moment in noted.items():
            if self._noted.get(key) is moment:
                self._noted.pop(key, None)
        try:
            yield
        finally:
            _finish(spaces)

    def _meet(self, spaces: Iterable[Space]) -> None:
        """Know GPUs that the model has come to since."""
        for space in spaces:
            if space.is_gpu and space not in self._homes:
                self._homes[space] = gpu(space).home()

    def _spaces(self) -> set[Space]:
        return gpus_of(self._tensors())


def _finish(gpus: Iterable[Space]) -> None:
    """Wait for what this thread has put on its current streams."""
    ends = [now[1] for now in (gpu(space).now() for space in gpus) if now is not None]
    _wait(ends, _HUNG_SECONDS, "what was put on a GPU is not through after {:g} s: it hangs")


def _wait(moments: Iterable[Moment], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    for moment in moments:
        looks = 0
        while not moment.query():
            if time.monotonic() >= end:
                raise TransferTimeout(what.format(seconds), hint="see what the GPU does (nvidia-smi)")
            looks += 1
            if looks > _SPINS:
                time.sleep(_PAUSE_SECONDS)

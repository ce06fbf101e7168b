"""Streams: where the operations of a DeepEP buffer go, and the events that order them with what else is on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from raynixl.compat.deep_ep.events import EventHandle, EventOverlap, wait_for
from raynixl.moe import cuda_device

T = TypeVar("T")


class Streams:
    """The streams of a buffer: on a GPU operations go on the caller's, asynchronous ones on one beside it.

    In memory of the host there is none: an operation is through when it returns.
    """

    def __init__(self) -> None:
        self._beside: dict[int, Any] = {}

    def beside(self, number: int | None) -> Any:
        """Return the stream, as torch has it, that asynchronous operations on a GPU go on; for the host one of its."""
        if number is None:
            return torch.cpu.Stream()
        if number not in self._beside:
            self._beside[number] = cuda_device.gpu(number).another()
        return self._beside[number]

    def finish(self, number: int) -> None:
        """Wait for what is on the caller's stream of a GPU, and on the one beside it."""
        gpu = cuda_device.gpu(number)
        gpu.finish()
        if number in self._beside:
            with gpu.on(self._beside[number]):
                gpu.finish()

    def put(
        self, number: int | None, operation: Callable[[], T], *, uses: Any, after: EventOverlap | EventHandle | None,
        is_async: bool,
    ) -> tuple[T, EventOverlap]:  # fmt: skip
        """Carry out an operation behind an event; return what it returns, and the event behind it if it is to have one.

        Without an event to come after, it comes after all that is on the caller's stream. `uses` has what it reads.
        """
        if number is None or not is_async:
            wait_for(after)
            result = operation()
            return result, EventOverlap(EventHandle(gpu=number)) if is_async else EventOverlap()
        gpu = cuda_device.gpu(number)
        event = after.event if isinstance(after, EventOverlap) else after
        begin = gpu.mark() if event is None else event.current_stream_wait
        with gpu.on(self.beside(number)):
            begin()
            gpu.use(tensors_of(uses, number))
            result = operation()
            end = EventOverlap(EventHandle(gpu=number))
        gpu.use(tensors_of(result, number))
        return result, end


def tensors_of(value: Any, number: int) -> Iterator[Tensor]:
    """Return the tensors on a GPU among what may be nested in tuples, lists, and handles."""
    value = getattr(value, "tensors", value)
    if isinstance(value, tuple | list):
        for one in value:
            yield from tensors_of(one, number)
    elif cuda_device.gpu_of(value) == number:
        yield value

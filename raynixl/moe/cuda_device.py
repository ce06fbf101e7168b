"""Devices: what expert parallelism asks of torch about a GPU. Tests without one put something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Gpu(Protocol):
    """One GPU, as the thread that calls works with it."""

    number: int

    def stream(self) -> int:
        """Return CUDA's handle of this thread's current stream."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return fresh memory, used on the current stream."""

    def use(self, tensors: Iterable[Tensor | None]) -> None:
        """Have tensors that were made on another stream not be given again before this one is through with them."""

    def put(self, array: Any) -> Tensor:
        """Return a copy of a small array of the host's; this thread waits for it."""

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a copy in memory of the host; this thread waits for it."""

    def fetch_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of them in memory of the host; this thread waits once, for all."""

    def bring(self, tensor: Tensor) -> Tensor:
        """Return a copy of what is in memory of the host, which may be changed from now on."""

    def finish(self) -> None:
        """Wait for what is on the current stream: for benchmarks and tests."""

    def mark(self) -> Callable[[], None]:
        """Return what has another stream, the current one then, come after what is on the current one now."""

    def here(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return what makes the stream that is current now that of another thread, meanwhile."""

    def another(self) -> Any:
        """Return a stream of its own, as torch has it."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make such a stream the current one of this thread, meanwhile."""


class TorchGpu:
    """A GPU as torch knows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._device = torch.device("cuda", number)

    def stream(self) -> int:
        """See `Gpu`."""
        return int(torch.cuda.current_stream(self.number).cuda_stream)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Gpu`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def use(self, tensors: Iterable[Tensor | None]) -> None:
        """See `Gpu`."""
        stream = torch.cuda.current_stream(self.number)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)

    def put(self, array: Any) -> Tensor:
        """See `Gpu`."""
        return torch.from_numpy(array.copy()).to(self._device)

    def fetch(self, tensor: Tensor) -> Tensor:
        """See `Gpu`."""
        return self.fetch_all([tensor])[0]

    def fetch_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Gpu`. Into pinned memory, which torch keeps for the next time: what is not pinned costs a copy more."""
        found = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
        for host, one in zip(found, tensors, strict=True):
            host.copy_(one.detach(), non_blocking=True)
        self.finish()
        return found

    def bring(self, tensor: Tensor) -> Tensor:
        """See `Gpu`."""
        return tensor.to(self._device)

    def finish(self) -> None:
        """See `Gpu`."""
        torch.cuda.current_stream(self.number).synchronize()

    def mark(self) -> Callable[[], None]:
        """See `Gpu`."""
        event = torch.cuda.current_stream(self.number).record_event()
        return lambda: torch.cuda.current_stream(self.number).wait_event(event)

    def here(self) -> Callable[[], AbstractContextManager[Any]]:
        """See `Gpu`."""
        stream = torch.cuda.current_stream(self.number)
        return lambda: torch.cuda.stream(stream)

    def another(self) -> Any:
        """See `Gpu`."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See `Gpu`."""
        return torch.cuda.stream(stream)


def gpu_of(tensor: Any) -> int | None:
    """Return the number of the GPU that a tensor is on; None for the host, and for what is no tensor."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
        return None
    return tensor.device.index or 0


@cache
def _torch_gpu(number: int) -> Gpu:
    return TorchGpu(number)


def gpu(number: int) -> Gpu:
    """Return a GPU by its number. Tests put something else here."""
    return _torch_gpu(number)


def used_gpu() -> int | None:
    """Return the number of the GPU that this thread works with; None where CUDA is not in use."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

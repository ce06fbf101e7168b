"""A stand-in for a GPU: tensors in memory of its own count as on "cuda:0"; what is put on its streams may be late."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from raynixl.errors import RangeError
from raynixl.memory import MemoryKind
from raynixl.region import Region
from raynixl.weights.space import Space

GPU = Space("cuda:0")


class Work:
    """Something that was put on a stream and is not through: it happens when the test says so."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._what = what
        self._is_over = threading.Event()

    def happen(self) -> None:
        """Do it."""
        self._what()
        self._is_over.set()

    def query(self) -> bool:
        """Whether it is through."""
        return self._is_over.is_set()


class Moment:
    """All that was put on a stream until now."""

    def __init__(self, works: list[Work]) -> None:
        self._works = list(works)

    def query(self) -> bool:
        return all(work.query() for work in self._works)


class StandInGpu:
    """In place of `TorchGpu`: each thread has a stream of its own, and besides there is ours."""

    def __init__(self) -> None:
        self._streams: dict[str, list[Work]] = {"ours": []}
        self._local = threading.local()
        self._numbers = itertools.count()
        self.entered = 0

    def put(self, what: Callable[[], object]) -> Work:
        """Put work on this thread's stream that is not through yet."""
        work = Work(what)
        self._streams.setdefault(self._name(), []).append(work)
        return work

    @contextmanager
    def ours(self) -> Iterator[None]:
        before = self._name()
        self._local.name = "ours"
        self.entered += 1
        try:
            yield
        finally:
            self._local.name = before

    def now(self) -> tuple[int, Moment]:
        name = self._name()
        return hash(name), Moment(self._streams.get(name, []))

    def default(self) -> Moment:
        return Moment([])

    def home(self) -> Callable[[], Moment]:
        name = self._name()
        return lambda: Moment(self._streams.get(name, []))

    def _name(self) -> str:
        if not hasattr(self._local, "name"):
            self._local.name = f"stream {next(self._numbers)}"
        name: str = self._local.name
        return name


class StandIn:
    """The device: its memory, of which there may be too little, and its streams."""

    def __init__(self) -> None:
        self.gpu = StandInGpu()
        self.room = 1 << 40
        self._spans: list[tuple[int, int]] = []
        self._kept: list[Any] = []

    def install(self, monkeypatch: Any) -> None:
        """Take the place of a GPU in raynixl.weights."""
        host = Space.empty

        def empty(space: Space, agent: Any, nbytes: int, *, name: str = "") -> Any:
            if not space.is_gpu:
                return host(space, agent, nbytes, name=name)
            if nbytes > self.room:
                raise RangeError(f"the GPU has no room for {nbytes} bytes")
            self.room -= nbytes
            region = agent.empty(nbytes, name=name)
            self._add(region.array())
            return region

        monkeypatch.setattr(Space, "empty", empty)
        monkeypatch.setattr("raynixl.weights.space.device_of", self.device_of)
        monkeypatch.setattr("raynixl.weights.streams.gpu", lambda _space: self.gpu)

    def device_of(self, tensor: torch.Tensor) -> str:
        """Return the device of a tensor, by where it lies."""
        address = tensor.data_ptr()
        return GPU.name if any(first <= address < last for first, last in self._spans) else str(tensor.device)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor on the device, with the strides it has."""
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        flat = np.zeros(max(1, reach * tensor.element_size()), np.uint8)
        self._add(flat)
        made = torch.from_numpy(flat).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        made.copy_(tensor.detach())
        return made

    def move(self, model: Any) -> Any:
        """Move a module's or state dict's tensors to the device; tied ones stay tied."""
        if not isinstance(model, torch.nn.Module):
            return {name: self.to(tensor) for name, tensor in model.items()}
        for module in model.modules():
            for holder in (module._parameters, module._buffers):
                for tensor in holder.values():
                    if tensor is not None and self.device_of(tensor) != GPU.name:
                        tensor.data = self.to(tensor)
        return model

    def holds(self, *tensors: torch.Tensor) -> bool:
        """Whether all of these lie on it."""
        return all(self.device_of(tensor) == GPU.name for tensor in tensors)

    def install_over(self, fake: Any, monkeypatch: Any) -> None:
        """Take the place of a GPU whose memory is that of a fake driver: agents allocate and copy by CUDA itself."""
        host = Region.tensor

        def tensor(region: Region, dtype: Any, shape: Any, *, offset: int = 0) -> Any:
            if region.kind is MemoryKind.DRAM:
                return host(region, dtype, shape, offset=offset)
            nbytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
            array = fake.view(region.memory.address + offset, nbytes)
            self._add(array)
            return torch.from_numpy(array).view(dtype).view(tuple(shape))

        monkeypatch.setattr(Region, "tensor", tensor)
        monkeypatch.setattr("raynixl.weights.space.device_of", self.device_of)
        monkeypatch.setattr("raynixl.weights.streams.gpu", lambda _space: self.gpu)

    def _add(self, array: Any) -> None:
        self._kept.append(array)
        self._spans.append((array.ctypes.data, array.ctypes.data + array.nbytes))

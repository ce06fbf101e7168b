"""Reuse: memory for large results, used again once the tensors of a former one are gone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
_KEPT = 4
"""So many pieces of one size are kept: DeepEP lets its users hold the results of two steps."""


class Reuse:
    """Gives out tensors over memory that was touched before, if there is any: fresh pages cost several times a copy."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor of undefined values; its memory is free again when all that shares it is gone."""
        count = math.prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        nbytes = count * dtype.itemsize
        free = self._free.setdefault(nbytes, [])
        memory = free.pop() if free else _aligned(nbytes)
        owner = memory[:]  # the tensor, and what shares its memory, holds on to this array
        weakref.finalize(owner, _give_back, free, memory).atexit = False
        return torch.frombuffer(owner, dtype=dtype, count=count).view(tuple(shape))


def _give_back(free: list[NDArray[np.uint8]], memory: NDArray[np.uint8]) -> None:
    if len(free) < _KEPT:
        free.append(memory)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]

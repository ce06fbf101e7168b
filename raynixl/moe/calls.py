"""Calls: the arguments of one dispatch or combine, checked, as addresses and numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from raynixl.errors import ConfigError, RangeError
from raynixl.moe import cuda_device
from raynixl.moe.channel import Source
from raynixl.moe.fields import RowFormat

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.result import Handle

LAYOUTS: Final = ("tokens", "experts", "slots")
WEIGHTS_AT: Final = ("holder", "source")
CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""How the native core names the dtypes that are summed."""

_SPREAD: Final = 0x9E3779B1
"""Odd, so that no two handles of one layer have the same product modulo 2**32."""

MOST_ALIGNED: Final = 1 << 16
"""Rows of an alignment: what is beyond would fill a host's memory with padding, on those ranks alone that have rows."""

Index = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A tensor whose rows travel: [tokens, ...], each row's items side by side."""

    tensor: Tensor
    nbytes: int
    address: int
    stride: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of what is sent of one token."""

    def source(self, index: Index | None) -> Source:
        """Return where rows are taken from."""
        return Source(self.address, self.stride, self.nbytes, index)


@dataclass(frozen=True, slots=True, eq=False)
class DispatchCall:
    """One dispatch, checked. `columns` are x, its scales if any, and what is sent beside."""

    columns: tuple[Columns, ...]
    has_scales: bool
    tokens: int
    ids: npt.NDArray[np.int64] | None
    ids_dtype: torch.dtype
    weights: npt.NDArray[np.float32] | None
    handle: Handle | None
    layout: str
    alignment: int
    weights_at: str

    @property
    def sends_weights(self) -> bool:
        """Whether weights travel with the rows."""
        return self.weights is not None and self.weights_at == "holder"

    def form(self, topk: int) -> RowFormat:
        """Return what each row is made of: the columns, then ids, weights and token as far as they are not known."""
        fields = [column.nbytes for column in self.columns]
        if self.handle is None:
            fields.append(4 * topk)
        if self.sends_weights:
            fields.append(4 * topk)
        if self.handle is None:
            fields.append(4)
        return RowFormat(tuple(fields))

    def signature(self, placement: int) -> int:
        """Return what must be alike on all ranks, as a number."""
        kinds = tuple((column.dtype, column.shape) for column in self.columns)
        same = number_of((
            "dispatch", kinds, self.ids_dtype, self.sends_weights, self.handle is None, self.layout, self.alignment,
            self.weights_at, placement,
        ))  # fmt: skip
        return same if self.handle is None else with_handle(same, self.handle)


@lru_cache(256)
def number_of(call: tuple[object, ...]) -> int:
    """Return a number for what must be alike on all ranks, the same in every process; never 0."""
    return zlib.crc32(repr(call).encode()) or 1


class Numbered(Protocol):
    """A handle, as far as its number goes."""

    @property
    def number(self) -> int:
        """Another one for each dispatch, the same on all ranks."""


def with_handle(call: int, handle: Numbered) -> int:
    """Return the number of a call with a handle: another one for each; never 0."""
    return (call + handle.number * _SPREAD) & 0xFFFFFFFF or 1


def plain(tensor: Tensor) -> Tensor:
    """Return what a tensor shows as it lies in memory, without its gradients: not negated or conjugated when read."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of the host: itself where that is so."""
    return tensor if tensor.is_cpu else tensor.cpu()


def check_place(tensor: Tensor, what: str, gpu: int | None) -> None:
    """Refuse a tensor that is not where the others of a call are: on a GPU of that number, or in the host's memory.

    Raises:
        ConfigError: as said.
    """
    if gpu is None:
        if not tensor.is_cpu:
            raise ConfigError(f"{what} is on {tensor.device}", hint="give all tensors of a call on one device")
    elif cuda_device.gpu_of(tensor) != gpu:
        raise ConfigError(f"{what} is on {tensor.device}", hint=f"give all tensors of a call on one device: cuda:{gpu}")


def columns_of(
    tensor: Any, what: str, tokens: int | None = None, width: int | None = None, *, gpu: int | None = None
) -> Columns:
    """Check a tensor whose rows travel.

    Raises:
        ConfigError: no tensor, another number of rows or columns, sparse, or not where it shall be.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.dim() < 1:
        raise ConfigError(f"{what} is no tensor with a row for each token", hint=f"give {what} as [tokens, ...]")
    check_place(tensor, what, gpu)
    shape, tensor = tensor.shape, plain(tensor)
    if tokens is not None and shape[0] != tokens:
        raise ConfigError(f"{what} has {shape[0]} rows for {tokens} tokens", hint="give a row for each token")
    if width is not None and (len(shape) != 2 or shape[1] != width):
        raise ConfigError(f"{what} has the shape {list(shape)}", hint=f"give [tokens, {width}]")
    if len(shape) == 2:
        is_plain, items = shape[1] < 2 or tensor.stride(1) == 1, shape[1]
    else:
        is_plain, items = shape[0] == 0 or tensor[0].is_contiguous(), math.prod(shape[1:])
    if not is_plain:
        tensor = tensor.contiguous()
    itemsize = tensor.element_size()
    stride = tensor.stride(0) * itemsize if shape[0] else items * itemsize
    return Columns(tensor, items * itemsize, tensor.data_ptr(), stride, tensor.dtype, tuple(shape[1:]))


def check_ids(topk_idx: Any, tokens: int, topk: int) -> None:
    """Refuse expert ids that are not int32 or int64 [tokens, topk].

    Raises:
        ConfigError: as said.
    """
    if not isinstance(topk_idx, torch.Tensor) or topk_idx.dtype not in (torch.int32, torch.int64):
        raise ConfigError("topk_idx is no int32 or int64 tensor", hint="give the experts' ids as [tokens, topk]")
    if tuple(topk_idx.shape) != (tokens, topk):
        raise ConfigError(
            f"topk_idx has the shape {list(topk_idx.shape)} for {tokens} tokens", hint=f"give [tokens, {topk}]"
        )


def ids_of(topk_idx: Any, tokens: int, topk: int) -> npt.NDArray[np.int64]:
    """Check expert ids and return them as int64.

    Raises:
        ConfigError: see `check_ids`.
    """
    check_ids(topk_idx, tokens, topk)
    return np.ascontiguousarray(on_host(topk_idx).numpy(), np.int64)


def check_weights(topk_weights: Any, tokens: int, topk: int) -> None:
    """Refuse weights that are not floating [tokens, topk].

    Raises:
        ConfigError: as said.
    """
    if not isinstance(topk_weights, torch.Tensor) or not topk_weights.is_floating_point():
        raise ConfigError("topk_weights is no floating tensor", hint="give a weight for each id, or None")
    if tuple(topk_weights.shape) != (tokens, topk):
        raise ConfigError(f"topk_weights has the shape {list(topk_weights.shape)}", hint=f"give [{tokens}, {topk}]")


def weights_of(topk_weights: Any, tokens: int, topk: int) -> npt.NDArray[np.float32] | None:
    """Check weights and return them as float32: a copy, since handles keep them.

    Raises:
        ConfigError: see `check_weights`.
    """
    if topk_weights is None:
        return None
    check_weights(topk_weights, tokens, topk)
    weights = on_host(plain(topk_weights))
    return np.array((weights if weights.dtype is torch.float32 else weights.float()).numpy(), order="C")


def check_choice(value: Any, known: Sequence[str], what: str) -> str:
    """Check one of few words.

    Raises:
        ConfigError: it is none of them.
    """
    if value not in known:
        raise ConfigError(f"there is no {what} {value!r:.40}", hint=f"known are {', '.join(known)}")
    return str(value)


def check_tokens(tokens: int, most: int) -> None:
    """Refuse more tokens than slots and boards were made for.

    Raises:
        RangeError: as said.
    """
    if tokens > most:
        raise RangeError(f"{tokens} tokens in one dispatch", hint=f"max_tokens is {most}: make it larger, or split")

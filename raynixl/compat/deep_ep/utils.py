"""What code around DeepEP takes from `deep_ep.utils`: eight-bit rows and their scales, comparisons, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import align
from raynixl.compat.deep_ep.events import EventHandle, EventOverlap
from raynixl.errors import ConfigError
from raynixl.moe.quantising import SMALLEST, dequantise
from raynixl.moe.quantising import quantise as moe_quantise
from raynixl.weights.conversion import BLOCK, FP8_MAX

__all__ = [
    "EventHandle", "EventOverlap", "align", "calc_diff", "ceil_div", "check_nvlink_connections", "pack_scales",
    "per_token_cast_back", "per_token_cast_to_fp8", "quantise", "unpack_scales",
]  # fmt: skip

_MANTISSA_BITS = 23
_BYTE = 0xFF


def quantise(x: Tensor, *, round_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Return rows as float8_e4m3fn with one float32 scale for each 128 columns; `round_scale` makes it a power of 2.

    A scale is the largest magnitude among its columns, 1e-4 at least, by 448.
    """
    if not round_scale:
        return moe_quantise(x)
    rows, hidden = x.shape
    if hidden % BLOCK:
        raise ConfigError(f"rows of {hidden} columns have no rounded scales", hint=f"give multiples of {BLOCK}")
    wide = x.detach().float().view(rows, hidden // BLOCK, BLOCK)
    amax = wide.abs().amax(2).clamp(min=SMALLEST)
    exponents = _ceil_log2(amax * (1 / FP8_MAX))
    cast = (wide * _power_of_2(-exponents).unsqueeze(2)).to(torch.float8_e4m3fn)
    return cast.view(rows, hidden), _power_of_2(exponents)


def per_token_cast_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in eight bits and their scales; columns beyond a multiple of 128 share the last scale."""
    return moe_quantise(x)


def per_token_cast_back(x_fp8: Tensor, x_scales: Tensor) -> Tensor:
    """Return eight-bit rows as bfloat16; scales are float32, or int32 of four exponents each."""
    scales = unpack_scales(x_scales) if x_scales.dtype == torch.int32 else x_scales
    return dequantise(x_fp8, scales, torch.bfloat16)


def pack_scales(scales: Tensor) -> Tensor:
    """Return scales that are powers of 2 as int32 of four exponents each (UE8M0), the first in the lowest byte."""
    if scales.shape[-1] % 4:
        raise ConfigError(
            f"{scales.shape[-1]} scales a row do not pack by four",
            hint=f"give rows of a multiple of {4 * BLOCK} columns",
        )
    exponents = (scales.view(torch.int32) >> _MANTISSA_BITS & _BYTE).reshape(*scales.shape[:-1], -1, 4)
    return torch.sum(exponents << _shifts(scales), -1, dtype=torch.int32)


def unpack_scales(packed: Tensor) -> Tensor:
    """Return what `pack_scales` packed."""
    exponents = (packed.unsqueeze(-1) >> _shifts(packed) & _BYTE).flatten(-2)
    return (exponents << _MANTISSA_BITS).view(torch.float32)


def calc_diff(x: Tensor, y: Tensor) -> float:
    """Return how far two tensors are from proportional: 0 for equal ones."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def ceil_div(value: int, step: int) -> int:
    """Return how many steps it takes."""
    return -(-value // step)


def check_nvlink_connections(group: object) -> None:
    """Do nothing: there are no GPUs whose connections would matter."""


def _shifts(like: Tensor) -> Tensor:
    """Return by how much each byte of a word is shifted; made where the word is, since a copy would wait for a GPU."""
    return torch.arange(0, 32, 8, dtype=torch.int32, device=like.device)


def _ceil_log2(values: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    exponents = (bits >> _MANTISSA_BITS & _BYTE) - 127
    return exponents + (bits & (1 << _MANTISSA_BITS) - 1 != 0).int()


def _power_of_2(exponents: Tensor) -> Tensor:
    return (exponents + 127 << _MANTISSA_BITS).int().view(torch.float32)

"""Quantise: rows to FP8, one scale for each row and 128 columns, as DeepEP's users do before they dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from raynixl.errors import ConfigError
from raynixl.weights.conversion import BLOCK, FP8_MAX

if TYPE_CHECKING:
    import torch

SMALLEST: Final = 1e-4
"""The largest value of a block counts as this at least: a block of zeros has the scale SMALLEST / 448."""

_STRIP_NBYTES = 8 << 20
"""Worked on at a time, as float32, so that it stays in a cache."""


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [rows, hidden] as float8_e4m3fn, and float32 scales [rows, hidden / 128, rounded up].

    The scale of a block is its largest magnitude, 1e-4 at least, divided by 448; a value is multiplied in float32 with
    448 / that magnitude and rounded to nearest even: the bits of DeepEP's `per_token_cast_to_fp8`. Where `hidden` is no
    multiple of 128 the last block is shorter. A block with a NaN or an infinity has that for its scale, and comes back
    as NaN throughout; the other blocks of its row are as ever.

    Raises:
        ConfigError: not rows of real numbers.
    """
    import torch

    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ConfigError(f"{x.dtype} {list(x.shape)} cannot be quantised", hint="give rows of real numbers")
    rows, hidden = x.shape
    blocks = scale_columns(hidden)
    out = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    for strip in _strips(x):
        _quantise_strip(x.detach()[strip], out[strip], scales[strip])
    return out, scales


def _quantise_strip(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    import torch

    values = _whole_blocks(x)
    blocks = values.view(len(values), -1, BLOCK)
    largest = blocks.abs().amax(dim=2).clamp_(min=SMALLEST)
    blocks.mul_((FP8_MAX / largest).unsqueeze(2))  # rounding may pass 448 by an ulp, which is stored as 448
    out.copy_(values[:, : x.shape[1]])
    most = largest.new_full((), FP8_MAX)  # where it is divided by a number a GPU multiplies with its reciprocal
    torch.div(largest, most, out=scales)


def dequantise(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the values of quantised rows, in float32 or a dtype: value * scale in float32, rounded to it.

    Raises:
        ConfigError: the scales are not those of such rows.
    """
    import torch

    rows, hidden = x.shape
    if scales.shape != (rows, scale_columns(hidden)):
        raise ConfigError(
            f"scales {list(scales.shape)} of rows {list(x.shape)}", hint=f"give one for each row and {BLOCK} columns"
        )
    out = torch.empty((rows, hidden), dtype=torch.float32 if dtype is None else dtype, device=x.device)
    for strip in _strips(x):
        values = _whole_blocks(x[strip])
        values.view(len(values), -1, BLOCK).mul_(scales[strip].unsqueeze(2))
        out[strip] = values[:, :hidden]
    return out


def _strips(x: torch.Tensor) -> Iterator[slice]:
    rows, hidden = x.shape
    step = _STRIP_NBYTES // (4 * BLOCK * max(1, scale_columns(hidden))) if x.device.type == "cpu" else rows
    for top in range(0, rows if hidden else 0, max(1, step)):
        yield slice(top, top + max(1, step))


def _whole_blocks(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of rows as float32, the last block filled with zeros."""
    import torch

    values = x.to(torch.float32, copy=True)
    short = -x.shape[1] % BLOCK
    return torch.nn.functional.pad(values, (0, short)) if short else values


def scale_columns(hidden: int) -> int:
    """Return how many scales a row has."""
    return -(-hidden // BLOCK)

"""Quantising: matrices to FP8 in blocks, by torch, straight into where they are to lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raynixl.weights.conversion import BLOCK, FP8_MAX

if TYPE_CHECKING:
    import torch

_STRIP_NBYTES = 8 << 20
"""Worked on at a time, as float32: what fits a cache is read twice at its speed."""


def quantise(source: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the FP8 values and the scales of a tensor: stored * scale is the value nearest to it.

    A block of zeros has the scale 1. What is not finite makes its block not finite: nobody takes it for a weight.
    """
    rows, columns = source.shape[-2:]
    height = max(1, _STRIP_NBYTES // (4 * BLOCK * max(1, columns))) * BLOCK
    matrices = math.prod(source.shape[:-2])
    flat = source.detach().reshape(matrices, rows, columns)
    out, out_scales = stored.view(flat.shape), scales.view(matrices, *scales.shape[-2:])
    for number in range(matrices):
        for top in range(0, rows, height):
            strip = flat[number, top : top + height]
            first = top // BLOCK
            _quantise_strip(strip, out[number, top : top + height], out_scales[number, first : first + height // BLOCK])


def _quantise_strip(source: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> None:
    import torch

    rows, columns = source.shape
    down, across = scales.shape[0], scales.shape[1]
    values = source.to(torch.float32, copy=True)
    if (rows, columns) != (down * BLOCK, across * BLOCK):
        values = torch.nn.functional.pad(values, (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    blocks = values.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    scale[scale == 0] = 1.0
    blocks.div_(scale[:, None, :, None])  # rounding may pass FP8_MAX by an ulp, which is stored as FP8_MAX
    stored.copy_(values[:rows, :columns])
    scales.copy_(scale)


def dequantise(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values of a quantised matrix as float32."""
    import torch

    rows, columns = stored.shape[-2:]
    wide = scales.repeat_interleave(BLOCK, dim=-2)[..., :rows, :].repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return stored.to(torch.float32) * wide

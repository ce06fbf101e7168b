"""Quantising: matrices to FP8 in blocks, by torch, straight into where they are to lie."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Literal

from raynixl.errors import BackendUnavailable
from raynixl.weights.conversion import BLOCK, FP8_MAX

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_STRIP_NBYTES = 8 << 20
"""Worked on at a time, as float32: what fits a cache is read twice at its speed."""
_DEVICE_STRIP_NBYTES = 256 << 20
_DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
}  # fmt: skip


def quantise(source: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the FP8 values and the scales of a tensor: stored * scale is the value nearest to it.

    A block of zeros has the scale 1. What is not finite makes its block not finite: nobody takes it for a weight.
    On a GPU it is put on this thread's current stream; a kernel of ours does it where it can be had.
    """
    if source.numel() == 0 or (source.is_cuda and _quantise_by_kernel(source.detach(), stored, scales)):
        return
    rows, columns = source.shape[-2:]
    strip_nbytes = _STRIP_NBYTES if source.device.type == "cpu" else _DEVICE_STRIP_NBYTES
    height = max(1, strip_nbytes // (4 * BLOCK * max(1, columns))) * BLOCK
    matrices = math.prod(source.shape[:-2])
    flat = source.detach().reshape(matrices, rows, columns)
    out, out_scales = stored.view(flat.shape), scales.view(matrices, *scales.shape[-2:])
    for number in range(matrices):
        for top in range(0, rows, height):
            strip = flat[number, top : top + height]
            first = top // BLOCK
            _quantise_strip(strip, out[number, top : top + height], out_scales[number, first : first + height // BLOCK])


def _quantise_by_kernel(source: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> bool:
    """Quantise on the GPU that everything is on; False if that is not so, or the kernel does not take it."""
    import torch

    from raynixl.backends.nvlink_quantise import quantise_blocks

    dtype = _DTYPES.get(str(source.dtype).removeprefix("torch."))
    is_plain = all(one.device == source.device and one.is_contiguous() for one in (source, stored, scales))
    if not is_plain or dtype is None:
        return False
    try:
        quantise_blocks(
            source.device.index or 0, source=source.data_ptr(), stored=stored.data_ptr(), scales=scales.data_ptr(),
            shape=(math.prod(source.shape[:-2]), *source.shape[-2:]), dtype=dtype,
            stream=torch.cuda.current_stream(source.device).cuda_stream,
        )  # fmt: skip
    except BackendUnavailable as exc:
        logger.debug("torch quantises on %s: %s", source.device, exc)
        return False
    return True


def _quantise_strip(source: torch.Tensor, stored: torch.Tensor, scales: torch.Tensor) -> None:
    import torch

    rows, columns = source.shape
    down, across = scales.shape[0], scales.shape[1]
    values = source.to(torch.float32, copy=True)
    if (rows, columns) != (down * BLOCK, across * BLOCK):
        values = torch.nn.functional.pad(values, (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    blocks = values.view(down, BLOCK, across, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scale = largest / largest.new_full((), FP8_MAX)  # by a number a GPU would multiply with its reciprocal
    scale = torch.where(scale == 0, 1.0, scale)
    blocks.div_(scale[:, None, :, None])  # rounding may pass FP8_MAX by an ulp, which is stored as FP8_MAX
    stored.copy_(values[:rows, :columns])
    scales.copy_(scale)


def dequantise(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values of a quantised matrix as float32."""
    import torch

    rows, columns = stored.shape[-2:]
    wide = scales.repeat_interleave(BLOCK, dim=-2)[..., :rows, :].repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return stored.to(torch.float32) * wide

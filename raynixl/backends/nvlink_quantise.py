"""FP8 in blocks, made on a GPU by one kernel: the values of raynixl/weights/quantising.py on a CPU."""

from __future__ import annotations

from ctypes import c_uint64
from typing import Literal

from raynixl import cuda
from raynixl.backends.nvlink_mover import mover

Dtype = Literal["float32", "bfloat16", "float16"]

_SIDE, _THREADS = 128, 256


def quantise_blocks(
    device: int,
    *,
    source: int,
    stored: int,
    scales: int,
    shape: tuple[int, int, int],
    dtype: Dtype,
    stream: int,
) -> None:
    """Write the e4m3 values and the float32 scales of `shape` = (matrices, rows, columns), each block 128 x 128.

    All three are contiguous, by address; there is a scale for each block, also for those cut off by an edge. What is
    done is put on a stream, a handle, of the GPU's primary context: this returns at once.

    Raises:
        BackendUnavailable: kernels cannot be compiled here, or CUDA does not take it.
    """
    matrices, rows, columns = shape
    blocks = matrices * -(-rows // _SIDE) * -(-columns // _SIDE)
    if blocks:
        function = mover(device).kernels.functions[f"raynixl_quantise_{dtype}"]
        values = [c_uint64(value) for value in (source, stored, scales, rows, columns)]
        with cuda.on(device):
            cuda.launch(function, (blocks, 1, 1), (_THREADS, 1, 1), values, stream)

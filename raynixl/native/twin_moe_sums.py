"""Sums of rows in numpy, with the bits of the compiled core; raynixl/native/moe.py says what they are."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.native.codes import DONE
from raynixl.native.moe import BF16, F16, F32, F64
from raynixl.native.twin_moe import aborted, check_array, enter_gates, leave_gates

__all__ = ["REDUCE_VARIANTS", "reduce_rows"]

REDUCE_VARIANTS = 1

Floats = npt.NDArray[Any]

_STORED: dict[int, np.dtype[Any]] = {
    F32: np.dtype(np.float32),
    BF16: np.dtype(np.uint16),
    F16: np.dtype(np.float16),
    F64: np.dtype(np.float64),
}
_LOOK_EVERY = 256 << 10  # bytes read between two looks at the gates


def reduce_rows(  # noqa: PLR0913, PLR0917 - a source, a target, and what may be added
    dst: int,
    dst_stride: int,
    out_code: int,
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.uint64],
    in_code: int,
    weights: npt.NDArray[np.float32] | None,
    hidden: int,
    biases: npt.NDArray[np.uint64],
    bias_stride: int,
    bias_code: int,
    gates: Sequence[Any],
    scale: npt.NDArray[np.float32] | None = None,
    variant: int = 0,
) -> int:
    """Add up the rows of each token, inside the gates. See `MoeCore.reduce_rows`."""
    _check(starts, rows, weights, scale)
    _check_codes(out_code, in_code, bias_code if len(biases) else in_code)
    check_array(biases, np.uint64, 1)
    plain = in_code == out_code and weights is None and scale is None and len(biases) == 0
    addresses, heads = rows.tolist(), biases.tolist()
    if code := enter_gates(gates):
        return code
    seen = 0
    try:
        for t, (first, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            target = _view(dst + t * dst_stride, hidden, out_code)
            if plain and end - first == 1:
                target[:] = _view(addresses[first], hidden, in_code)
            else:
                terms = [_term(addresses[row], hidden, in_code, weights, row) for row in range(first, end)]
                added = [_load(head + t * bias_stride, hidden, bias_code, in_code) for head in heads]
                target[:] = _narrow(_sum(terms, None if scale is None else scale[t], added, hidden), out_code)
            seen += hidden * (end - first + 1) * 4
            if seen >= _LOOK_EVERY:
                seen = 0
                if code := aborted(gates):
                    return code
    finally:
        leave_gates(gates)
    return DONE


def _check(
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.uint64],
    weights: npt.NDArray[np.float32] | None,
    scale: npt.NDArray[np.float32] | None,
) -> None:
    check_array(starts, np.int64, 1)
    check_array(rows, np.uint64, 1)
    for factors in (weights, scale):
        if factors is not None:
            check_array(factors, np.float32, 1)
    if len(starts) == 0:
        raise ValueError("there is a start for each token, and an end")
    if weights is not None and len(weights) < len(rows):
        raise ValueError("there is a weight for each row, or none")
    if scale is not None and len(scale) != len(starts) - 1:
        raise ValueError("there is a scale for each token, or none")
    if starts[0] < 0 or starts[-1] > len(rows):
        raise ValueError("starts beyond the rows")
    if (np.diff(starts) < 0).any():
        raise ValueError("starts must ascend")


def _check_codes(out_code: int, in_code: int, bias_code: int) -> None:
    if not all(code in _STORED for code in (out_code, in_code, bias_code)):
        raise ValueError("unknown type of elements")
    if (in_code == F64) != (out_code == F64) or (in_code != F64 and bias_code == F64):
        raise ValueError("float64 goes only with float64")


def _view(address: int, hidden: int, code: int) -> Floats:
    """Return the row at an address, as it is stored."""
    nbytes = hidden * _STORED[code].itemsize
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=_STORED[code])


def _load(address: int, hidden: int, code: int, in_code: int) -> Floats:
    """Return the row at an address, as the numbers that are added."""
    stored = _view(address, hidden, code)
    if code == BF16:
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float64 if in_code == F64 else np.float32)


def _term(address: int, hidden: int, code: int, weights: npt.NDArray[np.float32] | None, row: int) -> Floats:
    term = _load(address, hidden, code, code)
    with np.errstate(all="ignore"):
        return term if weights is None else term * weights[row].astype(term.dtype)


def _sum(terms: list[Floats], scale: np.float32 | None, biases: list[Floats], hidden: int) -> Floats:
    with np.errstate(all="ignore"):
        if terms:
            total = terms[0].copy()
            for term in terms[1:]:
                total += term
            if scale is not None:
                total *= scale.astype(total.dtype)
            biases = [total, *biases]
        total = biases[0].copy() if biases else np.zeros(hidden, np.float32)
        for bias in biases[1:]:
            total += bias
        return total


def _narrow(total: Floats, code: int) -> Floats:
    """Round to nearest even; NaNs become the canonical one."""
    total = np.where(np.isnan(total), np.array(np.nan, total.dtype), total)
    with np.errstate(all="ignore"):
        if code != BF16:
            return total.astype(_STORED[code])
    bits = total.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)

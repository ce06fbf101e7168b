"""Routes, rows and lines of expert parallelism in numpy and ctypes; raynixl/native/moe.py says what each promises."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.native import syscalls
from raynixl.native.codes import DONE
from raynixl.native.rows import cut_rows, group_rows
from raynixl.native.twin_job import Gate, deadline_after

__all__ = [
    "aborted",
    "check_array",
    "enter_gates",
    "leave_gates",
    "post_line",
    "put_fields",
    "put_rows",
    "ring",
    "route",
    "take_ids",
    "wait_lines",
]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
F32s = npt.NDArray[np.float32]

_LOOK_EVERY = 256 << 10  # bytes copied between two looks at the gates
_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT_BITSET, _WAKE_OP = 9, 5
_ADD_ONE = 1 << 28 | 1 << 12  # FUTEX_OP(FUTEX_OP_ADD, 1, FUTEX_OP_CMP_EQ, 0)
_ANY = 0xFFFFFFFF
_INT_MAX = (1 << 31) - 1


def check_array(array: object, dtype: type, dimensions: int) -> None:
    """Refuse what is not a C-contiguous array of this type."""
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == dimensions
    if not (fits and isinstance(array, np.ndarray) and array.flags.c_contiguous):
        raise TypeError(f"not a C-contiguous array of {np.dtype(dtype)} in {dimensions} dimensions")


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


# Routes


def route(  # noqa: PLR0913, PLR0917 - one table, column by column
    ids: I64,
    weights: F32s | None,
    holder: I32,
    local: I32,
    order: I32,
    counts: I64,
    starts: I64,
    positions: I32,
    row_ids: I32,
    row_weights: F32s | None,
) -> int:
    """Make one row for each token and rank that holds an expert of it. See `MoeCore.route`."""
    _check_route(ids, weights, holder, local)
    _check_outputs(ids, order, counts, starts, positions)
    _check_wide(ids, order, row_ids, row_weights)
    _need((weights is None) == (row_weights is None), "weights come out if they go in, and only then")
    _check_values(ids, holder, len(counts))
    token, k = np.nonzero(ids >= 0)
    ranks = holder[ids[token, k]]
    token, k, ranks = token[ranks >= 0], k[ranks >= 0], ranks[ranks >= 0]
    # One number for each pair of rank and token: sorted, they are the rows.
    rows, row_of_pair = np.unique(ranks.astype(np.int64) * len(ids) + token, return_inverse=True)
    total = len(rows)
    _need(total <= len(order), f"{total} rows do not fit into {len(order)}")
    tokens = rows % max(1, len(ids))
    order[:total] = tokens
    counts[:] = np.bincount(rows // max(1, len(ids)), minlength=len(counts))
    starts[0] = 0
    starts[1:] = np.cumsum(np.bincount(tokens, minlength=len(ids)))
    positions[:total] = np.argsort(tokens, kind="stable")
    cells = row_of_pair.reshape(-1), k
    row_ids[:total] = -1
    row_ids[cells] = local[ids[token, k]]
    if weights is not None and row_weights is not None:
        row_weights[:total] = 0
        row_weights[cells] = weights[token, k]
    return total


def _check_route(ids: I64, weights: F32s | None, holder: I32, local: I32) -> None:
    check_array(ids, np.int64, 2)
    for array in (holder, local):
        check_array(array, np.int32, 1)
    if weights is not None:
        check_array(weights, np.float32, 2)
        _need(weights.shape == ids.shape, "there is a weight for each id, or none")
    _need(len(holder) == len(local), "`holder` and `local` differ in length")


def _check_outputs(ids: I64, order: I32, counts: I64, starts: I64, positions: I32) -> None:
    for rows in (order, positions):
        check_array(rows, np.int32, 1)
    for numbers in (counts, starts):
        check_array(numbers, np.int64, 1)
    _need(len(starts) == len(ids) + 1, "there is a start for each token, and an end")
    _need(len(positions) >= len(order), "not all outputs have the length of `order`")


def _check_wide(ids: I64, order: I32, row_ids: I32, row_weights: F32s | None) -> None:
    check_array(row_ids, np.int32, 2)
    if row_weights is not None:
        check_array(row_weights, np.float32, 2)
    for array in (row_ids, row_ids if row_weights is None else row_weights):
        _need(len(array) >= len(order), "not all outputs have the length of `order`")
        _need(array.shape[1] == ids.shape[1], "outputs are as wide as the ids")


def _check_values(ids: I64, holder: I32, ranks: int) -> None:
    for expert in np.flatnonzero((holder < -1) | (holder >= ranks))[:1].tolist():
        raise ValueError(f"expert {expert} is held by rank {holder[expert]} of {ranks}")
    for token, k in np.argwhere((ids < -1) | (ids >= len(holder)))[:1].tolist():
        raise ValueError(f"token {token} names expert {ids[token, k]} of {len(holder)}")


# Rows


def enter_gates(gates: Sequence[Any]) -> int:
    """Enter every gate, or none; return 0, or the code of the one that refused."""
    for entered, gate in enumerate(gates):
        if not isinstance(gate, Gate):
            leave_gates(gates[:entered])
            raise TypeError("not a gate of this core")
        if code := gate.enter():
            leave_gates(gates[:entered])
            return code
    return 0


def leave_gates(gates: Sequence[Any]) -> None:
    """Leave every gate."""
    for gate in gates:
        gate.leave()


def aborted(gates: Sequence[Any]) -> int:
    """Return the code of the first gate whose closing stops those inside, else 0."""
    return next((gate.aborted for gate in gates if gate.aborted), 0)


def put_rows(
    src: int, src_stride: int, row_nbytes: int, index: I32 | None, dst: int, gates: Sequence[Any], count: int
) -> int:
    """Copy rows of a source end to end, inside the gates. See `MoeCore.put_rows`."""
    if index is not None:
        check_array(index, np.int32, 1)
        _need(len(index) >= count, "the index is shorter than the rows")
    which = np.arange(count, dtype=np.int64) if index is None else index[:count].astype(np.int64)
    rows = np.full((count, 3), row_nbytes, np.uint64)
    rows[:, 0] = np.uint64(src) + (which * src_stride).view(np.uint64)
    rows[:, 1] = np.uint64(dst) + np.arange(count, dtype=np.uint64) * np.uint64(row_nbytes)
    zeros = np.zeros(row_nbytes if (which < 0).any() else 0, np.uint8)
    rows[which < 0, 0] = zeros.ctypes.data
    if code := enter_gates(gates):
        return code
    try:
        return _copy_rows(rows, gates)
    finally:
        leave_gates(gates)


def put_fields(fields: U64, first: int, starts: U64, base: int, offset: int, gates: Sequence[Any], count: int) -> int:
    """Copy rows of several fields, inside the gates. See `MoeCore.put_fields`."""
    check_array(fields, np.uint64, 2)
    check_array(starts, np.uint64, 1)
    _need(fields.shape[1] == 4, "a field has a source, a stride, a length, and the address of an index")
    _need(len(starts) == len(fields), "there is a start for each field")
    for (source, stride, nbytes, index), start in zip(fields.tolist(), starts.tolist(), strict=True):
        at = base + start + offset * nbytes
        if index:
            which = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(index + 4 * first))
            code = put_rows(source, stride, nbytes, which, at, gates, count)
        else:
            code = put_rows(source + first * stride, stride, nbytes, None, at, gates, count)
        if code:
            return code
    return DONE


def take_ids(source: int, copy: I32, wide: I64 | None, counts: I64) -> None:
    """Copy, widen and count ids. See `MoeCore.take_ids`."""
    check_array(copy, np.int32, 2)
    check_array(counts, np.int64, 1)
    _need(source % 4 == 0, "ids are aligned to 4 bytes")
    if wide is not None:
        check_array(wide, np.int64, 2)
        _need(wide.shape == copy.shape, "the outputs differ in shape")
    copy[:] = np.ctypeslib.as_array((ctypes.c_int32 * copy.size).from_address(source)).reshape(copy.shape)
    for expert in copy[(copy < -1) | (copy >= len(counts))][:1].tolist():
        raise ValueError(f"expert {expert} of {len(counts)}")
    if wide is not None:
        wide[:] = copy
    counts[:] = np.bincount(copy.ravel() + 1, minlength=len(counts) + 1)[1:]


def _copy_rows(rows: U64, gates: Sequence[Any]) -> int:
    for group in group_rows(cut_rows(rows[rows[:, 2] > 0], _LOOK_EVERY, size=2, moving=(0, 1)), _LOOK_EVERY, size=2):
        if code := aborted(gates):
            return code
        if error := syscalls.copy_rows(group):
            raise OSError(-error, os.strerror(-error))
    return DONE


# Lines


@functools.cache
def _syscall() -> Callable[..., int]:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    number = ctypes.c_long(_NUMBERS[platform.machine()])
    return lambda *arguments: int(call(number, *arguments))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def ring(bell: int) -> None:
    """Count a ring and wake everybody. See `MoeCore.ring`."""
    _check_aligned(bell)
    word = ctypes.c_void_p(bell)  # the kernel adds: two processes may do so at once, and Python has nothing atomic
    _syscall()(word, _WAKE_OP, _INT_MAX, ctypes.c_void_p(0), word, ctypes.c_uint32(_ADD_ONE))


def post_line(
    address: int, payload: bytes | npt.NDArray[np.uint8], number: int, bell: int, gates: Sequence[Any] = ()
) -> int:
    """Write a line, its number last, and ring, inside the gates. See `MoeCore.post_line`."""
    _check_aligned(address)
    _check_aligned(bell)
    if not 0 <= number < 1 << 64:
        raise TypeError("a number has 64 bits")
    data = _bytes_of(payload)
    if code := enter_gates(gates):
        return code
    syscalls.copy_small(address + 8, data, len(data))
    _fence()
    ctypes.c_uint64.from_address(address).value = number
    if bell:
        ring(bell)
    leave_gates(gates)
    return DONE


def _bytes_of(payload: Any) -> bytes:
    try:
        view = memoryview(payload)
    except TypeError:
        raise TypeError("a payload is bytes, or a C-contiguous array") from None
    if not view.c_contiguous:
        raise TypeError("a payload is bytes, or a C-contiguous array")
    return view.tobytes()


def _fence() -> None:
    """Order the stores before and after. x86 does so by itself; elsewhere an atomic operation of the kernel does."""
    if platform.machine() != "x86_64":
        ring(ctypes.addressof(ctypes.c_uint64()))


def wait_lines(addresses: U64, numbers: U64, bell: int, timeout: float, spin: float) -> int:
    """Wait until each word has its number, looking for a while before sleeping. See `MoeCore.wait_lines`."""
    for array in (addresses, numbers):
        check_array(array, np.uint64, 1)
    _need(len(addresses) == len(numbers), "there is a number for each address")
    _need(bell != 0, "a wait needs a bell")
    for address in (bell, *addresses.tolist()):
        _check_aligned(address)
    words = [ctypes.c_uint64.from_address(address) for address in addresses.tolist()]
    rings, due = ctypes.c_uint32.from_address(bell), ctypes.c_uint32.from_address(bell + 4)
    deadline, spin_until = deadline_after(timeout), deadline_after(spin)
    while True:
        count = rings.value
        arrived = sum(word.value >= number for word, number in zip(words, numbers.tolist(), strict=True))
        now = time.monotonic()
        if arrived == len(words) or now >= deadline:
            return int(arrived)
        if now < spin_until:
            os.sched_yield()
            continue
        due.value = ((count + 1) << 1 | 1) & 0xFFFFFFFF  # the very next: never too late for others who sleep
        _sleep(bell, count, deadline)


def _sleep(bell: int, count: int, deadline: float) -> None:
    """Sleep while the bell has not rung; a signal ends it, too."""
    limit = None
    if deadline < 1e9:
        limit = ctypes.byref(_Timespec(int(deadline), int(math.fmod(deadline, 1.0) * 1e9)))
    word, expected = ctypes.c_void_p(bell), ctypes.c_uint32(count)
    _syscall()(word, _WAIT_BITSET, expected, limit, ctypes.c_void_p(0), ctypes.c_uint32(_ANY))


def _check_aligned(address: int) -> None:
    _need(address % 8 == 0, "lines and bells are aligned to 8 bytes")

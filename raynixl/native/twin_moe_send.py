"""Rows and the lines behind them to all peers in one call, as the ctypes twin does it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.native.twin_job import Gate
from raynixl.native.twin_moe import check_array, post_line, put_fields

__all__ = ["Way", "send_rows"]

_TOLD = struct.Struct("<IIIII")  # place, offset, count, back, total
_NOWHERE = 0xFFFFFFFF
_ALL, _NO_ROWS, _NO_LINE = 0, 1, 2


class Way:
    """How rows and lines reach one peer. See `MoeCore.Way`."""

    def __init__(
        self,
        cells: tuple[int, int],
        bell: int,
        board: Sequence[Any],
        slot: int,
        base: int,
        capacity: int,
        starts: Sequence[int],
        memory: Sequence[Any],
    ) -> None:
        if any(address % 8 for address in (*cells, bell)):
            raise ValueError("lines and bells are aligned to 8 bytes")
        if not all(isinstance(gate, Gate) for gate in (*board, *memory)):
            raise TypeError("not a gate of this core")
        self.cells, self.bell, self.board = cells, bell, list(board)
        self.slot, self.base, self.capacity = slot, base, capacity
        self.starts, self.memory = np.array(starts, np.uint64), list(memory)


Send = tuple[Any, int, int, int, int]


def send_rows(
    sends: Sequence[Send],
    total: int,
    fields: npt.NDArray[np.uint64],
    line: npt.NDArray[np.uint8],
    told_at: int,
) -> list[int]:
    """Put each peer's rows, and post the line behind them. See `MoeCore.send_rows`."""
    check_array(fields, np.uint64, 2)
    check_array(line, np.uint8, 1)
    if fields.shape[1] != 4:
        raise ValueError("a field has a source, a stride, a length, and the address of an index")
    if not 8 <= told_at <= len(line) - _TOLD.size:
        raise ValueError("a line has room for what it tells of rows")
    return [_send(send, total, fields, line, told_at) for send in sends]


def _send(send: Send, total: int, fields: npt.NDArray[np.uint64], line: npt.NDArray[np.uint8], told_at: int) -> int:
    way, first, count, offset, back = send
    place = (_NOWHERE, 0)
    if count:
        if len(way.starts) != len(fields) or offset + count > way.capacity:
            return _NO_ROWS
        if put_fields(fields, first, way.starts, way.base, offset, way.memory, count):
            return _NO_ROWS
        place = (way.slot, offset)
    _TOLD.pack_into(line.data, told_at, *place, count, back, total)
    number = int(line[:8].view(np.uint64)[0])
    return _NO_LINE if post_line(way.cells[number & 1], line[8:], number, way.bell, way.board) else _ALL

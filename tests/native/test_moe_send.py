"""Rows and lines to all peers in one call, in both cores: rows land, lines say so, and who is out of reach is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from native_tools import address_of

from raynixl.native import STALE, Native
from raynixl.native.moe import NO_LINE, NO_ROWS, SENT, Way

pytestmark = pytest.mark.pure

NOWHERE = 0xFFFFFFFF
WORDS, TOLD_AT, CAPACITY = 8, 16, 6


@dataclass
class Peer:
    """A board with a bell and two cells, and a slot of two fields of 4 and 8 bytes."""

    core: Native

    def __post_init__(self) -> None:
        self.memory = np.zeros(8 + 2 * WORDS, np.uint64)
        self.slot = np.zeros(CAPACITY * 12, np.uint8)
        self.board, self.rows = self.core.Gate(), self.core.Gate()
        self.bell = address_of(self.memory)
        self.cells = self.bell + 64, self.bell + 64 + 8 * WORDS

    def way(self, slot: int = 7) -> Way:
        """How it is reached."""
        starts = [0, 4 * CAPACITY]
        base = address_of(self.slot)
        return self.core.Way(self.cells, self.bell, [self.board], slot, base, CAPACITY, starts, [self.rows])

    def told(self, number: int) -> tuple[int, tuple[int, ...]]:
        """What the line in the cell of a number says: its number, and what it tells of rows."""
        cell = self.memory[8:].reshape(2, WORDS)[number & 1]
        return int(cell[0]), tuple(cell.view(np.uint32)[TOLD_AT // 4 : TOLD_AT // 4 + 5].tolist())

    @property
    def fields(self) -> tuple[list[int], list[int]]:
        """What lies in the slot."""
        cut = 4 * CAPACITY
        return self.slot[:cut].view(np.uint32).tolist(), self.slot[cut:].view(np.uint64).tolist()


def parcel(number: int) -> tuple[Any, Any, Any]:
    """Five rows of two fields, the first by an index, and a line."""
    keep = np.arange(10, 15, dtype=np.uint32), np.arange(20, 25, dtype=np.uint64), np.array([4, 3, 2, 1, 0], np.int32)
    small, large, index = keep
    fields = np.array([(address_of(small), 4, 4, address_of(index)), (address_of(large), 8, 8, 0)], np.uint64)
    line = np.zeros(8 * WORDS, np.uint8)
    line[:8].view(np.uint64)[0] = number
    return fields, line, keep


@pytest.mark.parametrize("number", [2, 3])
def test_each_peer_gets_its_rows_and_a_line_that_says_where_they_are(core: Native, number: int) -> None:
    one, two, three = Peer(core), Peer(core), Peer(core)
    fields, line, _keep = parcel(number)
    sends = [(one.way(), 0, 2, 1, 30), (two.way(9), 2, 3, 0, 31), (three.way(), 0, 0, 0, 32)]
    assert core.send_rows(sends, 40, fields, line, TOLD_AT) == [SENT] * 3
    assert one.fields == ([0, 14, 13, 0, 0, 0], [0, 20, 21, 0, 0, 0])
    assert two.fields == ([12, 11, 10, 0, 0, 0], [22, 23, 24, 0, 0, 0])
    assert not three.slot.any()
    assert one.told(number) == (number, (7, 1, 2, 30, 40))
    assert two.told(number) == (number, (9, 0, 3, 31, 40))
    assert three.told(number) == (number, (NOWHERE, 0, 0, 32, 40))
    assert [int(peer.memory[:1].view(np.uint32)[0]) for peer in (one, two, three)] == [1, 1, 1]
    assert [one.board.inflight, one.rows.inflight] == [0, 0]


def test_rows_that_cannot_be_put_have_no_line_and_others_go_on(core: Native) -> None:
    peers = [Peer(core) for _ in range(4)]
    fields, line, _keep = parcel(2)
    peers[0].rows.close(STALE)
    peers[1].board.close(STALE)
    sends = [(peer.way(), 0, 2, 0, 0) for peer in peers]
    sends[2] = (peers[2].way(), 0, 2, CAPACITY - 1, 0)  # one row too many
    assert core.send_rows(sends, 0, fields, line, TOLD_AT) == [NO_ROWS, NO_LINE, NO_ROWS, SENT]
    assert [peer.told(2)[0] for peer in peers] == [0, 0, 0, 2]
    assert [peer.slot.any() for peer in peers] == [False, True, False, True]
    assert core.send_rows(sends[3:], 0, fields[:1], line, TOLD_AT) == [NO_ROWS]  # not the fields of the way


def test_a_way_without_a_slot_takes_lines_alone(core: Native) -> None:
    peer = Peer(core)
    fields, line, _keep = parcel(2)
    way = core.Way(peer.cells, peer.bell, [peer.board], 0, 0, 0, (), ())
    assert way.capacity == 0
    assert core.send_rows([(way, 0, 1, 0, 0)], 0, fields, line, TOLD_AT) == [NO_ROWS]
    assert core.send_rows([(way, 0, 0, 0, 0)], 0, fields, line, TOLD_AT) == [SENT]
    assert peer.told(2) == (2, (NOWHERE, 0, 0, 0, 0))


def test_what_cannot_be_a_way_or_a_line_is_refused(core: Native) -> None:
    peer = Peer(core)
    fields, line, _keep = parcel(2)
    with pytest.raises(ValueError, match="aligned"):
        core.Way((peer.cells[0], peer.cells[1] + 4), peer.bell, [], 0, 0, 0, (), ())
    with pytest.raises(ValueError, match="aligned"):
        core.Way(peer.cells, peer.bell + 4, [], 0, 0, 0, (), ())
    with pytest.raises(ValueError, match="room"):
        core.send_rows([], 0, fields, line, len(line) - 19)
    with pytest.raises(ValueError, match="field"):
        core.send_rows([], 0, fields[:, :3].copy(), line, TOLD_AT)
    with pytest.raises((TypeError, RuntimeError)):
        core.Way(peer.cells, peer.bell, [object()], 0, 0, 0, (), ())  # type: ignore[list-item]

"""Which session of a peer writes into which cells: no two ever into the same, while either may still write."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from raynixl import Agent, RangeError
from raynixl.moe.board import Board
from raynixl.moe.lanes import Lanes
from raynixl.moe.lines import Cell, Line

RANKS = 2


@pytest.fixture
def board(agent: Agent) -> Iterator[Board]:
    """The board of a rank of two."""
    made = Board(agent, RANKS)
    yield weakref.proxy(made)  # pytest holds on to it for longer than we to the memory
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its input ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def hello(token: str, incarnation: str = "one", *, pid: int = 1, host: str = "here", rank: int = 1) -> Any:
    """What is looked at of a session's hello."""
    arena = SimpleNamespace(owner=f"rank{rank}", incarnation=incarnation)
    return SimpleNamespace(token=token, rank=rank, host=host, pid=pid, board=arena)


def line(board: Board, number: int) -> bytes:
    """A line of a phase."""
    one = Line(board.form)
    one.fill(number, mask=number)
    return bytes(one.data)


def test_a_session_has_one_lane_and_another_session_another(board: Board) -> None:
    lanes = Lanes(board, "here")
    assert lanes.give(hello("a")) == lanes.give(hello("a"))
    assert len({lanes.give(hello(token)) for token in "abc"}) == 3


def test_lines_of_a_session_that_is_not_bound_are_not_read(board: Board) -> None:
    lanes = Lanes(board, "here")
    former, later = lanes.give(hello("a")), lanes.give(hello("b", "two"))
    assert lanes.bind(1, "a")
    board.put(former, Cell.EVEN, line(board, 2))
    assert board.number(1, Cell.EVEN) == 2
    assert lanes.bind(1, "b")
    board.put(former, Cell.EVEN, line(board, 4))
    assert board.number(1, Cell.EVEN) == 0
    board.put(later, Cell.EVEN, line(board, 3))
    assert board.read(1, Cell.EVEN).mask == 3


def test_sessions_of_one_process_take_over_the_lanes_of_those_before(board: Board) -> None:
    lanes = Lanes(board, "here")
    for number in range(10 * board.lanes):
        lane = lanes.give(hello(str(number)))
        assert lanes.bind(1, str(number))
        assert board.number(1, Cell.ODD) == 0
        board.put(lane, Cell.ODD, line(board, 1))


def test_a_lane_is_kept_while_the_process_of_before_lives(board: Board, sleeper: subprocess.Popen[bytes]) -> None:
    lanes = Lanes(board, "here")
    kept = lanes.give(hello("a", "one", pid=sleeper.pid))
    given = [lanes.give(hello(f"b{number}", f"{number}", pid=sleeper.pid)) for number in range(board.lanes - 1)]
    assert kept not in given
    with pytest.raises(RangeError, match="no cells"):
        lanes.give(hello("c", "three"))
    sleeper.kill()
    sleeper.wait()
    assert lanes.give(hello("c", "three")) in [kept, *given]
    assert not lanes.bind(1, "a")


def test_a_lane_that_is_read_is_nobody_elses(board: Board) -> None:
    lanes = Lanes(board, "here")
    read = lanes.give(hello("a"))
    assert lanes.bind(1, "a")
    assert read not in [lanes.give(hello(str(number))) for number in range(10 * board.lanes)]


def test_sessions_on_other_hosts_map_nothing_and_leave_nothing(board: Board) -> None:
    lanes = Lanes(board, "here")
    for number in range(10 * board.lanes):
        lanes.give(hello(str(number), str(number), host="elsewhere"))
    wrote: list[int] = []
    lanes.write(str(number), "rank1", wrote.append)
    lanes.write(str(number), "rank0", wrote.append)  # it is not that one's
    lanes.write("0", "rank1", wrote.append)  # it is over
    assert len(wrote) == 1

"""Lanes: which session of a peer writes into which cells of a board, so that no two sessions ever share one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.errors import RangeError
from raynixl.host import has_ended

if TYPE_CHECKING:
    from raynixl.moe.board import Board
    from raynixl.moe.hello import Hello


@dataclass(slots=True)
class Lane:
    """A session's cells, and what can be known of who writes there."""

    number: int
    rank: int
    name: str
    incarnation: str
    pid: int
    """Of the process that maps our memory; 0 if it is on another host: then only we write what it sends."""
    is_over: bool = False
    """Whether a later session of that rank has asked for cells."""

    def has_writer(self, later: str) -> bool:
        """Whether somebody may still write here, although the rank has begun anew as that incarnation."""
        if self.pid == 0 or self.incarnation == later:  # sessions of one process follow one another
            return False
        return self.pid == os.getpid() or not has_ended(self.pid)


class Lanes:
    """Gives each session that asks cells of its own; they are another's only once nobody can write there any more.

    A process that was stopped amid a line, was replaced, and wakes, ends its line where nobody looks.
    """

    def __init__(self, board: Board, host: str) -> None:
        self._board = board
        self._host = host
        self._lock = threading.Lock()  # protects all below, and that what far peers send goes to lanes that are theirs
        self._free = list(reversed(range(board.lanes)))
        self._by_token: dict[str, Lane] = {}
        self._latest: dict[int, str] = {}  # by rank, the incarnation that has asked last
        self._bound: dict[int, str] = {}  # by rank, the session whose lines we read

    def give(self, hello: Hello) -> int:
        """Return the lane of a session, which has none yet if it is new to us.

        Raises:
            RangeError: there is none left.
        """
        with self._lock:
            lane = self._by_token.get(hello.token)
            if lane is not None:
                return lane.number
            self._latest[hello.rank] = hello.board.incarnation
            for other in self._by_token.values():
                other.is_over = other.is_over or other.rank == hello.rank
            number = self._take()
            self._board.clear(number)
            pid = hello.pid if hello.host == self._host else 0
            self._by_token[hello.token] = Lane(number, hello.rank, hello.board.owner, hello.board.incarnation, pid)
            return number

    def bind(self, rank: int, token: str) -> bool:
        """Read a rank's lines where that session writes them. False if it is over, and its lane given away."""
        with self._lock:
            lane = self._by_token.get(token)
            if lane is None:
                return False
            self._bound[rank] = token
            self._board.bind(rank, lane.number)
            return True

    def write(self, token: str, peer: str, put: Callable[[int], object]) -> None:
        """Have a message of a session put into its lane, if it has one, and the message is from who has that."""
        with self._lock:
            lane = self._by_token.get(token)
            if lane is not None and lane.name == peer:
                put(lane.number)

    def _take(self) -> int:
        """Return a lane that nobody has; _lock is held."""
        if not self._free:
            self._reclaim()
        if not self._free:
            raise RangeError(
                f"no cells are left of {self._board.lanes}",
                hint="end the processes of ranks that were replaced; they are frozen, and may still write",
            )
        return self._free.pop()

    def _reclaim(self) -> None:
        """Take back the lanes of sessions that are over, and whose writers have ended; _lock is held."""
        bound = set(self._bound.values())
        for token, lane in list(self._by_token.items()):
            if token not in bound and lane.is_over and not lane.has_writer(self._latest[lane.rank]):
                del self._by_token[token]
                self._free.append(lane.number)

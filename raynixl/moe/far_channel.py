"""Far channels: how lines and rows reach a peer whose memory is not mapped here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from raynixl.errors import RaynixlError
from raynixl.host import has_ended
from raynixl.moe.channel import Directions, Place, Reach, Rows
from raynixl.moe.fields import RowFormat
from raynixl.moe.lines import Cell, Line
from raynixl.moe.remote_channel import Put, RemoteRows

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.window import Window
    from raynixl.moe.hello import Hello

_TOKEN_NBYTES: Final = 16
_HEAD_NBYTES: Final = 2 * _TOKEN_NBYTES + 1


def pack_line(to: str, of: str, cell: int, line: bytes) -> bytes:
    """Return a line as it travels: behind the receiver's session, the sender's, and the number of its cell."""
    return b"".join((bytes.fromhex(to), bytes.fromhex(of), bytes([cell]), line))


def unpack_line(to: str, message: bytes) -> tuple[str, int, bytes] | None:
    """Return whose it is, cell and line; None if it is not for this session, but for one that the rank had before."""
    if len(message) <= _HEAD_NBYTES or message[:_TOKEN_NBYTES].hex() != to:
        return None
    return message[_TOKEN_NBYTES : _HEAD_NBYTES - 1].hex(), message[_HEAD_NBYTES - 1], message[_HEAD_NBYTES:]


class FarChannel(Reach):
    """A peer over a network: rows are gathered and written one-sided, and lines follow as messages."""

    is_direct = False

    def __init__(
        self,
        agent: Agent,
        rows: RemoteRows,
        *,
        mine: str,
        hello: Hello,
        board: Window,
        directions: Directions,
        topic: str,
    ) -> None:
        super().__init__(agent, hello, board, directions)
        self._rows = rows
        self._mine, self._token = mine, hello.token  # the sessions, ours and the peer's
        self._board = board
        self._topic = topic
        self._started: list[Put] = []  # since the last `finish`
        record = agent.find(self.name)
        is_here = record is not None and record.incarnation == self.incarnation and record.host == agent.host
        self._pid = hello.pid if is_here else 0

    def post(self, cell: Cell, line: Line) -> bool:
        """Send a line: now, or as soon as the rows are there that were put before."""
        if self._board.error is not None or any(put.error is not None for put in self._started):
            return False
        message = pack_line(self._token, self._mine, cell, bytes(line.data))
        self._sent[cell] += 1
        if self._started:
            self._rows.follow(self._started[-1], self._topic, message)
            return self._started[-1].error is None
        try:
            self._agent.send(self.name, self._topic, message)
        except RaynixlError:
            return False
        return True

    def put(self, form: RowFormat, place: Place, rows: Rows, first: int, count: int, deadline: float) -> bool:
        """Gather rows and begin to write them into the peer's slot."""
        room = self.room(form, place, count, deadline)
        if room is None:
            return False
        window, layout = room
        sources = rows.cut(first)
        places = [start + place.offset * source.nbytes for start, source in zip(layout.starts, sources, strict=True)]
        self.puts += 1
        try:
            put = self._rows.start(window, sources, places, count, deadline=deadline)
        except RaynixlError:
            return False
        self._started.append(put)
        return put.error is None

    def finish(self, deadline: float) -> bool:
        """Wait until all rows that were put are at the peer, and the lines behind them sent."""
        started, self._started = self._started, []
        return not started or not self._rows.finish(deadline, started)

    def has_ended(self) -> bool:
        """Whether the peer's process has ended; of one on another host nobody knows."""
        return self._pid != 0 and has_ended(self._pid)

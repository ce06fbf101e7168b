"""The meeting: how ranks find each other's boards, at the beginning and whenever one joins."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from raynixl.errors import ConfigError, IntegrityError, PeerLost, PeerUnknown, RaynixlError, TransferTimeout
from raynixl.moe.board import Board
from raynixl.moe.channel import Channel, MappedChannel
from raynixl.moe.far_channel import FarChannel, unpack_line
from raynixl.moe.hello import Arena, Hello
from raynixl.moe.lanes import Lanes
from raynixl.moe.lines import Cell
from raynixl.moe.placement import Placement
from raynixl.moe.remote_channel import RemoteRows
from raynixl.region import RemoteRegion

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.agents.reply import Reply
    from raynixl.moe.pool import Pool
    from raynixl.moe.slot import Slot

PATIENCE: Final = 0.3
"""Seconds that a rank has to answer a hello."""

ANSWER: Final = 1.0
"""Seconds after which a rank that has not said where a slot is is asked again; nobody waits for it so long."""

LATE: Final = 1.0
"""Seconds after which a rank that did not is asked again."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A session that wants to join: the way to it, and the slot that it announces."""

    token: str
    channel: Channel
    slot: int


class Meeting:
    """Answers those who want to meet this rank, and meets the others."""

    def __init__(  # noqa: PLR0913 - what all ranks must know
        self, agent: Agent, name: str, *, rank: int, names: dict[int, str], board: Board, pool: Pool, first: Slot,
        scene: str, placement: Callable[[], Placement],
    ) -> None:  # fmt: skip
        self.agent, self.name, self.rank, self.names = agent, name, rank, names
        self.token = secrets.token_hex(16)
        self.is_running = False
        self.missing: dict[int, str] = {}
        """Who did not answer the last time, and why."""
        self.gone: set[int] = set()
        """Who had ended when we asked the last time; who is merely slow, as UCX is when it starts, is not."""
        self._asked_late: dict[int, float] = {}  # by rank that let us wait, until when it is not asked again
        self._channels: dict[int, tuple[Channel, Hello]] = {}
        self._founders: dict[int, str] = {}
        self._board, self._pool = board, pool
        self._lanes = Lanes(board, agent.host)
        self._rows = RemoteRows(agent)
        self._hello = Hello(
            rank=rank, token=self.token, ranks=board.ranks, scene=scene, members=(), host=agent.host, pid=os.getpid(),
            is_running=False, board=Arena.of(board.region), slot=first.number, arena=Arena.of(first.region),
        )  # fmt: skip
        self._placement = placement
        self._lock = threading.Lock()  # protects _known, _founders, _arrivals and _asking
        self._known: dict[int, str] = {}  # by rank, the token of the session that we have met
        self._arrivals: dict[int, Arrival] = {}
        self._asking: dict[int, float] = {}  # by rank that we know, when it has asked us the last time
        self._is_closed = False
        try:
            agent.deliver(self._topic("line"), self._take_line)
            agent.serve(self._topic("hello"), self._answer)
            agent.serve(self._topic("slot"), self._answer_slot)
            agent.serve(self._topic("placement"), self._answer_placement)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def topic(name: str, what: str = "hello") -> str:
        """Return the topic under which the ranks of a group are asked."""
        return f"moe/{name}/{what}"

    def _topic(self, what: str) -> str:
        return self.topic(self.name, what)

    # Answering

    def _answer(self, peer: str, payload: bytes) -> bytes:
        """Tell a rank who we are; if we run already, remember it as one who wants to join."""
        hello = Hello.from_bytes(payload)
        self._check_member(peer, hello)
        if not self._is_like(hello):
            return self._hello.to_bytes()  # the other side says what differs
        told: dict[str, object] = {"lane": self._lanes.give(hello), "to": hello.token}
        if self.is_running:
            if hello.to == self.token:  # it knows us, and has told where we write to it
                self._take_arrival(hello)
            with self._lock:
                told["is_running"] = self._founders.get(hello.rank) != hello.token
            told["members"] = tuple(name for _, name in sorted(self.names.items()))
        return self._hello.model_copy(update=told).to_bytes()

    def _take_arrival(self, hello: Hello) -> None:
        """Remember who wants to join, and that it does still."""
        with self._lock:
            is_known = self._known.get(hello.rank) == hello.token
        if not is_known:
            arrival = Arrival(hello.token, self._open(hello), hello.slot)
            with self._lock:
                self._known[hello.rank] = hello.token
                self._arrivals[hello.rank] = arrival
        with self._lock:
            self._asking[hello.rank] = time.monotonic()

    def run(self, founders: dict[int, str]) -> None:
        """Take those who come from now on for ones who join, but for these sessions, which we have met."""
        with self._lock:
            self._founders = dict(founders)
            self._known.update(founders)
            self.is_running = True

    def _is_like(self, hello: Hello) -> bool:
        return hello.scene == self._hello.scene and hello.ranks == self._board.ranks

    def _check_member(self, peer: str, hello: Hello) -> None:
        """Refuse who is not one of us."""
        if self.names.get(hello.rank) != peer or hello.board.owner != peer or hello.arena.owner != peer:
            raise ConfigError(
                f"{peer!r} is not rank {hello.rank} of {self.name!r}",
                hint="give the same members in the same order everywhere; join() adds new ones", peer=peer,
            )  # fmt: skip

    def _check_like(self, peer: str, hello: Hello) -> None:
        """Refuse to go on with who was made otherwise."""
        if not self._is_like(hello):
            raise ConfigError(
                f"{peer!r} made {self.name!r} with {hello.scene}, max_ranks={hello.ranks}; we with "
                f"{self._hello.scene}, max_ranks={self._board.ranks}",
                hint="give the same arguments on every rank", peer=peer,
            )  # fmt: skip

    def _answer_slot(self, peer: str, payload: bytes) -> bytes:
        """Describe one of our slots to a rank that was told its number."""
        slot = self._pool.find(int(payload)) if payload.isdigit() and len(payload) < 20 else None
        if slot is None:
            raise ConfigError(f"{self.agent.name!r} has no slot {payload[:20]!r}", peer=peer)
        return slot.region.describe().to_bytes()

    def _answer_placement(self, _peer: str, _payload: bytes) -> bytes:
        """Tell who joins where experts are."""
        return self._placement().holders.astype("<i4").tobytes()

    def _take_line(self, peer: str, payload: bytes) -> None:
        """Write a line that came as a message where that session would have written it, had it mapped our board."""
        found = unpack_line(self.token, payload)
        if found is not None:
            token, cell, line = found
            self._lanes.write(token, peer, lambda lane: self._board.put(lane, cell, line))

    def arrivals(self) -> dict[int, Arrival]:
        """Take those who want to join, by rank; their lines are read from now on."""
        if not self._arrivals:
            return {}
        with self._lock:
            arrivals, self._arrivals = self._arrivals, {}
        return {rank: one for rank, one in arrivals.items() if self._lanes.bind(rank, one.token)}

    def asks_since(self, rank: int, moment: float) -> bool:
        """Whether a rank that we had met has asked us later than that: it has not begun, and still wants to."""
        with self._lock:
            asks = self._asking.pop(rank, 0.0) > moment
            if asks:
                self._founders.pop(rank, None)
        return asks

    # Meeting

    def placement_at(self, ranks: Sequence[int], digest: int, deadline: float) -> Placement:
        """Ask ranks that run where experts are; one answer of this digest is enough.

        Raises:
            TransferTimeout: there is none.
        """
        until = max(deadline, time.monotonic() + PATIENCE)
        replies = self._ask_all("placement", dict.fromkeys(ranks, b""), until)
        while replies:  # whoever is frozen among them holds up nobody
            for rank, reply in list(replies.items()):
                if not reply.done and len(replies) > 1:
                    continue
                del replies[rank]
                try:
                    answer = reply.wait()
                except RaynixlError:
                    continue  # it is lost, as the first operation will find
                placement = Placement(np.frombuffer(answer[: len(answer) // 4 * 4], "<i4"))
                if placement.digest == digest:
                    return placement
            time.sleep(0.001)
        raise TransferTimeout(f"no rank of {self.name!r} tells where experts are", hint="make it anew")

    def meet(self, ranks: list[int], deadline: float) -> dict[int, tuple[Channel, Hello]]:
        """Ask these ranks once who they are, until the deadline; return those that answered, with the way to each.

        Those that run are told at once where they may write to us.

        Raises:
            ConfigError: one was made otherwise.
        """
        self.missing = {}
        untold = self._ask_for_hellos([rank for rank in ranks if self._is_to_be_asked(rank)], deadline)
        self._ask_for_hellos(untold, deadline)
        return {rank: self._channels[rank] for rank in ranks if rank in self._channels}

    def _is_to_be_asked(self, rank: int) -> bool:
        is_heard = self._board.number(rank, Cell.WELCOME) > 0  # it lives: it has let us in
        if time.monotonic() < self._asked_late.get(rank, 0.0) and not is_heard:
            self.missing[rank] = "it does not answer"
            return False
        self.gone.discard(rank)
        return True

    def _ask_for_hellos(self, ranks: Sequence[int], deadline: float) -> list[int]:
        """Ask all of them, then hear them; return those that run and have not been told where they write to us."""
        requests = {rank: self._request(rank) for rank in ranks}
        asked = {rank: request.to_bytes() for rank, request in requests.items()}
        replies = self._ask_all("hello", asked, min(deadline, time.monotonic() + PATIENCE))
        heard = {rank: self._hear(rank, reply) for rank, reply in replies.items()}
        return [rank for rank, one in heard.items() if one and one.is_running and requests[rank].to != one.token]

    def _request(self, rank: int) -> Hello:
        """Return our hello for a rank; with its lane here if we know its session."""
        known = self._channels.get(rank)
        if known is None:
            return self._hello
        return self._hello.model_copy(update={"lane": self._lanes.give(known[1]), "to": known[1].token})

    def _ask_all(self, what: str, requests: dict[int, bytes], until: float) -> dict[int, Reply]:
        """Ask ranks at the same time; those that cannot be asked are missing."""
        replies = {}
        for rank, request in requests.items():
            left = until - time.monotonic()
            if left <= 0:
                self.missing[rank] = "it was not asked yet: others do not let us connect"
                continue
            try:
                replies[rank] = self.agent.ask(self.names[rank], self._topic(what), request, timeout=left)
            except RaynixlError as exc:
                self._miss(rank, exc)
        return replies

    def _hear(self, rank: int, reply: Reply) -> Hello | None:
        """Take what a rank answers; None if it does not.

        Raises:
            ConfigError: it was made otherwise.
        """
        try:
            hello = Hello.from_bytes(reply.wait())
            self._check_member(self.names[rank], hello)
        except RaynixlError as exc:
            self._miss(rank, exc)
            return None
        self._check_like(self.names[rank], hello)
        self._hear_of(hello)
        try:
            self._lanes.give(hello)
            known = self._channels.get(rank)
            channel = self._open(hello) if known is None or known[1].token != hello.token else known[0]
        except RaynixlError as exc:
            self._miss(rank, exc)
            return None
        self._lanes.bind(rank, hello.token)
        self._channels[rank] = (channel, hello)
        return hello

    def _miss(self, rank: int, error: RaynixlError) -> None:
        self._channels.pop(rank, None)
        self.missing[rank] = str(error)
        if isinstance(error, TransferTimeout):
            self._asked_late[rank] = time.monotonic() + LATE
        if isinstance(error, PeerLost | PeerUnknown):
            self.gone.add(rank)

    def _hear_of(self, hello: Hello) -> None:
        """Learn of members who have come since we were made.

        Raises:
            ConfigError: the others are not who we were told.
        """
        told = dict(enumerate(hello.members[: self._board.ranks]))
        if any(self.names.get(rank, name) != name for rank, name in told.items()):
            raise ConfigError(
                f"{hello.board.owner!r} knows {list(hello.members)}, we {[*self.names.values()]}",
                hint="give the same members in the same order everywhere; join() adds new ones",
            )
        self.names.update(told)

    def _open(self, hello: Hello) -> Channel:
        if hello.to != self.token or hello.lane >= self._board.lanes:
            raise IntegrityError(
                f"{hello.board.owner!r} does not tell where we may write to it", hint="run the same version everywhere"
            )
        board = self.agent.window(hello.board.remote)
        make: Callable[..., Channel] = partial(MappedChannel, self.agent, self._board.ranks)
        if not board.is_mapped:
            make = partial(FarChannel, self.agent, self._rows, mine=self.token)
        name = hello.board.owner

        def directions(slot: int) -> RemoteRegion | Reply:
            if slot == hello.slot:
                return hello.arena.remote
            return self.agent.peer(name).ask(self._topic("slot"), str(slot).encode(), timeout=ANSWER)

        return make(hello=hello, board=board, directions=directions, topic=self._topic("line"))

    def close(self) -> None:
        """Answer no more; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for what in ("hello", "slot", "placement"):
            self.agent.control.unserve(self._topic(what))
        self.agent.undeliver(self._topic("line"))
        self._rows.close()
        with self._lock:
            self._arrivals.clear()
        self._channels.clear()  # they hold on to us: without this, arenas stay mapped until Python collects its garbage

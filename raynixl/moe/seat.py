"""Seats: what one rank knows in the council of a layer, and what it tells who asks, in whatever thread."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from raynixl.conditions import Condition
from raynixl.errors import ConfigError, Masked
from raynixl.moe.asking import Asking
from raynixl.moe.conducting import Conductor
from raynixl.moe.view import NOT_YET, Answer, Ask, View
from raynixl.record import check_name

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.grid import Grid

logger = logging.getLogger(__name__)
GRACE: Final = 0.5
"""Seconds beyond the deadline for which a promise holds."""


@dataclass(slots=True)
class Promise:
    """That we end no operation until a leader has said how it goes on."""

    number: int
    leader: int
    until: float


@dataclass(frozen=True, slots=True)
class Charter:
    """What a seat is made with: the name of the layer, who its members are, and what all must have alike."""

    name: str
    rank: int
    names: list[str]
    scene: str
    """For people to read."""
    deadline: float
    most: int
    """How many ranks there may be."""
    grid: Grid | None
    """If it was given."""
    holders: Callable[[], tuple[int, ...]]
    """Tells where experts are."""


class Seat:
    """One rank's view, the ranks that it takes for lost, and those who want to come in."""

    def __init__(self, agent: Agent, charter: Charter) -> None:
        self.agent, self.charter = agent, charter
        self.rank, self.names, self.deadline = charter.rank, list(charter.names), charter.deadline
        self.token = secrets.token_hex(16)
        self.view: View | None = None
        """The latest that we know of."""
        self.adopted: View | None = None
        """That in which the caller's thread works, or is about to."""
        self.position = 0
        """How many operations were ended; NOT_YET for who has come and was not told."""
        self.barred: set[int] = set()
        self.suspects: dict[int, str] = {}
        """Ranks that are lost, with the token of the session that is."""
        self.applicants: dict[int, Ask] = {}
        self.asking = Asking(agent, self.topic(charter.name), lambda: self.names)
        self.changed = Condition(threading.RLock())  # protects all of this
        self.conductor = Conductor(self)
        self._promise: Promise | None = None
        self._granted = (NOT_YET, NOT_YET)  # number and leader of the last promise, also when that is over
        self._fresh: bool | None = None  # of the operation under way, if there is one
        self._masked: str | None = None

    @staticmethod
    def topic(name: str) -> str:
        """Return the topic under which the ranks of a layer are asked."""
        return f"moe/{name}/council"

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of the view in which we work that have not been lost since, as far as we know."""
        with self.changed:
            mine, latest = self.adopted, self.view
            if mine is None or latest is None:
                return ()
            is_left = {rank: latest.token(rank) == mine.token(rank) for rank in mine.live}
            return tuple(rank for rank in mine.live if is_left[rank] and rank not in self.suspects)

    def lost_of_view(self) -> dict[int, str]:
        """Return those that are lost and in the view still."""
        view = self.view
        return {} if view is None else {rank: one for rank, one in self.suspects.items() if view.has(rank, one)}

    def _check_masked(self) -> None:
        if self._masked is not None:
            raise Masked(self._masked, hint="rejoin() brings it back")

    def bar(self, rank: int) -> None:
        """Go on without a rank, until `unbar`."""
        with self.changed:
            self.barred.add(rank)
            self.suspect({rank}, "it was masked by hand, or leaves")

    def unbar(self, rank: int) -> None:
        """Let a rank in again when it asks."""
        with self.changed:
            self.barred.discard(rank)

    def expect(self, member: str) -> int:
        """Return the rank of a new member.

        Raises:
            ConfigError: it is one already, or no name.
        """
        check_name(member, "member")
        with self.changed:
            if member in self.names or len(self.names) >= self.charter.most:
                raise ConfigError(
                    f"{member!r} cannot join {self.names}",
                    hint="join() takes new names; who was masked calls rejoin(); max_ranks is for good",
                )
            self.names.append(member)
            return len(self.names) - 1

    def suspect(self, ranks: Iterable[int], why: str, view: View | None = None) -> None:
        """Take ranks for lost, as sessions of the latest view or of another one."""
        with self.changed:
            latest = self.view
            for rank in ranks:
                token = None if latest is None else (view or latest).token(rank)
                if token is None or rank == self.rank or self.suspects.get(rank) == token:
                    continue
                self.suspects[rank] = token
                if latest is not None and latest.has(rank, token):
                    logger.warning("rank %d takes rank %d (%r) for lost: %s", self.rank, rank, self.names[rank], why)

    # What others are told, and tell

    def take(self, view: View) -> None:
        """Learn of a view."""
        with self.changed:
            if self.view is not None and view.order <= self.view.order:
                return
            was_in = self.view is not None and self.view.has(self.rank, self.token)
            if was_in and not view.has(self.rank, self.token):
                self._masked = f"rank {self.rank} ({self.agent.name!r}) was masked by the others"
            elif was_in and view.since < self.position:  # our promise had run out before
                self._masked = f"rank {self.rank} ({self.agent.name!r}) has ended an operation that the others redo"
            elif not was_in and view.has(self.rank, self.token) and view.number > 0:
                self.position = NOT_YET  # whatever they tell of themselves: it may be later than that we are in
            self.view = view
            self.names.extend(member.name for member in view.members[len(self.names) :])
            self.suspects = self.lost_of_view()
            self.applicants = {
                rank: one for rank, one in self.applicants.items() if not view.has(rank, one.token)
            }  # fmt: skip
            self.release(view.number)

    def release(self, number: int | None = None, *, leader: int | None = None) -> None:
        """Go on, unless it is a later view that is prepared, or another leader's."""
        with self.changed:
            held = self._promise
            if held is not None and leader in (None, held.leader) and (number is None or held.number <= number):
                self._promise = None
            self.changed.notify_all()

    def put_off(self, ranks: Iterable[int]) -> None:
        """Forget that ranks want to come in, until they ask again."""
        with self.changed:
            for rank in ranks:
                self.applicants.pop(rank, None)

    def promise(self, number: int, leader: int) -> bool:
        """Promise to end no operation until this view is there; whether nobody else has, for it or a later one.

        Nor has a lower rank, which is still at it.
        """
        with self.changed:
            held, (highest, by) = self._promise, self._granted
            if held is not None and held.leader < leader and time.monotonic() < held.until:
                return False
            if number <= highest and leader != by:
                return False
            self._granted = (number, leader)
            self._promise = Promise(number, leader, time.monotonic() + self.deadline + GRACE)
            return True

    def next_number(self, *heard: int) -> int:
        """Return the number for a view that we prepare: no view of it was ever prepared, as far as we know or heard."""
        with self.changed:
            known = NOT_YET if self.view is None else self.view.number
            return max(known, self._granted[0], *heard) + 1

    def _answer(self, peer: str, payload: bytes) -> bytes:
        ask = Ask.from_bytes(payload)
        if ask.rank >= len(self.names) or self.names[ask.rank] != peer:
            raise ConfigError(
                f"{peer!r} is not rank {ask.rank} of {self.charter.name!r}",
                hint="give the same members in the same order everywhere; join() adds new ones", peer=peer,
            )  # fmt: skip
        is_refused = False
        match ask.kind:
            case "hello":
                self._hear_hello(ask)
            case "report":
                self._hear_of(ask)
                self.conductor.run(waits=False)  # who asks does so again until it is done
            case "prepare":
                is_refused = not self._prepare(ask)
            case "commit" if ask.view is not None:
                is_refused = not self.commit(ask.view, ask.rank)
        return self.said(ask, is_refused).to_bytes()

    def said(self, ask: Ask, is_refused: bool) -> Answer:
        with self.changed:
            view, adopted = self.view, self.adopted
            is_running = view is not None and not view.has(ask.rank, ask.token)
            return Answer(
                rank=self.rank, token=self.token, scene=self.charter.scene, host=self.agent.host, is_running=is_running,
                view=view, adopted=NOT_YET if adopted is None else adopted.number, position=self.position,
                is_busy=self._fresh is not None, granted=self._granted[0],
                barred=tuple(self.barred), names=tuple(self.names), is_refused=is_refused,
                holders=self.charter.holders() if ask.kind == "state" else (),
            )  # fmt: skip

    def _hear_hello(self, ask: Ask) -> None:
        """Remember who wants to come in; if we lead, let it."""
        with self.changed:
            view = self.view
            if (
                view is None
                or view.has(ask.rank, ask.token)
                or ask.scene != self.charter.scene
                or ask.rank in self.barred
            ):
                return
            self.suspect({ask.rank}, "it has begun anew")
            self.applicants[ask.rank] = ask
        self.conductor.run(waits=False)

    def _hear_of(self, ask: Ask) -> None:
        with self.changed:
            for rank, token in ask.suspects:
                if rank != self.rank and self.view is not None and self.view.has(rank, token):
                    self.suspects[rank] = token

    def _prepare(self, ask: Ask) -> bool:
        with self.changed:
            if self.view is None or self.view.number >= ask.number or (self.rank, self.token) in ask.suspects:
                return True  # what we know says it all
            self._hear_of(ask)
            return self.promise(ask.number, ask.rank)

    def commit(self, view: View, by: int) -> bool:
        """Take the view that a leader has made, or left as it was; False if we have promised another one meanwhile.

        A leader that was frozen meanwhile, so that its own promise has run out, must prepare again.
        """
        with self.changed:
            held, (number, leader) = self._promise, self._granted
            is_new = self.view is None or view.order > self.view.order
            is_awaited = view.number > number or by == leader or (view.number, view.leader) == (number, leader)
            is_late = by == self.rank and (held is None or held.leader != by or time.monotonic() > held.until)
            if is_new and (is_late or not is_awaited):
                return False
            self.take(view)
            self.release(leader=by)
            return True

    def ask(self, kind: str, **more: object) -> Ask:
        """Return a question of ours."""
        return Ask.model_validate({"kind": kind, "rank": self.rank, "token": self.token, **more})

    def close(self) -> None:
        """Answer no more."""
        self.agent.control.unserve(self.topic(self.charter.name))
        self.conductor.close()

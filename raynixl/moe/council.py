"""The council: how the ranks of a layer of two stages agree on who takes part, and from which operation on.

Each rank counts its operations. Whoever loses a rank reports it to the leader, the lowest rank that is left. The
leader has all others *prepare*: they tell how many operations they have ended, and end no further one meanwhile. From
the greatest of these numbers on the next view holds: nobody has returned from that operation, so that all can begin it
again. Then the view is *committed*. A leader that is lost meanwhile is followed by the next one, which finds among the
answers what the former has committed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from raynixl.errors import ConfigError, Masked, RaynixlError, TransferTimeout
from raynixl.moe.asking import Asking
from raynixl.moe.conducting import Conductor
from raynixl.moe.view import NOT_YET, Answer, Ask, Member, View, first_view
from raynixl.record import check_name

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.grid import Grid

logger = logging.getLogger(__name__)
AMID: Final = "it was lost amid an operation"
PATIENCE: Final = 0.5
"""Seconds that a rank has to answer a hello."""

PAUSE: Final = 0.002
"""Seconds between two rounds of hellos at first; they double up to MOST."""

MOST: Final = 0.1
LOOK: Final = 0.02
"""Seconds between two looks at whether the leader that we wait for still lives."""


class Regrouped(Exception):
    """There is a later view: what is under way begins again in it."""


@dataclass(slots=True)
class Promise:
    """That we end no operation until a leader has said how it goes on."""

    number: int
    leader: int
    until: float


class Council:
    """One rank's part in it. The caller's thread enters and ends operations; others answer who asks."""

    def __init__(
        self, agent: Agent, name: str, *, rank: int, names: list[str], scene: str, deadline: float, most: int,
        holders: Callable[[], tuple[int, ...]], grid: Grid | None,
    ) -> None:  # fmt: skip
        self.agent, self.rank, self.names, self.deadline = agent, rank, names, deadline
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
        self.asking = Asking(agent, self.topic(name), lambda: self.names)
        self.changed = threading.Condition(threading.RLock())  # protects all of this
        self.conductor = Conductor(self)
        self._name, self._scene, self._grid, self._holders = name, scene, grid, holders
        self._most = most
        self._promise: Promise | None = None
        self._fresh: bool | None = None  # of the operation under way, if there is one
        self._masked: str | None = None
        self._looked = 0.0

    @staticmethod
    def topic(name: str) -> str:
        """Return the topic under which the ranks of a layer are asked."""
        return f"moe/{name}/council"

    # Beginning

    def begin(self, deadline: float) -> View:
        """Meet all others that begin, or be let in by those that run; return the view in which we take part.

        Raises:
            ConfigError: another rank was made otherwise.
            TransferTimeout: not all came, or we were not let in, in time.
        """
        until, pause = time.monotonic() + deadline, PAUSE
        self.agent.serve(self.topic(self._name), self._answer)
        while True:
            others = [rank for rank in range(len(self.names)) if rank != self.rank]
            found = self.asking.all({rank: (self._hello(), None) for rank in others}, PATIENCE)
            answers = {rank: one for rank, one in found.items() if isinstance(one, Answer)}
            with self.changed:
                self._meet(answers, is_whole=len(answers) == len(others))
                if self.view is None:
                    self.changed.wait(pause)
                if self.view is not None and self.view.has(self.rank, self.token):
                    return self.view
            if time.monotonic() > until:
                missing = {self.names[rank]: str(one) for rank, one in found.items() if rank not in answers}
                raise self._late(missing, any(one.is_running for one in answers.values()))
            pause = min(MOST, 2 * pause)

    def _hello(self) -> Ask:
        return self.ask("hello", scene=self._scene, host=self.agent.host)

    def _meet(self, answers: dict[int, Answer], *, is_whole: bool) -> None:
        """Take the view that has us, or found one if nobody runs and all are there."""
        for rank, answer in answers.items():
            if answer.scene != self._scene:
                raise ConfigError(
                    f"{self.names[rank]!r} made {self._name!r} with {answer.scene}; we with {self._scene}",
                    hint="give the same arguments on every rank", peer=self.names[rank],
                )  # fmt: skip
            shared = list(zip(answer.names, self.names, strict=False))
            if any(one != other for one, other in shared):
                raise ConfigError(
                    f"{self.names[rank]!r} knows {list(answer.names)}, we {self.names}",
                    hint="give the same members in the same order everywhere; join() adds new ones",
                )
            if answer.view is not None and answer.view.has(self.rank, self.token):
                self.take(answer.view)
            if answer.is_running:
                self.position = NOT_YET
        if self.view is None and is_whole and not any(answer.is_running for answer in answers.values()):
            members = [
                Member(name=name, host=answers[rank].host, token=answers[rank].token)
                if rank != self.rank
                else Member(name=name, host=self.agent.host, token=self.token)
                for rank, name in enumerate(self.names)
            ]
            self.take(first_view(tuple(members), self._grid))

    def _late(self, missing: dict[str, str], is_running: bool) -> TransferTimeout:
        if is_running:
            return TransferTimeout(
                f"rank {self.rank} ({self.agent.name!r}) was not let in in time",
                hint="the active ranks let others in between two operations: they must call dispatch or combine, "
                "and join() or unmask() for ranks that are new or were masked by hand",
            )
        return TransferTimeout(
            f"not all ranks of {self._name!r} came: {missing}",
            hint="make TwoLevel on every member at the same time, with the same group",
        )

    def restart(self) -> None:
        """Become another session, which is not in any view."""
        with self.changed:
            self.token, self.view, self.adopted = secrets.token_hex(16), None, None
            self.position, self._promise, self._fresh, self._masked = 0, None, None, None
            self.suspects.clear()
            self.applicants.clear()

    def learn(self, view: View) -> tuple[int, ...] | None:
        """Ask those that were there before which operation is under way; return where experts are, unless we knew.

        Raises:
            Regrouped: there is a later view.
        """
        while self.position == NOT_YET:
            live = [rank for rank in view.live if rank != self.rank]
            found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in live}, PATIENCE)
            answers = [one for one in found.values() if isinstance(one, Answer)]
            know = [one for one in answers if one.adopted == view.number and one.position != NOT_YET]
            self.watch()
            if know:
                self.position = know[0].position
                return know[0].holders
            if not any(one.position != NOT_YET for one in answers):
                self.position = view.since  # nobody is left that was there before
        return None

    # Operations

    def enter(self, *, is_fresh: bool) -> None:
        """Begin an operation: a dispatch of tokens, in which ranks may come in, or another one.

        Raises:
            Masked: the others have gone on without us.
        """
        with self.changed:
            self._fresh = is_fresh
        self.go_on()

    def go_on(self) -> None:
        """Wait while a view is prepared, and have those that are lost taken out."""
        until = time.monotonic() + 2 * self.deadline + PATIENCE
        while True:
            with self.changed:
                self._check_masked()
                self._wait_promised()
                self._check_masked()
                if not self._lost_of_view():
                    return
            if time.monotonic() > until:
                raise TransferTimeout("the ranks that are left did not agree on who they are", hint="rejoin()")
            self._settle()
            with self.changed:
                if self._lost_of_view():
                    self.changed.wait(LOOK)

    @property
    def due(self) -> View | None:
        """The view in which the operation under way is to be done, if that is another one than we work in."""
        view = self.view
        if view is None or view == self.adopted or NOT_YET < self.position < view.since:
            return None
        return view if self._fresh or not view.is_joining else None

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of the view in which we work that have not been lost since, as far as we know."""
        with self.changed:
            mine, latest = self.adopted, self.view
            if mine is None or latest is None:
                return ()
            is_left = {rank: latest.token(rank) == mine.token(rank) for rank in mine.live}
            return tuple(rank for rank in mine.live if is_left[rank] and rank not in self.suspects)

    def adopt(self, view: View) -> None:
        """Work in a view from now on."""
        with self.changed:
            self.adopted = view

    def end(self, lost: set[int]) -> bool:
        """End an operation in which these ranks were lost; return whether it counts, or is to be done again.

        Raises:
            Masked: the others have gone on without us.
        """
        with self.changed:
            self._wait_promised()
            self._check_masked()
            if self.due is not None:
                return False
            self.suspect(lost, AMID, self.adopted)
        self.go_on()
        with self.changed:
            if self.due is not None:
                return False
            if self._promise is not None:
                return self.end(set())
            self.position, self._fresh = self.position + 1, None
            return True

    def give_up(self, why: str) -> None:
        """Leave an operation that the others go on with."""
        with self.changed:
            self._fresh, self._masked = None, self._masked or why
            self.release()

    def pause(self, lost: set[int]) -> None:
        """Between two stages of an operation: have those taken out at once who were lost in the first.

        Raises:
            Regrouped: there is a later view.
            Masked: the others have gone on without us.
        """
        if lost or self._promise is not None:
            with self.changed:
                self.watch()
                self.suspect(lost, AMID, self.adopted)
            self.go_on()
            self.watch()

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
            if member in self.names or len(self.names) >= self._most:
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

    def watch(self) -> None:
        """Look, while something is waited for, whether that still makes sense.

        Raises:
            Regrouped: there is a later view.
            Masked: the others have gone on without us.
        """
        with self.changed:
            self._check_masked()
            if self.due is not None:
                raise Regrouped

    def watch_building(self) -> None:
        """Look likewise, while the parts of a view are made; now and then, whether all who are needed still live.

        Raises:
            Regrouped: there is a later view, or has to be.
        """
        with self.changed:
            self._check_masked()
            if self.view is not None and self.view != self.adopted:
                raise Regrouped
        now = time.monotonic()
        if now - self._looked < PATIENCE:
            return
        self._looked = now
        assert self.view is not None
        self.suspect(self._ended(self.view), "it has ended", self.view)
        if self._lost_of_view():
            raise Regrouped

    def _ended(self, view: View) -> set[int]:
        """Return whose sessions are known to have ended; a lost connection may be that of a former process."""
        lost = [rank for rank in view.live if rank != self.rank and self.asking.is_lost(rank)]
        found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in lost}, PATIENCE)
        return {
            rank for rank, one in found.items() if isinstance(one, RaynixlError) and not isinstance(one, TransferTimeout)
        }  # fmt: skip

    def absent(self, view: View) -> set[int]:
        """Return who does not answer, or has not begun to work in a view."""
        live = [rank for rank in view.live if rank != self.rank]
        found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in live}, PATIENCE)
        return {
            rank for rank, one in found.items() if not isinstance(one, Answer) or one.adopted < view.number
        }  # fmt: skip

    def _lost_of_view(self) -> dict[int, str]:
        """Return those that are lost and in the view still."""
        view = self.view
        return {} if view is None else {rank: one for rank, one in self.suspects.items() if view.has(rank, one)}

    def _check_masked(self) -> None:
        if self._masked is not None:
            raise Masked(self._masked, hint="rejoin() brings it back")

    def _wait_promised(self) -> None:
        """Wait for the leader that prepares a view; `changed` is held."""
        while (promise := self._promise) is not None:
            self.changed.wait(LOOK)
            is_gone = promise.leader != self.rank and self.asking.is_lost(promise.leader)
            if self._promise is promise and (is_gone or time.monotonic() > promise.until):
                self._promise = None
                self.suspect({promise.leader}, "it prepares a view, and does not say how it goes on")

    def _settle(self) -> None:
        """Have the leader take out those that are lost; that may be ourselves."""
        with self.changed:
            view, lost = self.view, self._lost_of_view()
        assert view is not None
        leader = min(rank for rank in view.live if rank not in lost)
        if leader == self.rank:
            self.conductor.run()
            return
        ask = self.ask("report", suspects=tuple(lost.items()))
        answer = self.asking.one(leader, ask, self.deadline + PATIENCE, view.token(leader))
        with self.changed:
            if isinstance(answer, RaynixlError):
                self.suspect({leader}, f"it does not answer a report: {answer.message}", view)
            elif answer.view is not None:
                self.take(answer.view)

    # What others are told, and tell

    def take(self, view: View) -> None:
        """Learn of a view."""
        with self.changed:
            if self.view is not None and view.order <= self.view.order:
                return
            was_in = self.view is not None and self.view.has(self.rank, self.token)
            if was_in and not view.has(self.rank, self.token):
                self._masked = f"rank {self.rank} ({self.agent.name!r}) was masked by the others"
            self.view = view
            self.names.extend(member.name for member in view.members[len(self.names) :])
            self.suspects = self._lost_of_view()
            self.applicants = {
                rank: one for rank, one in self.applicants.items() if not view.has(rank, one.token)
            }  # fmt: skip
            self.release()

    def release(self) -> None:
        """Go on: nothing is prepared any more."""
        with self.changed:
            self._promise = None
            self.changed.notify_all()

    def promise(self, number: int, leader: int) -> bool:
        """Promise to end no operation until this view is there; whether no lower rank has asked that already."""
        with self.changed:
            held = self._promise
            if held is not None and held.leader < leader and time.monotonic() < held.until:
                return False
            self._promise = Promise(number, leader, time.monotonic() + self.deadline + PATIENCE)
            return True

    def _answer(self, peer: str, payload: bytes) -> bytes:
        ask = Ask.from_bytes(payload)
        if ask.rank >= len(self.names) or self.names[ask.rank] != peer:
            raise ConfigError(
                f"{peer!r} is not rank {ask.rank} of {self._name!r}",
                hint="give the same members in the same order everywhere; join() adds new ones", peer=peer,
            )  # fmt: skip
        is_refused = False
        match ask.kind:
            case "hello":
                self._hear_hello(ask)
            case "report":
                self._hear_of(ask)
                self.conductor.run()
            case "prepare":
                is_refused = not self._prepare(ask)
            case "commit" if ask.view is not None:
                is_refused = not self.commit(ask.view, ask.rank)
        return self._said(ask, is_refused).to_bytes()

    def _said(self, ask: Ask, is_refused: bool) -> Answer:
        with self.changed:
            view, adopted = self.view, self.adopted
            is_running = view is not None and not view.has(ask.rank, ask.token)
            return Answer(
                rank=self.rank, token=self.token, scene=self._scene, host=self.agent.host, is_running=is_running,
                view=view, adopted=NOT_YET if adopted is None else adopted.number, position=self.position,
                barred=tuple(self.barred), names=tuple(self.names), is_refused=is_refused,
                holders=self._holders() if ask.kind == "state" else (),
            )  # fmt: skip

    def _hear_hello(self, ask: Ask) -> None:
        """Remember who wants to come in; if we lead, let it."""
        with self.changed:
            view = self.view
            if view is None or view.has(ask.rank, ask.token) or ask.scene != self._scene or ask.rank in self.barred:
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
        """Take the view that a leader has made, or left as it was; False if we have promised another one meanwhile."""
        with self.changed:
            held = self._promise
            if held is not None and held.number == view.number and held.leader < by:
                return False
            self.take(view)
            if held is not None and held.leader == by:
                self.release()
            return True

    def ask(self, kind: str, **more: object) -> Ask:
        """Return a question of ours."""
        return Ask.model_validate({"kind": kind, "rank": self.rank, "token": self.token, **more})

    def close(self) -> None:
        """Answer no more."""
        self.agent.control.unserve(self.topic(self._name))
        self.conductor.close()

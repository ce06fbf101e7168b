"""The council: how the ranks of a layer of two stages agree on who takes part, and from which operation on.

Each rank counts its operations. Whoever loses a rank reports it to the leader, the lowest rank that is left. The
leader has all others *prepare*: they tell how many operations they have ended, and end no further one meanwhile. From
the greatest of these numbers on the next view holds: nobody has returned from that operation, so that all can begin it
again. Then the view is *committed*. A leader that is lost meanwhile is followed by the next one, which finds among the
answers what the former has committed.
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from raynixl.errors import ConfigError, RaynixlError, TransferTimeout
from raynixl.moe.seat import Seat
from raynixl.moe.view import NOT_YET, Answer, Ask, Member, View, first_view

AMID: Final = "it was lost amid an operation"
PATIENCE: Final = 0.5
"""Seconds that a rank has to answer a hello."""

SOON: Final = 0.25
"""Seconds that a rank has to answer that a stage has waited for in vain."""

PAUSE: Final = 0.002
"""Seconds between two rounds of hellos at first; they double up to MOST."""

MOST: Final = 0.1
LOOK: Final = 0.02
"""Seconds between two looks at whether the leader that we wait for still lives."""


class Regrouped(Exception):
    """There is a later view: what is under way begins again in it."""


class Council(Seat):
    """One rank's part in it: how it begins, and how its operations begin and end. For the caller's thread."""

    _looked = 0.0

    # Beginning

    def begin(self, deadline: float) -> View:
        """Meet all others that begin, or be let in by those that run; return the view in which we take part.

        Raises:
            ConfigError: another rank was made otherwise.
            TransferTimeout: not all came, or we were not let in, in time.
        """
        until, pause = time.monotonic() + deadline, PAUSE
        self.agent.serve(self.topic(self.charter.name), self._answer)
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
        return self.ask("hello", scene=self.charter.scene, host=self.agent.host)

    def _meet(self, answers: dict[int, Answer], *, is_whole: bool) -> None:
        """Take the view that has us, or found one if nobody runs and all are there."""
        for rank, answer in answers.items():
            if answer.scene != self.charter.scene:
                raise ConfigError(
                    f"{self.names[rank]!r} made {self.charter.name!r} with {answer.scene}; we with "
                    f"{self.charter.scene}",
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
            self.take(first_view(tuple(members), self.charter.grid))

    def _late(self, missing: dict[str, str], is_running: bool) -> TransferTimeout:
        if is_running:
            return TransferTimeout(
                f"rank {self.rank} ({self.agent.name!r}) was not let in in time",
                hint="the active ranks let others in between two operations: they must call dispatch or combine, "
                "and join() or unmask() for ranks that are new or were masked by hand",
            )
        return TransferTimeout(
            f"not all ranks of {self.charter.name!r} came: {missing}",
            hint="make TwoLevel on every member at the same time, with the same group",
        )

    def restart(self) -> None:
        """Become another session, which is not in any view."""
        with self.changed:
            self.token, self.view, self.adopted = secrets.token_hex(16), None, None
            self.position, self._promise, self._fresh, self._masked = 0, None, None, None
            self._granted = (NOT_YET, NOT_YET)
            self.suspects.clear()
            self.applicants.clear()

    def withdraw(self) -> None:
        """Be nobody's, after we were not let in in time; tell those that have let us in meanwhile, lest they wait."""
        with self.changed:
            view, token = self.view, self.token
            self.restart()
            self._masked = f"rank {self.rank} ({self.agent.name!r}) has not come back"
        if view is not None and view.has(self.rank, token):
            for rank in view.live:
                if rank != self.rank:
                    self.asking.tell(rank, self.ask("report", suspects=((self.rank, token),)))

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
                if not self.lost_of_view():
                    return
            if time.monotonic() > until:
                raise TransferTimeout("the ranks that are left did not agree on who they are", hint="rejoin()")
            self._settle()
            with self.changed:
                if self.lost_of_view():
                    self.changed.wait(LOOK)

    @property
    def due(self) -> View | None:
        """The view in which the operation under way is to be done, if that is another one than we work in."""
        view = self.view
        if view is None or view == self.adopted or NOT_YET < self.position < view.since:
            return None
        is_coming = self.position == NOT_YET  # so that it has nothing to end in any other view
        return view if self._fresh or is_coming or not view.is_joining else None

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
        self.suspect(self._surely(lost), AMID, self.adopted)
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
            self.watch()
            self.suspect(self._surely(lost), AMID, self.adopted)
            self.go_on()
            self.watch()

    def _surely(self, lost: set[int]) -> set[int]:
        """Return who is lost of those whom a stage goes on without: not who is amid the operation, and so waits, too.

        Whoever it waits for is lost: as soon as that is known, there is another view.
        """
        view, until = self.adopted, time.monotonic() + self.deadline
        assert view is not None
        while self.due is None:
            latest = self.view
            doubted = {rank for rank in lost if latest is not None and latest.token(rank) == view.token(rank)}
            found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in doubted}, SOON)
            busy = {rank for rank, one in found.items() if isinstance(one, Answer) and one.is_busy}
            if busy != doubted or not busy or time.monotonic() > until:
                return doubted - busy or doubted
            self.awaits_view(LOOK)
        return set()

    def awaits_view(self, seconds: float) -> bool:
        """Wait for another view in which the operation under way is to be done; return whether it has come.

        Raises:
            Masked: it is without us.
        """
        until = time.monotonic() + seconds
        with self.changed:
            while self.due is None and time.monotonic() < until:
                self._check_masked()
                self.changed.wait(max(0.0, until - time.monotonic()))
            self._check_masked()
            return self.due is not None

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
            if self.due is not None:
                raise Regrouped
        now = time.monotonic()
        if now - self._looked < PATIENCE:
            return
        self._looked = now
        assert self.view is not None
        self.suspect(self._ended(self.view), "it has ended", self.view)
        if self.lost_of_view():
            raise Regrouped

    def _ended(self, view: View) -> set[int]:
        """Return whose sessions are known to have ended; a lost connection may be that of a former process."""
        lost = [rank for rank in view.live if rank != self.rank and self.asking.is_lost(rank)]
        found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in lost}, PATIENCE)
        errors = {rank: one for rank, one in found.items() if isinstance(one, RaynixlError)}
        return {rank for rank, one in errors.items() if not isinstance(one, TransferTimeout)}

    def absent(self, view: View) -> set[int]:
        """Return who does not answer, or has not begun to work in a view."""
        live = [rank for rank in view.live if rank != self.rank]
        found = self.asking.all({rank: (self.ask("state"), view.token(rank)) for rank in live}, PATIENCE)
        return {
            rank for rank, one in found.items() if not isinstance(one, Answer) or one.adopted < view.number
        }  # fmt: skip

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
            view, lost = self.view, self.lost_of_view()
        assert view is not None
        leader = min(rank for rank in view.live if rank not in lost)
        if leader == self.rank:
            self.conductor.run()
            return
        began, ask = time.monotonic(), self.ask("report", suspects=tuple(lost.items()))
        answer = self.asking.one(leader, ask, self.deadline + PATIENCE, view.token(leader))
        is_crowded = isinstance(answer, TransferTimeout) and time.monotonic() - began < self.deadline
        with self.changed:
            if isinstance(answer, Answer):
                if answer.view is not None:
                    self.take(answer.view)
            elif not is_crowded:
                self.suspect({leader}, f"it does not answer a report: {answer.message}", view)

"""A storm: ranks take random steps, are killed, frozen, woken and replaced at any moment; all that they get is checked.

A rank stops once its phase passes a multiple of `ROUND`: all that take part do so behind the same step.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent_tools import eventually
from moe_fault_crews import LONG
from moe_faults import COMBINE, DISPATCH, OPTIONS, Report, Where, held_is_as_it_was, step
from moe_tools import Processes, make_experts

from raynixl import Masked
from raynixl.host import process_state

ROUND = 60
LAYOUTS = ("tokens", "experts", "slots")
BRIEF = 0.2


@dataclass(frozen=True)
class Course:
    """What came of a rank's round: its steps, and whether it was masked before their end."""

    reports: tuple[Report, ...]
    is_masked: str
    active: tuple[int, ...]
    agreed: tuple[int, ...]


# On the ranks


def storm_round(member: Any, layer: str, deadline: float) -> Course:
    """Take steps, drawn from their phases, to the end of the round, or until the others have given us up."""
    ep, reports, masked = member.eps[layer], [], ""
    end = (ep._session.phase // ROUND + 1) * ROUND
    try:
        while ep._session.phase < end:
            draw = random.Random(ep._session.phase)
            options = {"layout": draw.choice(LAYOUTS), "weights_at": draw.choice(("holder", "source"))}
            reports.append(step(member, layer, deadline=deadline, keep=draw.random() < 0.2, **options))
    except Masked as exc:
        masked = str(exc)
    held_is_as_it_was(member)
    return Course(tuple(reports), masked, ep.active, ep.agreed)


def storm_join(member: Any, names: list[str], options: dict[str, Any], deadline: float) -> Course:
    """Make a layer beside others that run, and take the rest of the steps of a round."""
    make_experts(member, names, dict(options))
    return storm_round(member, options["name"], deadline)


def storm_rejoin(member: Any, layer: str, deadline: float) -> Course:
    """Come back, and take the rest of the steps of a round."""
    member.eps[layer].rejoin(deadline=LONG)
    return storm_round(member, layer, deadline)


# The driver


@dataclass
class Storm:
    """A crew, and what has become of each of its ranks."""

    crew: Processes
    seed: int
    deadline: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    coming: set[int] = field(default_factory=set)
    zombies: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.world = len(self.crew.children)
        self.active = set(range(self.world))
        self.options = {"name": "layer", "deadline": LONG, **OPTIONS, **self.options}

    def count(self, what: str) -> None:
        """Count what happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def round(self, *, is_calm: bool = False) -> None:
        """Have ranks come back, take steps, and come to harm meanwhile."""
        away = set(range(self.world)) - self.active
        self._bring_back(is_calm=is_calm)
        harms = {} if is_calm else self._choose()
        for rank, (kind, where) in harms.items():
            if where is not None:
                number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
                self.crew.call("moe_faults:harm", where, number, ranks=[rank])
        for rank in self.active:
            self.crew.tell(rank, "moe_storm:storm_round", "layer", self.deadline)
        self._wake_zombies()
        for rank, (kind, where) in harms.items():
            if where is None:
                threading.Event().wait(self.random.uniform(0, 0.1))  # at any moment
                self._harm(rank, kind)
            self.count(kind)
        self._hear(harms, away | set(harms))

    def _bring_back(self, *, is_calm: bool) -> None:
        for rank in sorted(self.dead):
            self._replace(rank)
            self._tell_to_join(rank)
        self.dead.clear()
        for rank in sorted(self.frozen):
            choice = self.random.choice(["wake", "replace"] if is_calm else ["wake", "replace", "stay"])
            if choice == "wake":
                self.crew.resume(rank)
                course = self.crew.hear(rank)
                assert course.is_masked, f"rank {rank} was frozen for a round, and was not masked: {course}"
                self.crew.tell(rank, "moe_storm:storm_rejoin", "layer", self.deadline)
                self.coming.add(rank)
            elif choice == "replace":
                self.zombies.append(self._replace(rank))
                self._tell_to_join(rank)
            if choice != "stay":
                self.frozen.discard(rank)
                self.count(choice)

    def _replace(self, rank: int) -> Any:
        """Start a process in the place of another, which is returned; those that are busy or frozen are not told."""
        crew = self.crew
        former, new = crew.children[rank], crew._nursery.child(crew.names[rank] + crew._label)
        crew.children[rank] = new
        new.ask("meet", records=[child.record.hex() for child in crew.children])
        for other in self.active:
            crew.children[other].ask("meet", records=[new.record.hex()])
        return former

    def _tell_to_join(self, rank: int) -> None:
        self.crew.tell(rank, "moe_storm:storm_join", self.crew.names, self.options, self.deadline)
        self.coming.add(rank)

    def _choose(self) -> dict[int, tuple[str, Where | None]]:
        most = max(0, len(self.active) - 2)
        victims = self.random.sample(sorted(self.active), min(most, self.random.choice([0, 1, 1, 2])))
        kinds = ["kill", "freeze", "freeze briefly"]
        chosen = {rank: self.random.choice(kinds) for rank in victims}
        places = (*DISPATCH, *COMBINE)
        return {
            rank: (
                kind,
                self.random.choice(places) if kind != "freeze briefly" and self.random.random() < 0.5 else None,
            )
            for rank, kind in chosen.items()
        }

    def _harm(self, rank: int, kind: str) -> None:
        if kind == "kill":
            self.crew.kill(rank)
            return
        self.crew.stop(rank)
        if kind == "freeze briefly":
            threading.Event().wait(self.random.uniform(0, BRIEF))
            self.crew.resume(rank)

    def _wake_zombies(self) -> None:
        for zombie in [one for one in self.zombies if self.random.random() < 0.7]:
            zombie.signal(signal.SIGCONT)
            self.count("wake a zombie")
            if self.random.random() < 0.5:
                zombie.hear()  # it has found that it is masked
                zombie.kill()
                self.zombies.remove(zombie)

    def _hear(self, harms: dict[int, tuple[str, Where | None]], away: set[int]) -> None:
        """Hear who has come to no harm, and then who joined."""
        gone = {rank for rank, (kind, _) in harms.items() if kind != "freeze briefly"}
        rest = self.active - gone
        courses = {rank: self.crew.hear(rank) for rank in sorted(rest)}
        masked = {rank for rank, course in courses.items() if course.is_masked}
        assert masked <= set(harms), {rank: courses[rank].is_masked for rank in masked}
        for rank in masked:  # it stood for longer than it seemed: the others were slow before
            self.crew.tell(rank, "moe_storm:storm_rejoin", "layer", self.deadline)
        rest -= masked
        for rank in rest:
            self._check(rank, courses[rank], away | self.coming)
            assert rest <= set(courses[rank].active), (rank, courses[rank].active, rest)
        assert len({courses[rank].agreed for rank in rest}) < 2, {rank: courses[rank].agreed for rank in rest}
        self.active = rest
        self._settle(gone, harms)
        joined = {rank for rank in self.coming if all(rank in courses[other].active for other in rest)}
        self.coming |= masked
        for rank in sorted(joined):
            course = self.crew.hear(rank)
            assert not course.is_masked, (rank, course)
            self._check(rank, course, away | self.coming)
            self.coming.discard(rank)
            self.active.add(rank)
            self.count("join")

    def _settle(self, gone: set[int], harms: dict[int, tuple[str, Where | None]]) -> None:
        """Note what has become of those that were to come to harm."""
        for rank in gone:
            child = self.crew.children[rank]
            if harms[rank][1] is not None:
                eventually(lambda child=child: process_state(child.pid) in ("", "Z", "T"), f"rank {rank} comes to harm")
            if harms[rank][0] == "kill":
                if child.is_alive:  # at its place: nobody has waited for it yet
                    child.wait_ended()
                self.dead.add(rank)
            else:
                self.frozen.add(rank)

    def _check(self, rank: int, course: Course, allowed: set[int]) -> None:
        for report in course.reports:
            assert set(report.missing) | set(report.unheard) | set(report.lost) <= allowed, (rank, report, allowed)
            self.count("step")

    def settle(self) -> None:
        """Let everybody come back; then nothing is missing any more, nor kept for those that are gone."""
        for _ in range(40):
            if len(self.active) == self.world:
                break
            self.round(is_calm=True)
        for zombie in self.zombies:
            zombie.kill()
        self.zombies.clear()
        for reports in self.crew.call("moe_faults:steps", "layer", 3):
            assert not any(report.missing or report.unheard for report in reports)
        assert self.crew.call("moe_faults:quarantined", "layer") == [[]] * self.world


def endure(crew: Processes, seed: int, *, goes_on: Callable[[int], bool], **options: Any) -> Storm:
    """Go through rounds for as long as that says so, and let everybody come back."""
    storm, rounds = Storm(crew, seed, options=options), 0
    try:
        while goes_on(rounds):
            storm.round()
            rounds += 1
        storm.settle()
    except BaseException as error:
        error.add_note(f"storm {seed}, {options} in round {rounds}, behind {storm.counts}")
        raise
    finally:
        for zombie in storm.zombies:
            zombie.kill()
    return storm

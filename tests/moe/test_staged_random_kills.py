"""Random kills and restarts in two stages, two at once or amid a join among them: every result is checked."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from moe_fault_crews import LONG, SOON
from moe_faults import OPTIONS, Report
from moe_tools import Processes

from raynixl.moe.grid import Grid

WORLD, EVERY = 5, 40
GRID = Grid(((0, 1, 2), (3, 4)))


class Trial:
    """A crew in which ranks are killed at any moment, and come back one by one."""

    def __init__(self, crew: Processes, seed: int) -> None:
        self.crew, self.random = crew, random.Random(seed)
        self.active, self.joining = set(range(WORLD)), -1
        self.kills = self.joins = self.checked = self.partly = 0
        self.options = {"name": "layer", "deadline": LONG, "grid": GRID, **OPTIONS}

    def round(self, most: int = 2) -> None:
        """Have the active ranks take twenty steps, some be killed meanwhile, and one that was killed before join."""
        count = min(self.random.choice([0, 1, 1, 2]), most, len(self.active) - 2)
        doomed = set(self.random.sample(sorted(self.active), count))
        allowed = set(range(WORLD)) - self.active | doomed
        if self.joining < 0 and len(self.active) < WORLD:
            self.joining = min(set(range(WORLD)) - self.active)
            self.crew.restart(self.joining)
            self.crew.tell(
                self.joining, "moe_staged_faults:join_round", self.crew.names, self.options, EVERY
            )  # fmt: skip
        for rank in self.active:
            self.crew.tell(rank, "moe_staged_faults:one_round", "layer", EVERY)
        for rank in sorted(doomed):
            threading.Event().wait(self.random.uniform(0, 0.1))  # at any moment
            self._kill(rank)
        self.active -= doomed
        last = [self._check(self.crew.hear(rank), allowed)[-1] for rank in sorted(self.active)]
        if self.joining >= 0 and any(self.joining in report.active for report in last):
            self._check(self.crew.hear(self.joining), allowed)
            self.active.add(self.joining)
            self.joining, self.joins = -1, self.joins + 1

    def settle(self) -> None:
        """Let everybody come back; then nothing is missing any more."""
        while self.active != set(range(WORLD)):
            self.round(most=0)
        for reports in self.crew.call("moe_faults:steps", "layer", 3):
            assert not any(report.missing or report.unheard for report in reports)

    def _kill(self, rank: int) -> None:
        if self.joining >= 0 and self.random.random() < 0.2:
            self.crew.kill(self.joining)  # too
            self.joining, self.kills = -1, self.kills + 1
        self.crew.kill(rank)
        self.kills += 1

    def _check(self, reports: Sequence[Report], allowed: set[int]) -> Sequence[Report]:
        """Fail if more is missing than what is lost, but in the few steps amid which somebody was lost."""
        for report in reports:
            assert set(report.lost) <= allowed, report
            assert report.seconds < SOON, report
        partly = [one for one in reports if (set(one.missing) | set(one.unheard)) - allowed]
        assert len(partly) <= 2, partly  # at most one for each that was killed
        self.partly += len(partly)
        self.checked += len(reports)
        return reports


def endure(rounds: int, seed: int) -> Trial:
    """Go through so many rounds, and let everybody come back."""
    with Processes(WORLD) as crew:
        trial = Trial(crew, seed)
        crew.call("moe_staged_faults:make", crew.names, trial.options)
        try:
            for _ in range(rounds):
                trial.round()
            trial.settle()
            crew.call("moe_faults:drop", "layer")
        except BaseException as error:
            error.add_note(f"endure({rounds}, {seed}) behind {trial.kills} kills and {trial.joins} joins")
            for rank in range(WORLD):
                if crew.children[rank].is_alive:
                    crew.kill(rank)
            raise
        return trial


def test_sixty_steps_with_random_kills() -> None:
    assert endure(3, 1).checked > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_thousand_steps_with_random_kills(seed: int) -> None:
    trial = endure(50, seed)
    assert trial.kills > 20
    assert trial.joins > 20

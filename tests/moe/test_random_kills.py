"""Random kills and restarts, two at once or amid a join among them: every survivor's every result is checked."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from moe_fault_crews import LONG, SOON, layer
from moe_faults import OPTIONS, Report
from moe_tools import Processes
from weights_nursery import Nursery

WORLD = 5
STEPS_PER_ROUND = 20


class Trial:
    """A crew in which ranks are killed at any moment, and come back one by one."""

    def __init__(self, crew: Processes, seed: int) -> None:
        self.crew, self.random = crew, random.Random(seed)
        self.active, self.joining = set(range(WORLD)), None
        self.kills = self.joins = self.checked = 0

    def round(self) -> None:
        """Have the active ranks take twenty steps, some be killed meanwhile, and one that was killed before join."""
        doomed = self._choose()
        allowed = set(range(WORLD)) - self.active | doomed
        if self.joining is None and len(self.active) < WORLD:
            self.joining = min(set(range(WORLD)) - self.active)
            self.crew.restart(self.joining)
            options = {"name": "layer", "max_ranks": 8, "deadline": LONG, **OPTIONS}
            self.crew.tell(self.joining, "moe_faults:join_round", self.crew.names, options)
        for rank in self.active:
            self.crew.tell(rank, "moe_faults:one_round", "layer")
        for rank in sorted(doomed):
            threading.Event().wait(self.random.uniform(0, 0.1))  # at any moment
            self._kill(rank)
        self.active -= doomed
        last = [self._check(self.crew.hear(rank), allowed)[-1] for rank in sorted(self.active)]
        if self.joining is not None and any(self.joining in report.active for report in last):
            self._check(self.crew.hear(self.joining), allowed)
            self.active.add(self.joining)
            self.joining, self.joins = None, self.joins + 1

    def settle(self) -> None:
        """Let everybody come back; then nothing is missing any more."""
        while self.active != set(range(WORLD)):
            self.round()
        for reports in self.crew.call("moe_faults:steps", "layer", 3):
            assert not any(report.missing or report.unheard for report in reports)

    def _choose(self) -> set[int]:
        count = self.random.choice([0, 1, 1, 2])
        return set(self.random.sample(sorted(self.active), min(count, len(self.active) - 2)))

    def _kill(self, rank: int) -> None:
        if self.joining is not None and self.random.random() < 0.2:
            self.crew.kill(self.joining)  # too
            self.joining, self.kills = None, self.kills + 1
        self.crew.kill(rank)
        self.kills += 1

    def _check(self, reports: Sequence[Report], allowed: set[int]) -> Sequence[Report]:
        for report in reports:
            assert set(report.missing) | set(report.unheard) | set(report.lost) <= allowed, report
            assert report.seconds < SOON
            self.checked += 1
        return reports


def endure(nursery: Nursery, rounds: int, seed: int) -> Trial:
    """Go through so many rounds, and let everybody come back."""
    with Processes(WORLD, lent=nursery) as crew, layer(crew, max_ranks=8):
        trial = Trial(crew, seed)
        try:
            for _ in range(rounds):
                trial.round()
            trial._choose = set
            trial.settle()
        except BaseException as error:
            error.add_note(f"endure({rounds}, {seed}) behind {trial.kills} kills and {trial.joins} joins")
            raise
        assert crew.call("moe_faults:quarantined", "layer") == [[]] * WORLD
        return trial


def test_sixty_steps_with_random_kills(nursery: Nursery) -> None:
    assert endure(nursery, 3, 1).checked > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_thousand_steps_with_random_kills(nursery: Nursery, seed: int) -> None:
    trial = endure(nursery, 1000 // STEPS_PER_ROUND, seed)
    assert trial.kills > 20
    assert trial.joins > 20

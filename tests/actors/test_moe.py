"""Expert parallelism among decorated actors: exact steps, a rank that Ray kills, and another one under its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from actor_tools import get
from agent_tools import eventually
from moe_faults import OPTIONS, Report, step, steps, steps_until

import raynixl as rx

pytestmark = pytest.mark.ray
Make = Callable[..., Any]
NAMES = [f"expert-{rank}" for rank in range(4)]
EVERYBODY, VICTIM, REST = (0, 1, 2, 3), 2, (0, 1, 3)
DEADLINE = 50.0
SOON = 15.0
"""Seconds in which a rank that is killed is masked: long before the deadline, also on a busy machine."""


@ray.remote(num_cpus=0)
@rx.worker
class Expert:
    """One rank."""

    def join(self, names: list[str]) -> tuple[int, ...]:
        """Make the layer, with all others or beside them; return who is active."""
        group = rx.Group(rx.agent(), names)
        self.ep = rx.ExpertParallel(group, deadline=DEADLINE, **OPTIONS)
        self.member = SimpleNamespace(eps={"moe": self.ep}, kept={})
        return self.ep.active

    def steps(self, count: int) -> list[Report]:
        """Take steps, each of which is checked."""
        return steps(self.member, "moe", count, deadline=DEADLINE)

    def steps_until(self, active: tuple[int, ...]) -> None:
        """Take steps until these are active, one at least if they are now: we were let in for it."""
        if self.ep.active == active:
            step(self.member, "moe", deadline=DEADLINE)
        steps_until(self.member, "moe", active, deadline=DEADLINE)


def check(found: list[list[Report]], lost: tuple[int, ...] = (), gone: tuple[int, ...] = ()) -> None:
    """Fail unless steps were whole, but for the ranks that were lost in them and those that were gone before."""
    for reports in found:
        for report in reports:
            assert report.lost == lost
            assert set(report.unheard) == set(report.missing) == {*lost, *gone}


def test_a_rank_that_ray_kills_is_masked_at_once_and_one_of_its_name_takes_its_place(make: Make) -> None:
    ranks = [make(Expert, options={"name": name}) for name in NAMES]
    assert get([rank.join.remote(NAMES) for rank in ranks]) == [EVERYBODY] * 4
    check(get([rank.steps.remote(20) for rank in ranks]))

    waiting = [ranks[rank].steps.remote(1) for rank in REST]
    done, _ = ray.wait(waiting, timeout=0.3)
    assert not done  # they wait for the victim
    began = time.monotonic()
    ray.kill(ranks[VICTIM])
    check(get(waiting), lost=(VICTIM,))
    assert time.monotonic() - began < SOON
    check(get([ranks[rank].steps.remote(5) for rank in REST]), gone=(VICTIM,))

    ranks[VICTIM] = named_anew(make, NAMES[VICTIM])
    joining = ranks[VICTIM].join.remote(NAMES)
    stepping = [ranks[rank].steps_until.remote(EVERYBODY) for rank in REST]
    assert get(joining) == EVERYBODY
    get([*stepping, ranks[VICTIM].steps_until.remote(EVERYBODY)])
    check(get([rank.steps.remote(5) for rank in ranks]))


def named_anew(make: Make, name: str) -> Any:
    """Start an actor under the name of one that was killed, once Ray has let go of it."""

    def is_free() -> bool:
        try:
            ray.get_actor(name)
        except ValueError:
            return True
        return False

    eventually(is_free, f"{name} is free")
    return make(Expert, options={"name": name})

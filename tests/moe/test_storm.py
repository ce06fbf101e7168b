"""Ranks in a storm: killed, frozen, woken and replaced at random moments and places; every result is checked."""

from __future__ import annotations

import time

import pytest
from moe_fault_crews import layer
from moe_storm import endure
from moe_tools import Processes
from weights_nursery import Nursery

WORLD = 5
MINUTES = 2.0


def crew_of(backend: str, nursery: Nursery) -> Processes:
    """Five processes."""
    if backend == "ucx":
        pytest.importorskip("ucxx")
    return Processes(WORLD, backends=(backend,), lent=nursery)


@pytest.mark.parametrize("backend", ["shm", "ucx"])
def test_a_short_storm(backend: str, nursery: Nursery) -> None:
    with crew_of(backend, nursery) as crew, layer(crew, max_ranks=8):
        storm = endure(crew, 5, goes_on=lambda rounds: rounds < 3, max_ranks=8)
        assert storm.counts["step"] > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [{}, {"capacity": 1}], ids=["places known", "places asked for"])
@pytest.mark.parametrize("backend", ["shm", "ucx"])
def test_minutes_of_storm(backend: str, options: dict[str, int], nursery: Nursery) -> None:
    until = time.monotonic() + 60 * MINUTES
    with crew_of(backend, nursery) as crew, layer(crew, max_ranks=8, **options):
        storm = endure(crew, 6, goes_on=lambda _: time.monotonic() < until, max_ranks=8, **options)
        assert min(storm.counts[what] for what in ("kill", "freeze", "wake", "replace", "join")) > 2

"""A thousand random programs, each with all its ranks in one process: they return the bits of the reference.

A program that fails is printed with its seed, by which it is drawn again. The twin plays the first of each batch.
Most batches are slow: `make soak` plays them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moe_tools import Processes
from weights_nursery import Nursery

BATCHES, PROGRAMS, OF_TWIN = 20, 50, 12
QUICK = 6
PLAYERS = 2


@pytest.fixture(scope="module")
def players(nursery: Nursery) -> Iterator[Processes]:
    """Processes that play programs, each by itself: one for each core of a small machine."""
    with Processes(PLAYERS, lent=nursery) as made:
        yield made


@pytest.mark.parametrize(
    "batch", [*range(QUICK), *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(QUICK, BATCHES))]
)
def test_random_programs(players: Processes, batch: int) -> None:
    played = players.call("moe_far:play_random", batch * PROGRAMS, PROGRAMS, OF_TWIN, PLAYERS)
    assert sum(played) in (PROGRAMS, OF_TWIN)

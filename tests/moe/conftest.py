"""Crews for the tests of expert parallelism: agents are made once for each module, processes in one nursery."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from agent_tools import make_agent
from moe_pools import NBYTES
from moe_programs import Mask, Place, Program, check, play
from moe_tools import CHILD, Layers, Threads
from weights_nursery import Nursery

from raynixl import Agent
from raynixl.moe.pool import Pool


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where the processes of all crews are born, which has imported what they need."""
    made = Nursery(CHILD)
    yield made
    made.close()


@pytest.fixture(scope="module")
def crew() -> Iterator[Threads]:
    """Eight ranks of this process; a program takes as many of them as its world has."""
    with Threads(8) as made:
        yield made


@pytest.fixture(scope="module")
def layers(crew: Threads) -> Iterator[Layers]:
    """What programs are played on, one after another."""
    made = Layers(crew)
    yield made
    made.close()


@pytest.fixture
def plays(crew: Threads, layers: Layers) -> Callable[[Program], None]:
    """Play a program, and hold what it returns against the reference.

    Programs that find their layer as others leave it share it.
    """

    def run(program: Program) -> None:
        changes = any(isinstance(step, Place | Mask) for step in program.steps)
        made = crew.experts if changes else layers.of
        with made(program.world, **program.options()) as layer:
            check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))

    return run


@pytest.fixture
def agent(nothing_left: object) -> Iterator[Agent]:
    """An agent whose arenas are closed with it."""
    one = make_agent("owner", backends=("loopback", "shm"))
    yield one
    one.close()


@pytest.fixture
def pool(agent: Agent) -> Iterator[Pool]:
    """A pool of small slots."""
    one = Pool(agent, NBYTES, "test")
    yield one
    one.close()

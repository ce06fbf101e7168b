"""Crews for the tests of expert parallelism: agents are made once for each module, processes in one nursery."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from agent_tools import make_agent
from moe_pools import NBYTES
from moe_programs import Program, check, play
from moe_tools import CHILD, Threads
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


@pytest.fixture
def plays(crew: Threads) -> Callable[[Program], None]:
    """Play a program on the crew, and hold what it returns against the reference."""

    def run(program: Program) -> None:
        with crew.experts(program.world, **program.options()) as layer:
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

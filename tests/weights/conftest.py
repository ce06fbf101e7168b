"""What the tests of weight sync share: agents of one process, and agents of their own processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from weights_nursery import Nursery

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.directory import InMemoryDirectory


class Fleet:
    """Agents of this process that know each other."""

    def __init__(self):
        self.directory = InMemoryDirectory()
        self.agents = []

    def __call__(self, name, **settings):
        agent = Agent(name, config=from_env(AgentConfig(**settings)), directory=self.directory)
        self.agents.append(agent)
        return agent


@pytest.fixture
def fleet():
    made = Fleet()
    yield made
    for agent in made.agents:
        agent.close()


@pytest.fixture(scope="session")
def nursery():
    made = Nursery(Path(__file__).parent / "child.py")
    yield made
    made.close()


@pytest.fixture
def children(nursery):
    """Start children by name, and introduce them and given agents to each other."""
    made = []

    def start(*names, known=()):
        fresh = [nursery.child(name) for name in names]
        made.extend(fresh)
        for child in fresh:
            for other in fresh:
                child.ask("meet", record=other.record.hex())
            for agent in known:
                child.ask("meet", record=agent.record().hex())
                agent.peer(child.record)
        return fresh

    yield start
    for child in made:
        child.kill()

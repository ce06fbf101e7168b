"""Pairs of agents over each backend; every test here leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from agent_tools import introduce, make_agent

from raynixl import Agent


@pytest.fixture(autouse=True)
def _leaves_nothing(nothing_left: Callable[[], list[str]]) -> None:
    """Every test of this directory is held to it."""


@pytest.fixture(params=["loopback", "shm"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend under test."""
    return str(request.param)


@pytest.fixture
def new_agent(_leaves_nothing: None) -> Iterator[Callable[..., Agent]]:
    """Make agents that are closed at the end, last made first."""
    with ExitStack() as stack:
        yield lambda name, **settings: stack.enter_context(make_agent(name, **settings))


@pytest.fixture
def pair(new_agent: Callable[..., Agent], backend: str) -> tuple[Agent, Agent]:
    """Two agents of this process that know each other, over one backend."""
    settings: dict[str, Any] = {"backends": (backend,)}
    alice, bob = new_agent("alice", **settings), new_agent("bob", **settings)
    introduce(alice, bob)
    return alice, bob

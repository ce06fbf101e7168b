"""Pairs of agents over each backend; every test here leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from agent_scenes import N, Scene
from agent_tools import PATIENCE, introduce, make_agent, random_bytes
from vram_tools import made_up_gpus

from raynixl import Agent


@pytest.fixture(autouse=True)
def _leaves_nothing(nothing_left: Callable[[], list[str]]) -> None:
    """Every test of this directory is held to it."""


@pytest.fixture(params=["loopback", "shm"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend under test."""
    return str(request.param)


@pytest.fixture
def gpus() -> Iterator[Any]:
    """A made-up driver with two GPUs, which finds what is left in the end."""
    with made_up_gpus() as fake:
        yield fake


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


@pytest.fixture(params=["user", "arena"])
def scene(pair: tuple[Agent, Agent], request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A pair that has moved bytes already, so that what follows meets bound regions too."""
    alice, bob = pair
    around = random_bytes(3 * N, seed=1)
    if request.param == "arena":
        mine, bobs = alice.empty(N, name="mine"), bob.empty(N, name="theirs")
        bobs.array()[:] = around[N : 2 * N]
    else:
        mine = alice.register(np.zeros(N, np.uint8), name="mine")
        bobs = bob.register(around[N : 2 * N], name="theirs")
    theirs = alice.peer("bob")["theirs"]
    alice.read(theirs, mine).wait(PATIENCE)
    scene = Scene(alice, bob, mine, theirs, bobs, around, around.copy())
    yield scene
    scene.forget()

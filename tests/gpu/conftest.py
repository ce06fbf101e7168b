"""Fixtures of the tests that need a GPU: skipped with the reason where there is none; far processes, shared or own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from gpu_tools import Far, Fars, skip_without_gpu

from raynixl import Agent, AgentConfig


@pytest.fixture(autouse=True, scope="session")
def _needs_gpu() -> None:
    skip_without_gpu()


@pytest.fixture(scope="session")
def fars(_needs_gpu: None) -> Iterator[Fars]:
    """Far processes that tests share: `fars(backends=["nvlink", "shm"])`."""
    made = Fars()
    yield made
    made.close()


@pytest.fixture
def make_far() -> Iterator[Callable[..., Far]]:
    """Start a far process of the test's own, to be killed or to be counted: `make_far(backends=[...])`."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Far(**settings))


@pytest.fixture
def make_near() -> Iterator[Callable[..., Agent]]:
    """Make agents of this process, which close with the test: `make_near(backends=("nvlink", "shm"))`."""
    with ExitStack() as stack:
        count = 0

        def make(**settings: Any) -> Agent:
            nonlocal count
            count += 1
            return stack.enter_context(Agent(f"near-{count}", config=AgentConfig(**settings)))

        yield make

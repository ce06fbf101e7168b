"""One cluster for each module of tests, which leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from actor_tools import INIT, driver_environment
from agent_tools import eventually


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raynixl")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this process's own; the value is its address. `ray.shutdown()` ends the driver's agent too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", driver_environment()["PYTHONPATH"])  # workers inherit it
        ray.init(address="local", **INIT)
        yield str(ray.get_runtime_context().gcs_address)
        ray.shutdown()
    eventually(lambda: not _threads(), "the driver's agent ends with Ray")


@pytest.fixture
def make(cluster: str) -> Iterator[Callable[..., Any]]:
    """Make actors that are killed at the end of the test: make(Class, *args, options={...}, **kwargs)."""
    made: list[Any] = []

    def start(kind: Any, *arguments: Any, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
        made.append(kind.options(**(options or {})).remote(*arguments, **keywords))
        return made[-1]

    yield start
    for handle in made:
        ray.kill(handle)

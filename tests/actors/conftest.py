"""One cluster for all tests of this directory, which leaves nothing behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from actor_tools import INIT, driver_environment
from agent_tools import eventually

HERE = Path(__file__).parent


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raynixl")]


class Cluster:
    """A cluster of this process's own, from the first test that asks for it to the last one of this directory."""

    def __init__(self) -> None:
        self._opened: contextlib.ExitStack | None = None

    def start(self) -> str:
        """Start it, if it does not run; return its address."""
        if self._opened is None:
            with contextlib.ExitStack() as opened:
                patch = opened.enter_context(pytest.MonkeyPatch.context())
                patch.setenv("PYTHONPATH", driver_environment()["PYTHONPATH"])  # workers inherit it
                ray.init(address="local", num_gpus=2, **INIT)  # made-up ones: Ray only counts them
                opened.callback(ray.shutdown)
                self._opened = opened.pop_all()
        return str(ray.get_runtime_context().gcs_address)

    def end(self) -> None:
        """End it; `ray.shutdown()` ends the driver's agent too."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
            eventually(lambda: not _threads(), "the driver's agent ends with Ray")


_CLUSTER = Cluster()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """End the cluster when no further test of this directory comes."""
    try:
        return (yield)
    finally:
        if nextitem is None or HERE not in nextitem.path.parents:
            _CLUSTER.end()


@pytest.fixture
def cluster() -> str:
    """The address of the cluster."""
    return _CLUSTER.start()


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

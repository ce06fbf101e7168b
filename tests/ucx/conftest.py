"""Worlds of real processes over each lane of UCX; every test here leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lane_tools import LANES, LaneWorld, config_for


@pytest.fixture(autouse=True)
def _leaves_nothing(nothing_left: Callable[[], list[str]]) -> None:
    """Every test of this directory is held to it."""


@pytest.fixture(params=LANES, ids=["cma", "tcp"])
def tls(request: pytest.FixtureRequest) -> str:
    """The transports that UCX may use."""
    return str(request.param)


@pytest.fixture
def world(tls: str, _leaves_nothing: None) -> Iterator[LaneWorld]:
    """Three processes with an agent each, which reach each other over one lane."""
    with LaneWorld(config_for(tls)) as world:
        yield world

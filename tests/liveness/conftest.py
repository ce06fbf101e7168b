"""A fresh world of real processes for each test, which leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from liveness_tools import World


@pytest.fixture
def world(nothing_left: Callable[[], list[str]]) -> Iterator[World]:
    """Three processes with an agent each."""
    with World() as world:
        yield world
    assert not [name for name in os.listdir("/dev/shm") if "raynixl" in name]

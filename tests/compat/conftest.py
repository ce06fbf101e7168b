"""Crews of ranks for the tests of other libraries' interfaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moe_tools import Threads


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda world: f"{world} ranks")
def crew(request: pytest.FixtureRequest) -> Iterator[Threads]:
    """Ranks in threads."""
    with Threads(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def pair() -> Iterator[Threads]:
    """Two ranks in threads."""
    with Threads(2) as made:
        yield made

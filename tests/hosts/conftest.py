"""Beds of hosts; where the machine allows none, the tests say why and are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts_tools import Bed, why_no_hosts


@pytest.fixture(scope="session")
def _hosts_allowed() -> None:
    """Skip where there can be no hosts."""
    if reason := why_no_hosts():
        pytest.skip(reason)


@pytest.fixture
def bed(_hosts_allowed: None) -> Iterator[Bed]:
    """Two hosts and a switch, made in a tenth of a second."""
    with Bed() as made:
        yield made

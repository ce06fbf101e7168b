"""Crews of ranks for the tests of other libraries' interfaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moe_cuda_crews import GpuCrew, gpu_crew
from moe_tools import Threads


@pytest.fixture(scope="module", params=[1, 2, 4, 0], ids=lambda world: f"{world} ranks" if world else "GPUs")
def crew(request: pytest.FixtureRequest) -> Iterator[Threads]:
    """Ranks in threads; three of them on GPUs that are made up."""
    with Threads(request.param) if request.param else gpu_crew(3, is_everywhere=False) as made:
        yield made


@pytest.fixture(scope="module")
def pair() -> Iterator[Threads]:
    """Two ranks in threads."""
    with Threads(2) as made:
        yield made


@pytest.fixture(scope="module")
def kernels() -> Iterator[GpuCrew]:
    """Ranks whose kernels reach each other's memory."""
    with gpu_crew(3, is_everywhere=False) as made:
        yield made

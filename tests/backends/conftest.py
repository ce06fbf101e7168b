"""A mover on a made-up driver, in either core, and memory that it moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_fake import FakeCuda
from cuda_fixtures import fake_driver
from mover_tools import TUNING, Pair

from raynixl.backends.nvlink_mover import Mover
from raynixl.native import Gate, load


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    with fake_driver() as made:
        yield made


@pytest.fixture(params=["native", "ctypes"])
def gpu(fake: FakeCuda, request: pytest.FixtureRequest) -> Iterator[Mover]:
    """A mover of its own, in either core."""
    made = Mover(0, TUNING, core=load(request.param == "native"))
    yield made
    made.close()


@pytest.fixture
def gate() -> Gate:
    return load(native=True).Gate()


@pytest.fixture
def pair(fake: FakeCuda) -> Iterator[Pair]:
    made = Pair(fake)
    yield made
    fake.drop(made.source)
    fake.drop(made.target)

"""nvlink passes the suite that every backend passes, on a made-up driver, wherever the far side lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vram_tools import FakedNvlink, made_up_gpus

from raynixl.config import from_env
from raynixl.testing import Check, Outcome, Place, backend_checks, check_backend
from raynixl.testing.conformance import DEFAULT_CONFIG

CONFIG = from_env(DEFAULT_CONFIG)
MESSAGES = {"notifies_after_the_data", "keeps_messages_in_order", "carries_large_messages", "answers_requests"}


@pytest.fixture
def gpus(nothing_left: Callable[[], list[str]]) -> Iterator[Any]:
    """A made-up driver, in a process that is as it was in the end."""
    with made_up_gpus() as fake:
        yield fake


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("check", backend_checks(places=(Place.HERE,)), ids=str)
def test_it_conforms_in_one_process(check: Check) -> None:
    assert check(FakedNvlink, config=CONFIG).outcome is wanted_of(check.name)


@pytest.mark.usefixtures("gpus")
def test_it_conforms_between_processes() -> None:
    report = check_backend(FakedNvlink, places=(Place.IDLE,), config=CONFIG)
    assert {result.check for result in report.results} == {check.name for check in backend_checks()}
    assert all(result.outcome is wanted_of(result.check) for result in report.results), str(report)


def wanted_of(check: str) -> Outcome:
    """How a check goes with a backend that carries no messages."""
    return Outcome.SKIPPED if check in MESSAGES else Outcome.PASSED

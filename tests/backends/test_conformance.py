"""Our backends pass the suite that they ask of others, on both cores and wherever the far side lives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raynixl.backends.loopback import LoopbackBackend
from raynixl.backends.shm import ShmBackend
from raynixl.config import from_env
from raynixl.testing import Check, Outcome, Place, backend_checks, check_backend
from raynixl.testing.conformance import DEFAULT_CONFIG

CONFIG = from_env(DEFAULT_CONFIG)


@pytest.mark.parametrize("check", backend_checks(places=(Place.HERE,)), ids=str)
@pytest.mark.parametrize("factory", [LoopbackBackend, ShmBackend])
def test_it_conforms_in_one_process(check: Check, factory: type, nothing_left: Callable[[], list[str]]) -> None:
    assert check(factory, config=CONFIG).outcome is Outcome.PASSED


@pytest.mark.parametrize("place", [Place.IDLE, Place.BUSY], ids=lambda place: place.name.lower())
def test_shm_conforms_between_processes(place: Place, nothing_left: Callable[[], list[str]]) -> None:
    report = check_backend(ShmBackend, places=(place,), config=CONFIG)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)
    assert {result.check for result in report.results} == {check.name for check in backend_checks()}


def test_shm_conforms_on_the_twin_of_the_compiled_core(nothing_left: Callable[[], list[str]]) -> None:
    config = CONFIG.model_copy(update={"native": False})
    report = check_backend(ShmBackend, places=(Place.HERE, Place.IDLE), config=config)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)

"""Our backends pass the suite that they ask of others, on both cores and wherever the far side lives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from raynixl.backends.loopback import LoopbackBackend
from raynixl.backends.shm import ShmBackend
from raynixl.backends.ucx import UcxBackend
from raynixl.config import from_env
from raynixl.testing import Check, Outcome, Place, backend_checks, check_backend
from raynixl.testing.conformance import DEFAULT_CONFIG

CONFIG = from_env(DEFAULT_CONFIG)
not_twice = pytest.mark.skipif(not CONFIG.native, reason="all checks of this run are on the twin")


@pytest.mark.parametrize("check", backend_checks(places=(Place.HERE,)), ids=str)
@pytest.mark.parametrize("factory", [LoopbackBackend, ShmBackend])
def test_it_conforms_in_one_process(check: Check, factory: type, nothing_left: Callable[[], list[str]]) -> None:
    assert check(factory, config=CONFIG).outcome is Outcome.PASSED


@pytest.mark.parametrize("place", [Place.IDLE, Place.BUSY], ids=lambda place: place.name.lower())
def test_shm_conforms_between_processes(place: Place, nothing_left: Callable[[], list[str]]) -> None:
    report = check_backend(ShmBackend, places=(place,), config=CONFIG)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)
    assert {result.check for result in report.results} == {check.name for check in backend_checks()}


@not_twice
def test_shm_conforms_on_the_twin_of_the_compiled_core(nothing_left: Callable[[], list[str]]) -> None:
    config = CONFIG.model_copy(update={"native": False})
    report = check_backend(ShmBackend, places=(Place.HERE, Place.IDLE), config=config)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)


@pytest.mark.parametrize(
    ("tls", "place"), [("cma,tcp", Place.HERE), *product(("cma,tcp", "tcp"), (Place.IDLE, Place.BUSY))], ids=str
)
def test_ucx_conforms_over_each_lane(tls: str, place: Place, nothing_left: Callable[[], list[str]]) -> None:
    report = check_backend(UcxBackend, places=(place,), config=CONFIG.model_copy(update={"ucx": {"TLS": tls}}))
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)
    assert {result.check for result in report.results} == {check.name for check in backend_checks()}


@not_twice
def test_ucx_conforms_on_the_twin_of_the_compiled_core(nothing_left: Callable[[], list[str]]) -> None:
    config = CONFIG.model_copy(update={"native": False, "ucx": {"TLS": "tcp"}})
    report = check_backend(UcxBackend, places=(Place.IDLE,), config=config)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)

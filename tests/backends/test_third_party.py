"""A backend of somebody else is found by its entry point, and agents use it by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from agent_tools import PATIENCE, introduce, make_agent

from raynixl import ConfigError
from raynixl.backends import table
from raynixl.testing import Outcome, Place, check_backend

MODULE = """
from raynixl.backends.loopback import LoopbackBackend

class CourierBackend(LoopbackBackend):
    name = "courier"
"""
METADATA = "Metadata-Version: 2.1\nName: raynixl-courier\nVersion: 1.0\n"
ENTRY_POINTS = "[raynixl.backends]\ncourier = raynixl_courier:CourierBackend\n"


@pytest.fixture
def _courier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that brings a backend."""
    (tmp_path / "raynixl_courier.py").write_text(MODULE)
    info = tmp_path / "raynixl_courier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "raynixl_courier", raising=False)


@pytest.mark.usefixtures("_courier")
def test_an_installed_backend_is_named_and_carries_bytes(nothing_left: Callable[[], list[str]]) -> None:
    assert table.names() == ["loopback", "shm", "nvlink", "ucx", "courier"]
    with make_agent("a", backends=("courier",)) as a, make_agent("b", backends=("courier",)) as b:
        introduce(a, b)
        theirs = b.register(np.arange(100, dtype=np.uint8), name="numbers")
        mine = a.register(np.zeros(100, np.uint8))
        a.read(a.peer("b")["numbers"], mine).wait(PATIENCE)
        assert np.array_equal(mine.array(), theirs.array())
        assert a.statistics().routes[0].backend == "courier"


@pytest.mark.usefixtures("_courier")
def test_an_installed_backend_can_be_checked_in_one_call(nothing_left: Callable[[], list[str]]) -> None:
    report = check_backend(table.factory("courier"), places=(Place.HERE,))
    assert report.backend == "courier"
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, str(report)


def test_a_backend_that_nobody_brings_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"'courier'.*loopback, shm"):
        table.factory("courier")

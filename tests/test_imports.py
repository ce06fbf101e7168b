"""Importing raynixl is cheap: nothing heavy is loaded, nothing is started, nothing is written."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raynixl

HEAVY = ("torch", "ray", "ucxx", "cupy", "obstore", "matplotlib", "transformers")


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("module", ["raynixl", "raynixl.agents", "raynixl.collectives", "raynixl.testing"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = fresh(f"import sys, {module}; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_importing_starts_and_writes_nothing() -> None:
    code = (
        "import os, threading; before = dict(os.environ); import raynixl, raynixl.agents;"
        "print(before == dict(os.environ), threading.active_count())"
    )
    assert fresh(code) == "True 1"


def test_the_bare_package_does_not_even_load_numpy() -> None:
    assert "numpy" not in fresh("import sys, raynixl; print(*sys.modules)").split()


def test_making_an_agent_loads_nothing_heavy() -> None:
    loaded = fresh("import sys, raynixl\nwith raynixl.Agent('a'): print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("name", raynixl.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(raynixl, name).__name__ == name


def test_other_names_are_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Agents'") as found:
        _ = raynixl.Agents  # type: ignore[attr-defined]
    assert (found.value.name, found.value.obj) == ("Agents", raynixl)  # from these Python guesses what was meant
    assert set(raynixl.__all__) <= set(dir(raynixl))


def test_a_first_transfer_imports_nothing() -> None:
    code = """
import sys
from raynixl import Agent
with Agent("a") as a, Agent("b") as b:
    mine, arena, plain = a.empty(64), b.empty(32, name="arena"), b.register(bytearray(32), name="plain")
    before = set(sys.modules)
    peer = a.peer(b.record())
    a.write(mine.blocks([0, 8, 40], [8, 24, 24]), [peer["plain"][:28], peer["arena"][:28]], notify=b"x").wait()
    b.wait_notification(5.0)
    print(*sorted(set(sys.modules) - before))
"""
    assert fresh(code) == ""


@pytest.mark.parametrize(("name", "package"), [("worker", "ray"), ("WeightSync", "ray"), ("ExpertParallel", "torch")])
def test_a_name_whose_package_is_not_installed_says_how_to_get_it(name: str, package: str) -> None:
    code = f"""
import sys, raynixl
sys.modules[{package!r}] = None
try:
    raynixl.{name}
except raynixl.BackendUnavailable as exc:
    print(exc)
"""
    assert fresh(code) == f"raynixl.{name} needs the package {package}; pip install 'raynixl[{package}]'"

"""What every test may ask for: the promise that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import warm

if TYPE_CHECKING:
    from cuda_fake import FakeCuda

SETTLE_SECONDS = 5.0
BRIEF, SOAK = 50, 1000
"""Examples of a property in a run of the tests, and in `make soak`, which names that profile."""


@dataclass(frozen=True)
class Holdings:
    """What this process holds that a test could forget: threads, children, descriptors, mapped arenas."""

    threads: frozenset[str]
    children: frozenset[int]
    fds: frozenset[tuple[int, str]]
    arenas: int


def holdings() -> Holdings:
    """Look at what this process holds now."""
    threads = frozenset(f"{one.name} ({one.ident})" for one in threading.enumerate() if one.name.startswith("raynixl"))
    return Holdings(threads, children(), open_fds(), mapped_arenas())


def children(of: int = 0) -> frozenset[int]:
    """The child processes, zombies included; those of warm Pythons in place of these."""
    pids: set[int] = set()
    for task in os.listdir(f"/proc/{of or 'self'}/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{of or 'self'}/task/{task}/children", encoding="ascii") as file,
        ):
            pids.update(int(pid) for pid in file.read().split())
    if not of:
        for one in warm.all_ready():
            pids = (pids - {one.pid}) | children(one.pid)
    return frozenset(pids)


def open_fds() -> frozenset[tuple[int, str]]:
    """The open descriptors and what they lead to."""
    found = set()
    for fd in set(os.listdir("/proc/self/fd")) - {str(one.fd) for one in warm.all_ready()}:
        with contextlib.suppress(FileNotFoundError):
            found.add((int(fd), os.readlink(f"/proc/self/fd/{fd}")))
    return frozenset(found)


def mapped_arenas(pid: int | str = "self") -> int:
    """How many bytes of arenas are mapped, ours and those of peers."""
    total = 0
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if "/memfd:raynixl" in line:
                start, _, end = line.split(" ", 1)[0].partition("-")
                total += int(end, 16) - int(start, 16)
    return total


def excess(before: Holdings) -> list[str]:
    """Say what is held now and was not before."""
    now = holdings()
    left = [f"thread {name}" for name in now.threads - before.threads]
    left += [f"child {pid}" for pid in now.children - before.children]
    opened = {fd: target for fd, target in now.fds - before.fds if not target.startswith(f"/proc/{os.getpid()}/")}
    if len(now.fds) > len(before.fds):
        left += [f"descriptor {fd} -> {target}" for fd, target in opened.items()]
    if now.arenas > before.arenas:
        left.append(f"{now.arenas - before.arenas} bytes of arenas still mapped")
    return left


def forget_failure() -> None:
    """Clear the frames of a failed test, which pytest keeps: what they hold is no leak of this test nor the next."""
    error = getattr(sys, "last_value", None)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _ = frame.f_locals  # the copy that pytest's report has asked for is made anew, empty
        error = error.__cause__ or error.__context__


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Know the options of pytest-asyncio where it is not installed: tests/gpu needs nothing else of it."""
    if not pluginmanager.has_plugin("asyncio"):
        parser.addini("asyncio_mode", "unused: pytest-asyncio is not installed")
        parser.addini("asyncio_default_fixture_loop_scope", "unused: pytest-asyncio is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Say how many examples of a property are tried, before hypothesis hears which profile is asked for."""
    if config.pluginmanager.has_plugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("brief", max_examples=BRIEF, deadline=None)
        settings.register_profile("soak", max_examples=SOAK, deadline=None)
        settings.load_profile("brief")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say what must not run side by side, where several workers run tests: Ray clusters, hosts, tests of one module.

    The longest of these groups begins first, so that no worker is left with it at the end.
    """
    items.sort(key=lambda item: _group_of(item) != "ray")
    if config.pluginmanager.has_plugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group_of(item)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Forget which tests failed where the run itself broke: `--last-failed` shall not pass for those that never ran."""
    if exitstatus == pytest.ExitCode.INTERNAL_ERROR and session.config.cache is not None:
        session.config.cache.set("cache/lastfailed", {})


def _group_of(item: pytest.Item) -> str:
    place = item.nodeid.partition("::")[0]
    if place.startswith("tests/hosts/"):
        return "hosts"
    is_of_ray = item.get_closest_marker("ray") is not None or place.startswith(("tests/actors/", "tests/docs/"))
    return "ray" if is_of_ray else place


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> None:
    """Leave what imports (torch, ray) and reports have made out of garbage collections: a test makes two of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _warm_python() -> Iterator[None]:
    """End the warm Pythons that tests have started."""
    yield
    warm.cool()


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """A fake CUDA driver of two GPUs; the test fails on every misuse and on what it does not give back."""
    from cuda_fixtures import fake_driver

    with fake_driver() as fake:
        yield fake


@pytest.fixture
def nothing_left() -> Iterator[Callable[[], list[str]]]:
    """Fail the test if it leaves threads, child processes, descriptors or mapped arenas behind.

    The value can be called to ask what is held at the moment beyond what was there before.
    """
    gc.collect()
    before = holdings()
    yield lambda: excess(before)
    deadline = time.monotonic() + SETTLE_SECONDS
    left = excess(before)
    if left:
        forget_failure()
        gc.collect()  # views keep arenas alive
    while (left := excess(before)) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not left, "left behind: " + ", ".join(left)

"""Actors, drivers and patience for the tests in tests/actors; workers import this file too."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import ray

import raynixl as rx

TIMEOUT = 60.0
TESTS = Path(__file__).parent
INIT = {
    "num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 * 2**20,
    "logging_level": "ERROR",
}  # fmt: skip


def get(refs: Any) -> Any:
    """Wait for what actors return, a bounded time."""
    return ray.get(refs, timeout=TIMEOUT)


class Plain:
    """Keeps a region of 1 MiB, if it has an agent."""

    def __init__(self, nbytes: int = 1 << 20, *, fill: int = 0) -> None:
        self.nbytes = nbytes
        self.region = rx.agent().empty(nbytes, name="memory")
        self.region.array()[:] = fill

    def who(self) -> tuple[str, str, int]:
        """Name and incarnation of the agent, and the process."""
        return rx.agent().name, rx.agent().incarnation, os.getpid()

    def total(self) -> int:
        """Sum of the bytes."""
        return int(self.region.array().sum())

    def spin(self, seconds: float) -> None:
        """Be busy in pure Python."""
        rx.agent().inbox("spinning")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call a function in the actor's process."""
        return function(*arguments)


@ray.remote(num_cpus=0)
@rx.worker
class Holder(Plain):
    """A decorated actor with a region."""


@ray.remote(num_cpus=0)
@rx.worker
class AsyncHolder(Plain):
    """A decorated async actor."""

    async def block(self, seconds: float) -> None:
        """Block the event loop."""
        self.spin(seconds)

    async def nap(self) -> str:
        """Use the agent from the loop."""
        await asyncio.sleep(0)
        return rx.agent().name


def kill_process(pid: int, number: int) -> None:
    """Send a signal to a process of ours."""
    os.kill(pid, number)


def run_driver(code: str, *arguments: str, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run a driver in a process of its own; its standard output and error come back."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=timeout, check=False, env=driver_environment(),
    )  # fmt: skip


def start_driver(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a driver in a session of its own, to be talked with by its standard streams."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=driver_environment(),
    )  # fmt: skip


def driver_environment() -> dict[str, str]:
    """The environment, with the tests' helpers importable and without a cluster of others."""
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**others, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "RAY_DEDUP_LOGS": "0"}


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def gcs_server(pid: int) -> psutil.Process:
    """The GCS of the cluster that a driver started."""
    return next(one for one in family(pid) if "gcs_server" in one.name())


def store_keys(prefix: str = "raynixl/") -> list[str]:
    """Our keys in the GCS of the cluster that this process is connected to."""
    from raynixl.actors.store import Store

    return Store(ray.get_runtime_context().gcs_address).keys(prefix)


def mapped_arenas(pid: int) -> int:
    """How many bytes of arenas a process has mapped."""
    total = 0
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if "/memfd:raynixl" in line:
                start, _, end = line.split(" ", 1)[0].partition("-")
                total += int(end, 16) - int(start, 16)
    return total

"""The agent benchmark: what an agent costs to make, to use for the first time, to keep, and to find."""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from raynixl.agents import Agent
from raynixl.bench.process import TargetProcess
from raynixl.bench.timing import rounded
from raynixl.config import from_env
from raynixl.errors import BackendUnavailable, RaynixlError

Row = dict[str, Any]

_FRESH = """
import json, os, time
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
bare = rss()
import numpy
with_numpy = rss()
from raynixl.agents import Agent
times = []
for number in range(21):
    start = time.perf_counter()
    agent = Agent(f"bench-{os.getpid()}-{number}")
    times.append((time.perf_counter() - start) * 1e3)
    if number == 0:
        one = rss()
    agent.close()
print(json.dumps({"first": times[0], "later": sorted(times[1:])[10], "bare": one - bare, "numpy": one - with_numpy}))
"""


def run_agent(
    peers: int = 10, idle_seconds: float = 5.0, records: int = 1000, step: Callable[[], None] = lambda: None
) -> list[Row]:
    """Return one row with all costs of an agent; `records` of 0 leaves the cluster out."""
    fresh = _measure_fresh()
    step()
    first = _measure_first_transfers(peers)
    step()
    idle = _measure_idle(idle_seconds)
    step()
    finds = _measure_finds(records) if records else []
    step()
    return [
        {
            "bench": "agent",
            "impl": "raynixl",
            "create_ms": rounded(fresh["later"]),
            "create_first_ms": rounded(fresh["first"]),
            "first_transfer_ms": rounded(statistics.median(first)),
            "first_transfer_max_ms": rounded(max(first)),
            "idle_cpu_percent": rounded(idle),
            "rss_mib": rounded(fresh["bare"]),
            "rss_over_numpy_mib": rounded(fresh["numpy"]),
            "records": records,
            "find_ms": rounded(statistics.median(finds)) if finds else None,
        }
    ]


def _measure_fresh() -> dict[str, float]:
    """Measure creation and memory in a process that has done nothing else."""
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RaynixlError(f"an agent cannot be made in a fresh process: {done.stderr.strip().splitlines()[-1:]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure_first_transfers(peers: int) -> list[float]:
    """Return milliseconds from a peer's record to eight of its bytes, for each of some new peers."""
    times = []
    with TargetProcess() as target, Agent(f"bench-{os.getpid()}", config=from_env()) as agent:
        mine = agent.empty(4096)
        for number in range(peers):
            made = target.ask("agent", name=f"bench-{os.getpid()}-{number}", config={"backends": ("shm",)})
            target.ask("region", name=f"bench-{number}", nbytes=4096, memory="arena")
            record = base64.b64decode(made["record"])
            start = time.perf_counter()
            theirs = agent.peer(record).region(f"bench-{number}")
            agent.read(theirs.span(0, 8), mine.span(0, 8)).wait()
            times.append((time.perf_counter() - start) * 1e3)
    return times


def _measure_finds(records: int) -> list[float]:
    """Return milliseconds of finding peers, each for the first time, in the GCS of a cluster of its own."""
    try:
        import ray
    except ImportError as exc:
        raise BackendUnavailable("Ray is not installed", hint="pip install ray, or --records 0") from exc
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    try:
        from raynixl.actors import GcsDirectory

        directory = GcsDirectory("bench", "bench")
        with Agent("bench", config=from_env(), directory=directory) as agent:
            one = agent.make_record(time.time() + 3600)
            names = [f"bench-{number}" for number in range(records)]
            for name in names:
                directory.publish(one.model_copy(update={"name": name, "incarnation": secrets.token_hex(16)}))
            agent.peer(names[0])  # the first look
            return [_time_find(agent, name) for name in names[1 :: max(1, records // 200)] or names]
    finally:
        ray.shutdown()


def _time_find(agent: Agent, name: str) -> float:
    start = time.perf_counter()
    agent.peer(name)
    return (time.perf_counter() - start) * 1e3


def _measure_idle(seconds: float) -> float:
    """Return the busier of two connected, idle processes: percent of a core."""
    with TargetProcess() as target, Agent(f"bench-{os.getpid()}", config=from_env()) as agent:
        made = target.ask("agent", name=f"bench-{os.getpid()}-idle", config={"backends": ("shm",)})
        agent.peer(base64.b64decode(made["record"])).connect()
        time.sleep(0.2)
        before, mine, start = target.ask("usage"), time.process_time(), time.monotonic()
        time.sleep(seconds)
        used, elapsed = time.process_time() - mine, time.monotonic() - start
        after = target.ask("usage")
    theirs: float = (after["cpu_seconds"] - before["cpu_seconds"]) / (after["at"] - before["at"])
    return 100.0 * max(used / elapsed, theirs)

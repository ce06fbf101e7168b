"""The peers benchmark: what many connected peers cost one process, in time, memory, descriptors and threads."""

from __future__ import annotations

import base64
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from raynixl.agents import Agent
from raynixl.bench.layout import digest
from raynixl.bench.process import TargetProcess
from raynixl.bench.timing import rounded
from raynixl.config import from_env
from raynixl.region import Region

Row = dict[str, Any]
_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class PeersSpec:
    """How many peers, in how many processes, over which backend."""

    peers: int = 64
    processes: int = 4
    backend: str = "shm"
    ucx: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process holds."""

    mib: float
    descriptors: int
    threads: int

    @staticmethod
    def now() -> Usage:
        """Look at it."""
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        mib = pages * os.sysconf("SC_PAGESIZE") / 2**20
        return Usage(mib, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))

    def __sub__(self, before: Usage) -> Usage:
        return Usage(self.mib - before.mib, self.descriptors - before.descriptors, self.threads - before.threads)


@dataclass(frozen=True, slots=True)
class Far:
    """A peer to meet: its record, and the digest of its region."""

    name: str
    record: bytes
    digest: str


def run_peers(spec: PeersSpec, step: Callable[[], None] = lambda: None) -> list[Row]:
    """Return one row: a first read from each peer, one after another, and what all of them together have added."""
    config = from_env()
    ucx = {**config.ucx, **spec.ucx}
    settings = {"backends": (spec.backend,), "ucx": ucx}
    with ExitStack() as stack:
        targets = [stack.enter_context(TargetProcess()) for _ in range(min(spec.processes, spec.peers))]
        far = [_make(targets[number % len(targets)], number, settings) for number in range(spec.peers)]
        agent = stack.enter_context(Agent(f"bench-{os.getpid()}", config=config.model_copy(update=settings)))
        mine, before = agent.empty(_NBYTES), Usage.now()
        times, is_right, first = [], True, before
        for one in far:
            times.append(_meet(agent, one, mine))
            is_right = is_right and digest(mine.array()) == one.digest
            first = Usage.now() if first is before else first
            step()
        return [_row(spec, times, is_right, first - before, Usage.now() - before)]


def _make(target: TargetProcess, number: int, settings: dict[str, Any]) -> Far:
    """Make a peer whose region holds bytes that no other's holds."""
    name = f"bench-{os.getpid()}-{number}"
    record = base64.b64decode(target.ask("agent", name=name, config=settings)["record"])
    target.ask("region", name=name, nbytes=_NBYTES, memory="arena")
    target.ask("fill", name=name, seed=number + 1)
    return Far(name, record, target.ask("digest", name=name, moved=None)["digest"])


def _meet(agent: Agent, far: Far, mine: Region) -> float:
    """Return the seconds from a peer's record to its bytes."""
    start = time.perf_counter()
    agent.read(agent.peer(far.record).region(far.name), mine).wait()
    return time.perf_counter() - start


def _row(spec: PeersSpec, times: list[float], is_right: bool, first: Usage, everything: Usage) -> Row:
    later = max(1, spec.peers - 1)
    return {
        "bench": "peers",
        "impl": "raynixl",
        "backend": spec.backend,
        "peers": spec.peers,
        "seconds": rounded(sum(times)),
        "first_ms": rounded(times[0] * 1e3),
        "p50_ms": rounded(statistics.median(times) * 1e3),
        "max_ms": rounded(max(times) * 1e3),
        "mib": rounded(everything.mib),
        "first_mib": rounded(first.mib),
        "mib_per_peer": rounded((everything.mib - first.mib) / later),
        "descriptors": everything.descriptors,
        "threads": everything.threads,
        "verified": is_right,
    }

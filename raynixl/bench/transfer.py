"""The transfer benchmark: reads and writes between two processes, against memcpy and process_vm."""

from __future__ import annotations

import base64
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np

from raynixl.agents import Agent, Peer, Prepared
from raynixl.bench import baselines
from raynixl.bench.layout import Bytes, Layout, digest, fill
from raynixl.bench.process import Asked, TargetProcess
from raynixl.bench.target import Target, make_region, user_memory
from raynixl.bench.timing import Nanoseconds, Runner, measure, median_us, percentile_us, rounded
from raynixl.config import default_copy_threads, from_env
from raynixl.errors import ConfigError
from raynixl.memory import available_nbytes, map_shared
from raynixl.region import Region, RemoteRegion

Row = dict[str, Any]
BASELINES = ("memcpy", "process_vm")
_REGION = "bench"


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What to measure."""

    sizes: tuple[int, ...]
    backend: str = "shm"
    op: str = "write"
    memory: str = "arena"
    blocks: int = 1
    is_random: bool = False
    threads: int = field(default_factory=default_copy_threads)
    rounds: int = 7
    baselines: tuple[str, ...] = ()
    is_verified: bool = True

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: says what and why.
        """
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"there is no baseline {name!r}", hint=f"known are: {', '.join(BASELINES)}")
        if "process_vm" in self.baselines and self.backend == "loopback":
            raise ConfigError("process_vm moves bytes between processes", hint="leave it out with loopback")
        need = max(self.sizes) * self.blocks * (3 if self.baselines else 2)
        if need > available_nbytes() * 0.8:
            raise ConfigError(
                f"{need / 1e9:.1f} GB are needed but only {available_nbytes() / 1e9:.1f} are free",
                hint="ask for smaller --sizes or fewer --blocks",
            )


class OurRunner:
    """Posts one prepared transfer again and again and waits for each."""

    impl = "raynixl"

    def __init__(self, plan: Prepared, prepare_seconds: float) -> None:
        self.prepare_seconds = prepare_seconds
        self._plan = plan

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each, post to done."""
        post, times = self._plan.post, []
        for _ in range(count):
            start = perf_counter_ns()
            post().wait()
            times.append(perf_counter_ns() - start)
        return times


class TransferBench:
    """One measuring agent and one target; measures any number of sizes."""

    def __init__(self, spec: TransferSpec) -> None:
        spec.check()
        self.spec = spec
        self._stack = ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> TransferBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the agent, then end the target; idempotent."""
        self._stack.close()

    def _start(self) -> None:
        spec, stack = self.spec, self._stack
        self._target: Asked = Target() if spec.backend == "loopback" else TargetProcess()
        stack.callback(self._target.close)
        self._team = baselines.ThreadTeam.start(spec.threads)
        stack.callback(self._team.close)
        settings = {"backends": (spec.backend,), "copy_threads": spec.threads}
        self._agent = Agent(f"bench-{os.getpid()}", config=from_env().model_copy(update=settings))
        stack.callback(self._agent.close)
        made = self._target.ask("agent", name=f"bench-target-{os.getpid()}", config=settings)
        self._peer: Peer = self._agent.peer(base64.b64decode(made["record"]))
        self._pid = self._target.ask("word")["pid"]

    def measure(self, block_nbytes: int, step: Callable[[], None]) -> Iterator[Row]:
        """Yield the rows of one block size: ours, then each baseline's."""
        spec = self.spec
        layout = Layout(block_nbytes, spec.blocks, spec.is_random)
        ours = make_region(self._agent, layout.nbytes, memory=spec.memory)
        far = self._target.ask("region", name=_REGION, nbytes=layout.nbytes, memory=spec.memory)
        try:
            remote = self._peer.region(_REGION)
            runners, ends = self._runners(layout, ours, remote, far)
            times = measure(runners, spec.rounds, step)
            for runner, end, each in zip(runners, ends, times, strict=True):
                is_right = spec.is_verified and self._verify(runner, layout, ours, end)
                yield self._row(runner, layout, each, is_right)
        finally:
            self._agent.deregister(ours)
            self._target.ask("drop", name=_REGION)

    def _runners(
        self, layout: Layout, ours: Region, remote: RemoteRegion, far: dict[str, Any]
    ) -> tuple[list[Runner], list[Bytes | None]]:
        """Return what to measure, and the memory that stands in for the target's, if any does."""
        runners: list[Runner] = [self._prepare(layout, ours, remote)]
        ends: list[Bytes | None] = [None]
        is_write = self.spec.op == "write"
        for name in self.spec.baselines:
            if name == "process_vm":
                place = baselines.Foreign(self._pid, far["address"])
                runners.append(baselines.process_vm(layout, ours.array(), place, is_write=is_write, team=self._team))
                ends.append(None)
                continue
            there, stand_in = self._reach(layout, far)
            source, target = (ours.array(), there) if is_write else (there, ours.array())
            runners.append(baselines.memcpy(layout, source, target, self._team))
            ends.append(stand_in)
        return runners, ends

    def _reach(self, layout: Layout, far: dict[str, Any]) -> tuple[Bytes, Bytes | None]:
        """Return the target's memory as mapped here, or plain memory here in its place."""
        if far["fd"] < 0:
            memory = user_memory(layout.nbytes)
            return memory, memory
        fd = os.open(f"/proc/{self._pid}/fd/{far['fd']}", os.O_RDWR)
        try:
            mapping: mmap.mmap = map_shared(fd, layout.nbytes)
        finally:
            os.close(fd)
        return np.frombuffer(mapping, np.uint8, layout.nbytes), None

    def _prepare(self, layout: Layout, ours: Region, remote: RemoteRegion) -> OurRunner:
        """Prepare the transfer; its cost is what a first post takes beyond a later one, selection included."""
        self._prepared(layout, ours, remote).post().wait()  # connects and binds
        costs = []
        for _ in range(5):
            start = time.perf_counter()
            plan = self._prepared(layout, ours, remote)
            prepared = time.perf_counter()
            plan.post().wait()
            posted = time.perf_counter()
            plan.post().wait()
            again = time.perf_counter() - posted
            costs.append(prepared - start + max(0.0, posted - prepared - again))
        return OurRunner(plan, sorted(costs)[len(costs) // 2])

    def _prepared(self, layout: Layout, ours: Region, remote: RemoteRegion) -> Prepared:
        mine, theirs = layout.source_ids, layout.target_ids
        if self.spec.op == "write":
            source, target = ours.pages(mine, layout.block_nbytes), remote.pages(theirs, layout.block_nbytes)
        else:
            source, target = remote.pages(mine, layout.block_nbytes), ours.pages(theirs, layout.block_nbytes)
        return self._agent.prepare(self.spec.op, source, target)

    def _verify(self, runner: Runner, layout: Layout, ours: Region, stand_in: Bytes | None) -> bool:
        """Move known bytes once over cleared memory and compare digests."""
        is_write = self.spec.op == "write"
        view = ours.array()
        fill(view, 7 if is_write else 0)
        if stand_in is None:
            self._target.ask("fill", name=_REGION, seed=0 if is_write else 7)
        else:
            fill(stand_in, 0 if is_write else 7)
        runner.sample(1)
        moved = [layout.block_nbytes, layout.blocks, int(layout.is_random), layout.seed]
        if stand_in is not None:
            source, target = (view, stand_in) if is_write else (stand_in, view)
            return digest(target) == layout.digest_moved(source)
        far = self._target.ask("digest", name=_REGION, moved=None if is_write else moved)["digest"]
        return bool(far == (layout.digest_moved(view) if is_write else digest(view)))

    def _row(self, runner: Runner, layout: Layout, times: Nanoseconds, is_verified: bool) -> Row:
        spec, p50 = self.spec, median_us(times)
        return {
            "bench": "transfer",
            "impl": runner.impl,
            "backend": spec.backend,
            "op": spec.op,
            "memory": spec.memory,
            "block_nbytes": layout.block_nbytes,
            "blocks": layout.blocks,
            "pattern": "random" if layout.is_random else "sequential",
            "gbps": rounded(layout.nbytes / p50 / 1e3),
            "p50_us": rounded(p50),
            "p99_us": rounded(percentile_us(times, 99)),
            "prepare_us_per_block": rounded(runner.prepare_seconds * 1e6 / layout.blocks),
            "post_us_per_block": rounded(p50 / layout.blocks),
            "verified": is_verified,
        }


def run_transfer(spec: TransferSpec, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """Yield one row for each size and implementation; `step` is called after each round, for a progress bar."""
    with TransferBench(spec) as bench:
        for block_nbytes in spec.sizes:
            yield from bench.measure(block_nbytes, step)

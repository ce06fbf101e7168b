"""The transfer benchmark: reads and writes between two processes, in turn with baselines."""

from __future__ import annotations

import base64
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from time import perf_counter_ns
from typing import Any

from pydantic import SecretBytes

from raynixl.agents import Agent, Peer, Prepared
from raynixl.bench import baselines
from raynixl.bench.busy import BusyRunner
from raynixl.bench.ends import make_region
from raynixl.bench.layout import Layout
from raynixl.bench.process import Asked, TargetProcess
from raynixl.bench.scene import REGION, Contender, Scene
from raynixl.bench.spec import TransferSpec
from raynixl.bench.target import Target
from raynixl.bench.timing import Nanoseconds, measure, median_us, percentile_us, rounded
from raynixl.config import from_env
from raynixl.errors import ConfigError
from raynixl.region import Region, RemoteRegion

Row = dict[str, Any]
_BESIDE = {"nvlink": ("nvlink", "shm")}
"""Agents whose backend carries no messages need one beside it that does."""
Ends = tuple[Region, RemoteRegion]


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
        self._target: Asked = Target() if spec.backend == "loopback" else TargetProcess(launch=spec.launch)
        stack.callback(self._target.close)
        config = from_env()
        ucx = {**config.ucx, **spec.ucx}
        settings = {"backends": _BESIDE.get(spec.backend, (spec.backend,)), "copy_threads": spec.threads, "ucx": ucx}
        secret = config.secret.get_secret_value() or (secrets.token_bytes(16) if spec.launch else b"")
        own = {**settings, "secret": SecretBytes(secret)}
        self._agent = Agent(f"bench-{os.getpid()}", config=config.model_copy(update=own))
        stack.callback(self._agent.close)
        theirs = {**settings, "secret": secret.hex()}
        made = self._target.ask("agent", name=f"bench-target-{os.getpid()}", config=theirs)
        self._peer: Peer = self._agent.peer(base64.b64decode(made["record"]))
        self._pid = self._target.ask("word")["pid"]
        makers = [baselines.MAKERS[name] for name in spec.baselines]
        self._baselines = [stack.enter_context(closing(make(replace(spec, ucx=ucx)))) for make in makers]

    def measure(self, block_nbytes: int, step: Callable[[], None]) -> Iterator[Row]:
        """Yield the rows of one block size: ours, then each baseline's."""
        spec = self.spec
        layout = Layout(block_nbytes, spec.blocks, spec.is_random)
        memories, gpus = spec.memories, spec.gpus
        ours = make_region(self._agent, layout.nbytes, memory=memories[0], gpu=gpus[0])
        far = self._target.ask("region", name=REGION, nbytes=layout.nbytes, memory=memories[1], gpu=gpus[1])
        try:
            with ExitStack() as kept:
                ends = (ours, self._peer.region(REGION))
                address = self._address(ends)
                scene = Scene(layout, spec.is_write, spec.memory, *ends, self._target, self._pid, far, kept, address)
                yield from self._measure(scene, step)
        finally:
            self._agent.deregister(ours)
            self._target.ask("drop", name=REGION)

    def _measure(self, scene: Scene, step: Callable[[], None]) -> Iterator[Row]:
        contenders = self._ours(scene, (scene.region, scene.remote))
        for baseline in self._baselines:
            contenders += baseline.contend(scene)
        times = measure([one.runner for one in contenders], self.spec.rounds, step)
        for one, each in zip(contenders, times, strict=True):
            is_right = one.verify() if self.spec.is_verified else False
            yield self._row(one, scene.layout, each, is_right)

    def _address(self, ends: Ends) -> str:
        """Return the target's address, as our agent has found it."""
        if not self.spec.launch:
            return "127.0.0.1"
        plan = self._agent.prepare("write", ends[0], ends[1])
        (binding,) = self._agent.connector.bind(plan, time.monotonic() + self._agent.config.connect_timeout)
        remote = getattr(binding.link, "remote", None)
        if remote is None:
            raise ConfigError(f"{self.spec.backend} reaches the target over no network", hint="leave --launch out")
        return str(remote)

    def _ours(self, scene: Scene, ends: Ends) -> list[Contender]:
        """Return our transfer, and the same beside a busy thread where that is asked for."""
        runner = self._prepare(scene.layout, *ends)
        lane = " + ".join(self._agent.explain(*(ends if scene.is_write else reversed(ends))).paths)

        def check() -> bool:
            return scene.check(lambda: runner.sample(1))

        contenders = [Contender(runner, check, lane)]
        if self.spec.is_busy:
            contenders.append(Contender(BusyRunner(runner), check, lane, is_busy=True))
        return contenders

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
        if self.spec.is_write:
            source, target = ours.pages(mine, layout.block_nbytes), remote.pages(theirs, layout.block_nbytes)
        else:
            source, target = remote.pages(mine, layout.block_nbytes), ours.pages(theirs, layout.block_nbytes)
        return self._agent.prepare(self.spec.op, source, target)

    def _row(self, one: Contender, layout: Layout, times: Nanoseconds, is_verified: bool | None) -> Row:
        spec, p50 = self.spec, median_us(times)
        return {
            "bench": "transfer",
            "impl": one.runner.impl,
            "backend": spec.backend,
            "op": spec.op,
            "memory": spec.memory_name,
            "block_nbytes": layout.block_nbytes,
            "blocks": layout.blocks,
            "pattern": "random" if layout.is_random else "sequential",
            "gbps": rounded(layout.nbytes / p50 / 1e3),
            "p50_us": rounded(p50),
            "p99_us": rounded(percentile_us(times, 99)),
            "prepare_us_per_block": rounded(one.runner.prepare_seconds * 1e6 / layout.blocks),
            "post_us_per_block": rounded(p50 / layout.blocks),
            "verified": is_verified,
            "lane": one.lane,
            "busy": one.is_busy,
        }


def run_transfer(spec: TransferSpec, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """Yield one row for each size and implementation; `step` is called after each round, for a progress bar."""
    with TransferBench(spec) as bench:
        for block_nbytes in spec.sizes:
            yield from bench.measure(block_nbytes, step)

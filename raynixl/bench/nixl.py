"""The baseline `nixl`: NVIDIA NIXL over its UCX, in two processes of its own, asked in turn with ours.

NIXL brings a UCX of its own, which must not meet ours: neither this process nor the target ever loads it.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from typing import Any

from raynixl.bench.perftest import ucx_environment
from raynixl.bench.process import TargetProcess
from raynixl.bench.scene import Contender, Scene
from raynixl.bench.spec import TransferSpec
from raynixl.errors import ConfigError

_SEED = 7
PACKAGES = ("nixl_cu13", "nixl_cu12")


def find_nixl() -> str:
    """Return the name of the installed NIXL package, without loading it.

    Raises:
        ConfigError: there is none.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ConfigError("NIXL is not installed", hint="pip install 'raynixl[bench]', or nixl-cu13")


class Nixl:
    """An initiator and a target, each with memory for the largest layout, registered once."""

    def __init__(self, spec: TransferSpec) -> None:
        package = find_nixl()
        variables = {"NIXL_LOG_LEVEL": "ERROR", **ucx_environment(spec.ucx)}
        self._is_busy, self._stack = spec.is_busy, ExitStack()
        try:
            self._initiator, self._target = (
                self._stack.enter_context(TargetProcess("raynixl.bench.nixl_process", variables)) for _ in range(2)
            )
            sides = {"initiator": self._initiator, "target": self._target}
            nbytes = max(spec.sizes) * spec.blocks
            for name, side in sides.items():
                side.tell("start", name=name, package=package, nbytes=nbytes, memory=spec.memory)
            made = {name: side.hear("start") for name, side in sides.items()}
            self._initiator.ask("connect", metadata=made["target"]["metadata"], address=made["target"]["address"])
        except BaseException:
            self._stack.close()
            raise

    def contend(self, scene: Scene) -> list[Contender]:
        """Prepare the layout over there; return its runner, and a busy one where that is measured."""
        prepared = self._initiator.ask("prepare", layout=scene.layout.numbers, is_write=scene.is_write)
        idle = NixlRunner(self._initiator, prepared["seconds"], is_busy=False)

        def check() -> bool:
            return self._check(scene, idle)

        contenders = [Contender(idle, check)]
        if self._is_busy:
            busy = NixlRunner(self._initiator, prepared["seconds"], is_busy=True)
            contenders.append(Contender(busy, check, is_busy=True))
        return contenders

    def close(self) -> None:
        """End both processes."""
        self._stack.close()

    def _check(self, scene: Scene, runner: NixlRunner) -> bool:
        """Move known bytes once over cleared memory; whether the digests agree."""
        ends = (self._initiator, self._target) if scene.is_write else (self._target, self._initiator)
        source, into = ends
        layout: dict[str, Any] = {"layout": scene.layout.numbers}
        source.ask("fill", seed=_SEED, **layout)
        into.ask("fill", seed=0, **layout)
        runner.sample(1)
        there: dict[str, Any] = into.ask("digest", is_moved=False, **layout)
        return bool(there == source.ask("digest", is_moved=True, **layout))


class NixlRunner:
    """Has the initiator post the prepared transfer and wait for it, again and again."""

    impl = "nixl"

    def __init__(self, initiator: TargetProcess, prepare_seconds: float, *, is_busy: bool) -> None:
        self.prepare_seconds = prepare_seconds
        self._initiator, self._is_busy = initiator, is_busy

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each, timed over there."""
        times: list[int] = self._initiator.ask("run", count=count, is_busy=self._is_busy)["times"]
        return times

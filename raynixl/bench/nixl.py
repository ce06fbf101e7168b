"""The baseline `nixl`: NVIDIA NIXL over its UCX, in two processes of its own, asked in turn with ours.

NIXL brings a UCX of its own, which must not meet ours: neither this process nor the target ever loads it. Its progress
threads never rest, so both processes are stopped while it is not their turn: two cores for all would not do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

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


class Pair:
    """An initiator and a target, which run only inside `awake`."""

    def __init__(self, variables: Mapping[str, str], launch: Sequence[str] = ()) -> None:
        self._stack, self._depth = ExitStack(), 0
        try:
            self.initiator, self.target = (
                self._stack.enter_context(TargetProcess("raynixl.bench.nixl_process", variables, launch=prefix))
                for prefix in ((), launch)
            )
        except BaseException:
            self._stack.close()
            raise

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let both run meanwhile."""
        self._depth += 1
        if self._depth == 1:
            self.initiator.resume()
            self.target.resume()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.initiator.pause()
                self.target.pause()

    def close(self) -> None:
        """End both."""
        self._stack.close()


class Nixl:
    """NIXL with the settings of the measured agents; memory of the same kind is made for each scene."""

    def __init__(self, spec: TransferSpec) -> None:
        package = find_nixl()
        self._is_busy = spec.is_busy
        self._pair = Pair(
            {"NIXL_LOG_LEVEL": "ERROR", **ucx_environment(spec.ucx, is_local=not spec.launch)}, spec.launch
        )
        try:
            with self._pair.awake():
                self._pair.initiator.ask("start", name="initiator", package=package)
                self._pair.target.ask("start", name="target", package=package)
        except BaseException:
            self._pair.close()
            raise

    def contend(self, scene: Scene) -> list[Contender]:
        """Prepare the layout over there; return its runner, and a busy one where that is measured."""
        initiator, target = self._pair.initiator, self._pair.target
        with self._pair.awake():
            for side in (initiator, target):
                side.ask("memory", nbytes=scene.layout.nbytes, memory=scene.memory)
            initiator.ask("connect", **target.ask("metadata"))
            seconds = initiator.ask("prepare", layout=scene.layout.numbers, is_write=scene.is_write)["seconds"]
        idle = NixlRunner(self._pair, seconds, is_busy=False)

        def check() -> bool:
            return self._check(scene, idle)

        contenders = [Contender(idle, check)]
        if self._is_busy:
            contenders.append(Contender(NixlRunner(self._pair, seconds, is_busy=True), check, is_busy=True))
        return contenders

    def close(self) -> None:
        """End both processes."""
        self._pair.close()

    def _check(self, scene: Scene, runner: NixlRunner) -> bool:
        """Move known bytes once over cleared memory; whether the digests agree."""
        ends = (self._pair.initiator, self._pair.target)
        source, into = ends if scene.is_write else reversed(ends)
        with self._pair.awake():
            source.ask("fill", seed=_SEED)
            into.ask("fill", seed=0)
            runner.sample(1)
            there = into.ask("digest", moved=None)
            return bool(there == source.ask("digest", moved=scene.layout.numbers))


class NixlRunner:
    """Has the initiator post the prepared transfer and wait for it, again and again."""

    impl = "nixl"

    def __init__(self, pair: Pair, prepare_seconds: float, *, is_busy: bool) -> None:
        self.prepare_seconds = prepare_seconds
        self._pair, self._is_busy = pair, is_busy

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each, timed over there."""
        with self._pair.awake():
            times: list[int] = self._pair.initiator.ask("run", count=count, is_busy=self._is_busy)["times"]
        return times

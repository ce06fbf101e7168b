"""The weights benchmark: one trainer's parameters into every receiver's own, against other ways, in one run."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from raynixl.bench.crew import Crew, Fields, ProcessCrew
from raynixl.bench.names import check_baselines
from raynixl.bench.shapes import count_nbytes, infos_of
from raynixl.bench.timing import rounded
from raynixl.errors import BackendUnavailable, ConfigError
from raynixl.memory import available_nbytes

Row = dict[str, Any]
BASELINES = ("ray", "gloo", "rdt", "transfer")
_IN_RAY = frozenset({"ray", "rdt"})
_SOURCE = "rank-0"
_SEEDS_APART = 1_000_003  # a parameter's seed is the round's and its number: no two are ever the same


@dataclass(frozen=True, slots=True)
class WeightsSpec:
    """What to measure."""

    model: str = "qwen2.5-0.5b"
    receivers: int = 1
    rounds: int = 5
    baselines: tuple[str, ...] = ()
    install: str = "auto"
    is_in_place: bool = False
    """The source's own memory is read, instead of a copy of it that lets the trainer go on at once."""
    topology: str = "auto"
    is_verified: bool = True
    memory: str = "dram"
    """Where the parameters are, at both ends: 'dram', or 'vram' for GPU 0."""

    @property
    def nbytes(self) -> int:
        """Bytes of the model."""
        return count_nbytes(infos_of(self.model))

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: says what and why.
        """
        check_baselines(self.baselines, BASELINES)
        if self.memory not in ("dram", "vram"):
            raise ConfigError(f"memory {self.memory!r:.40} is not known", hint="use 'dram' or 'vram'")
        if self.memory == "vram":
            if self.baselines:
                raise ConfigError("the baselines carry host memory alone", hint="leave --baseline away with vram")
            return
        copies = 2 - self.is_in_place + 2 * self.receivers + 2 * ("ray" in self.baselines)
        copies += (self.receivers + 1) * ("transfer" in self.baselines)
        if copies * self.nbytes > available_nbytes() * 0.9:
            raise ConfigError(
                f"{copies * self.nbytes / 1e9:.1f} GB are needed but only {available_nbytes() / 1e9:.1f} are free",
                hint="take fewer --receivers, or leave the baseline 'transfer' out",
            )


class Way(Protocol):
    """One way to bring the source's parameters to all receivers."""

    impl: str

    def prepare(self) -> None:
        """Do what may be done before the weights are known."""

    def run(self) -> list[Fields]:
        """Carry the weights once; return when each ended, and how long its parameters were neither old nor new."""

    def egress_nbytes(self) -> int:
        """Return the bytes that left the source in the latest run."""


@dataclass(slots=True)
class Times:
    """What the rounds of one way gave."""

    seconds: list[float] = field(default_factory=list)
    flip_ms: list[float] = field(default_factory=list)
    egress_nbytes: list[int] = field(default_factory=list)


def run_weights(
    spec: WeightsSpec, step: Callable[[], None] = lambda: None, skipped: Callable[[str], None] = lambda _: None
) -> Iterator[Row]:
    """Yield a row for ours and each baseline: medians of rounds measured in turn, after one that warms up.

    Every way starts from the parameters of the source, which were all changed since, and ends with those of each
    receiver; all ways use the same processes and the same memory. A baseline that cannot run here is `skipped`.
    """
    spec.check()
    with ExitStack() as stack:
        bench = WeightsBench(stack, spec, skipped)
        for _ in range(spec.rounds + 1):
            bench.do_round()
            step()
        yield from bench.rows()


class WeightsBench:
    """The ranks, the ways, and their times."""

    def __init__(self, stack: ExitStack, spec: WeightsSpec, skipped: Callable[[str], None]) -> None:
        self._spec = spec
        self._crew = _make_crew(stack, spec)
        self._rounds = 0
        self._seed = _SEEDS_APART
        self._crew.some("model", range(self._crew.world), model=spec.model, memory=spec.memory)
        self._crew.some("fill", range(1), seed=_SEEDS_APART)
        made = [_make_way(name, stack, self._crew, spec, skipped) for name in ("raynixl", *spec.baselines)]
        self._ways = [way for way in made if way is not None]
        self._times = {way.impl: Times() for way in self._ways}

    def do_round(self) -> None:
        """Measure every way once; the first time only to warm up, every other time in the opposite order."""
        for way in self._ways if self._rounds % 2 == 0 else reversed(self._ways):
            self._change()
            way.prepare()
            began = time.monotonic()
            ends = way.run()
            if self._rounds:
                times = self._times[way.impl]
                times.seconds.append(max(end["at"] for end in ends) - began)
                times.flip_ms.append(max(end["flip_ms"] for end in ends))
                times.egress_nbytes.append(way.egress_nbytes())
        self._rounds += 1

    def rows(self) -> Iterator[Row]:
        """Return the medians, and what a last run of each way left."""
        spec = self._spec
        for way in self._ways:
            times = self._times[way.impl]
            seconds = float(np.median(times.seconds))
            yield {
                "bench": "weights", "impl": way.impl, "model": spec.model, "receivers": spec.receivers,
                "gbps": rounded(spec.nbytes * spec.receivers / seconds / 1e9), "seconds": rounded(seconds),
                "source_egress_nbytes": int(np.median(times.egress_nbytes)),
                "flip_ms": rounded(float(np.median(times.flip_ms))),
                "verified": self._verify(way) if spec.is_verified else False,
            }  # fmt: skip

    def _verify(self, way: Way) -> bool:
        """Clear every receiver, carry new weights once more, and compare the bytes."""
        self._change()
        suffix = "_arena" if way.impl == "transfer" else ""
        receivers = range(1, self._crew.world)
        self._crew.some(f"fill{suffix}", receivers, seed=0)
        way.prepare()
        way.run()
        (wanted,) = self._crew.some(f"digest{suffix}", range(1))
        return all(found == wanted for found in self._crew.some(f"digest{suffix}", receivers))

    def _change(self) -> None:
        """Change every element of the source's parameters, as an optimizer step does."""
        self._seed += _SEEDS_APART
        self._crew.some("fill", range(1), seed=self._seed)


def _make_crew(stack: ExitStack, spec: WeightsSpec) -> Crew:
    """Return ranks in plain processes, or in Ray actors where a baseline needs Ray."""
    if _IN_RAY.isdisjoint(spec.baselines):
        return ProcessCrew(stack, spec.receivers + 1)
    try:
        from raynixl.bench.weights_ray import RayCrew
    except ImportError as exc:
        raise BackendUnavailable("Ray is not installed", hint="pip install 'raynixl[ray]'") from exc
    return RayCrew(stack, spec.receivers + 1, max(int(2.2 * spec.nbytes), 128 << 20))


def _make_way(name: str, stack: ExitStack, crew: Crew, spec: WeightsSpec, skipped: Callable[[str], None]) -> Way | None:
    if name in _IN_RAY:
        from raynixl.bench.weights_ray import DirectWay, RayCrew, StoreWay

        assert isinstance(crew, RayCrew)
        try:
            return StoreWay(crew, spec.nbytes) if name == "ray" else DirectWay(crew, spec.nbytes)
        except BackendUnavailable as exc:
            skipped(f"{name} is left out: {exc.message}")
            return None
    if name == "gloo":
        return GlooWay(stack, crew, spec.nbytes)
    return OwnWay(crew, spec) if name == "raynixl" else TransferWay(crew, spec.nbytes)


class OwnWay:
    """raynixl: the source pushes a version, the receivers flip to it."""

    impl = "raynixl"

    def __init__(self, crew: Crew, spec: WeightsSpec) -> None:
        self._crew, self._version, self._egress = crew, 0, 0
        self._receivers = range(1, crew.world)
        names = [f"rank-{rank}" for rank in range(crew.world)]
        records = [one["record"] for one in crew.each("agent", [{"name": name} for name in names])]
        crew.some("meet", range(crew.world), records=records)
        options = {"delta": "off", "copy_out": not spec.is_in_place}  # nothing stays the same from run to run
        crew.some("publish", range(1), targets=names[1:], topology=spec.topology, options=options)
        crew.some("subscribe", self._receivers, install=spec.install)

    def prepare(self) -> None:
        """Remember what was pulled before."""
        self._before = self._pulled()

    def run(self) -> list[Fields]:
        """Push once."""
        self._version += 1
        return self._crew.some("push", range(1), version=self._version)

    def egress_nbytes(self) -> int:
        """Return what the receivers' agents have counted."""
        return self._pulled() - self._before

    def _pulled(self) -> int:
        return sum(one["nbytes"] for one in self._crew.some("pulled", self._receivers, source=_SOURCE))


class GlooWay:
    """torch.distributed's broadcast over gloo, tensor by tensor into the parameters."""

    impl = "gloo"

    def __init__(self, stack: ExitStack, crew: Crew, nbytes: int) -> None:
        self._crew, self._nbytes = crew, nbytes
        store = stack.enter_context(tempfile.TemporaryDirectory())
        ranks = [{"rank": rank, "world": crew.world, "store": f"{store}/store"} for rank in range(crew.world)]
        crew.each("join_gloo", ranks)

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> list[Fields]:
        """Broadcast once."""
        return self._crew.some("gloo", range(self._crew.world))[1:]

    def egress_nbytes(self) -> int:
        """Its broadcast is a binomial tree: the source sends to as many as the tree is deep."""
        return self._nbytes * math.ceil(math.log2(self._crew.world))


class TransferWay:
    """One read of as many bytes by each receiver, arena to arena: what `raynixl bench transfer` reaches."""

    impl = "transfer"

    def __init__(self, crew: Crew, nbytes: int) -> None:
        self._crew, self._nbytes = crew, nbytes
        crew.some("arena", range(crew.world), nbytes=nbytes)
        crew.some("fill_arena", range(1), seed=_SEEDS_APART)

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> list[Fields]:
        """Read once."""
        return self._crew.some("transfer", range(1, self._crew.world), source=_SOURCE)

    def egress_nbytes(self) -> int:
        """Every receiver reads all from the source."""
        return self._nbytes * (self._crew.world - 1)

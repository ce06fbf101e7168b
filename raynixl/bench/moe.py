"""The MoE benchmark: tokens to their experts and back, against other ways, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raynixl.bench.crew import Crew, ProcessCrew
from raynixl.bench.moe_load import Load
from raynixl.bench.names import check_baselines
from raynixl.bench.timing import rounded
from raynixl.errors import ConfigError
from raynixl.memory import available_nbytes

Row = dict[str, Any]
Seconds = NDArray[np.float64]
BASELINES = ("gloo", "gloo-index-add", "mpi", "mpi-split", "mpi-index-add")
LAYOUTS = ("tokens", "experts", "slots")
MEMORIES = ("dram", "vram")
DTYPES = ("bfloat16", "float16", "float32")
_ROUND_SECONDS = 0.15
"""How long one way is measured in one round."""
_MAX_STEPS = 100
_OURS = ("raynixl",)
_SEED, _OTHER_SEED = 1, 2
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """What to measure."""

    tokens: tuple[int, ...] = (128,)
    """Tokens of each rank; one after the other."""
    ranks: int = 4
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    dtype: str = "bfloat16"
    layout: str = "tokens"
    """How rows lie after a dispatch: by source and token, by expert, or in fixed slots by source."""
    memory: str = "dram"
    """Where tokens are: "dram", or "vram" for the first GPU, which all ranks share."""
    rounds: int = 7
    baselines: tuple[str, ...] = ()
    is_verified: bool = True

    def loads(self) -> list[Load]:
        """Return what is dispatched."""
        shape = self.hidden, self.topk, self.experts, self.dtype, self.layout, self.memory
        return [Load(self.ranks, tokens, *shape) for tokens in self.tokens]

    def ours(self) -> tuple[str, ...]:
        """Return ours: on a GPU, in fixed slots, also as a CUDA graph that is replayed."""
        is_captured = self.memory == "vram" and self.layout == "slots"
        return (*_OURS, "raynixl-graph") if is_captured else _OURS

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: says what and why.
        """
        check_baselines(self.baselines, BASELINES)
        if self.dtype not in DTYPES:
            raise ConfigError(f"rows of {self.dtype!r:.40} are not measured", hint=f"choose of: {', '.join(DTYPES)}")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"there is no layout {self.layout!r:.40}", hint=f"choose of: {', '.join(LAYOUTS)}")
        if self.memory not in MEMORIES:
            raise ConfigError(f"there is no memory {self.memory!r:.40}", hint=f"choose of: {', '.join(MEMORIES)}")
        if self.memory == "vram":
            _check_gpu(self.baselines)
        if self.layout != "tokens" and self.baselines:
            raise ConfigError(f"the baselines have no layout {self.layout!r}", hint="compare in layout tokens")
        if self.topk > self.experts:
            raise ConfigError(f"there are no {self.topk} of {self.experts} experts", hint="ask for a smaller --topk")
        need = max(_need_nbytes(load, self.baselines) for load in self.loads())
        if need > available_nbytes() * 0.9:
            raise ConfigError(
                f"{need / 1e9:.1f} GB are needed but only {available_nbytes() / 1e9:.1f} are free",
                hint="ask for fewer --tokens",
            )


@dataclass(slots=True)
class Times:
    """Seconds of all steps of one way, by what was done in them."""

    impl: str
    crew: Crew
    steps: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        """Measure one round."""
        for name, spans in self._measure(self.steps).items():
            self.seconds.setdefault(name, []).extend(spans)

    def calibrate(self) -> None:
        """Warm up; find out how many steps fit one round."""
        self._measure(2)
        seconds = sum(float(np.median(spans)) for spans in self._measure(2).values())
        self.steps = int(min(_MAX_STEPS, max(1, _ROUND_SECONDS / seconds)))

    def median_ms(self, name: str) -> float:
        """Return the median of what was done, in milliseconds."""
        return rounded(float(np.median(self.seconds[name])) * 1e3)

    def p99_ms(self, name: str) -> float:
        """Return the 99th percentile."""
        return rounded(float(np.percentile(self.seconds[name], 99)) * 1e3)

    def _measure(self, steps: int) -> dict[str, Seconds]:
        answers = self.crew.some("run", range(self.crew.world), impl=self.impl, steps=steps)
        return {name: step_seconds([answer[name] for answer in answers]) for name in answers[0]}


def step_seconds(ranks: list[list[list[int]]]) -> Seconds:
    """Return the seconds of each step, from when the first rank leaves the barrier until the last one is done.

    `ranks` has (begin, end) in nanoseconds of every step, for each rank.
    """
    spans = np.array(ranks, np.int64)
    seconds: Seconds = (spans[:, :, 1].max(0) - spans[:, :, 0].min(0)) / 1e9
    return seconds


def run_moe(spec: MoeSpec, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """Yield a row for ours and each baseline at each number of tokens: medians of rounds measured in turn.

    Every rank is a process, and every rank measures. All of them begin a step at a barrier, which is outside of the
    time. The experts' rows are computed beforehand: only what carries them is measured.
    """
    spec.check()
    with ExitStack() as stack:
        bench = MoeBench(stack, spec)
        for load in spec.loads():
            bench.prepare(load)
            for number in range(spec.rounds):
                bench.do_round(is_reversed=number % 2 == 1)
                step()
            yield from bench.rows()


class MoeBench:
    """The ranks, the ways, and their times under one load."""

    def __init__(self, stack: ExitStack, spec: MoeSpec) -> None:
        self._spec = spec
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._crews: dict[str, Crew] = {}
        self._impls: dict[str, list[str]] = {}
        for impl in (*spec.ours(), *spec.baselines):
            kind = "mpi" if impl.startswith("mpi") else "here"
            self._impls.setdefault(kind, []).append(impl)
        for kind in self._impls:
            self._crews[kind] = crew = _make_crew(kind, stack, spec.ranks)
            ranks = [{"rank": rank, "ranks": spec.ranks, "barrier": str(folder / kind)} for rank in range(spec.ranks)]
            crew.each("start", ranks)
        self._join(folder)

    def _join(self, folder: Path) -> None:
        """Let the ranks meet, for ours and for gloo."""
        spec, crew = self._spec, self._crews["here"]
        names = [f"moe-{rank}" for rank in range(spec.ranks)]
        records = [one["record"] for one in crew.each("agent", [{"name": name} for name in names])]
        crew.some("meet", range(spec.ranks), records=records, names=names)
        if any(impl.startswith("gloo") for impl in self._impls["here"]):
            ranks = [{"rank": rank, "ranks": spec.ranks, "store": str(folder / "store")} for rank in range(spec.ranks)]
            crew.each("join_gloo", ranks)

    def prepare(self, load: Load) -> None:
        """Have all ranks make their tokens and buffers, and warm every way up."""
        self._load = load
        self._times, self._floors = [], []
        for kind, crew in self._crews.items():
            ranks = range(crew.world)
            crew.some("load", ranks, load=asdict(load), impls=self._impls[kind], seed=_SEED)
            for impl in self._impls[kind]:
                answers = crew.some("prepare", ranks, impl=impl)
                self._nbytes = sum(answer["rows"] for answer in answers) * load.row_nbytes
                self._times.append(Times(impl, crew))
        here = self._crews["here"]
        floors: list[str] = here.some("gather", range(here.world))[0]["names"]
        self._floors = [Times(impl, here) for impl in floors]
        for times in (*self._times, *self._floors):
            times.calibrate()

    def do_round(self, *, is_reversed: bool) -> None:
        """Measure everything once."""
        every = [*self._times, *self._floors]
        for times in reversed(every) if is_reversed else every:
            times.run()

    def rows(self) -> Iterator[Row]:
        """Return the medians, and what a last step of each way gave."""
        spec, load = self._spec, self._load
        floor = min(self._floors, key=lambda times: times.median_ms("gather"))
        for times in self._times:
            yield {
                "bench": "moe", "impl": times.impl, "ranks": spec.ranks, "tokens": load.tokens,
                "hidden": load.hidden, "topk": load.topk, "experts": load.experts, "dtype": load.dtype,
                "layout": load.layout, **_of_memory(load),
                "dispatch_ms": times.median_ms("dispatch"), "combine_ms": times.median_ms("combine"),
                "both_ms": times.median_ms("both"), "floor_ms": floor.median_ms("gather"), "floor": floor.impl,
                "dispatch_p99_ms": times.p99_ms("dispatch"), "combine_p99_ms": times.p99_ms("combine"),
                "p99_ms": times.p99_ms("both"), "nbytes": self._nbytes, **_count_messages(times),
                "verified": self._verify(times) if spec.is_verified else False,
            }  # fmt: skip

    def _verify(self, times: Times) -> bool:
        """Dispatch and combine other tokens once, and compare with plain torch."""
        answers = times.crew.some("verify", range(times.crew.world), impl=times.impl, seed=_OTHER_SEED)
        return all(answer["is_right"] for answer in answers)


def _check_gpu(baselines: tuple[str, ...]) -> None:
    """Refuse a GPU that is not there, and baselines of the host's.

    Raises:
        ConfigError: as said.
    """
    import torch

    if baselines:
        raise ConfigError("the baselines take memory of the host", hint="leave --baseline away; the floor is measured")
    if not torch.cuda.is_available():
        raise ConfigError("memory of a GPU needs torch with CUDA, and a GPU", hint="see `raynixl doctor`")


def _of_memory(load: Load) -> Row:
    if load.memory == "dram":
        return {}
    from raynixl.bench.moe_gpu import mps_runs

    return {"memory": load.memory, "mps": mps_runs()}


def _make_crew(kind: str, stack: ExitStack, ranks: int) -> Crew:
    if kind == "mpi":
        from raynixl.bench.moe_crew import MpiCrew

        return MpiCrew(stack, ranks)
    return ProcessCrew(stack, ranks, "raynixl.bench.moe_rank", _LOOPBACK)


def _count_messages(times: Times) -> Row:
    """Return the messages for each pair of ranks and direction, as the transport has counted them, if it does."""
    answers = times.crew.some("messages", range(times.crew.world), impl=times.impl)
    counted = {name: [answer[name] for answer in answers] for name in ("dispatch", "combine")}
    return {f"{name}_messages": None if None in each else max(each) for name, each in counted.items()}


def _need_nbytes(load: Load, baselines: tuple[str, ...]) -> int:
    """Return about how much memory all ranks need: ours has up to four slots, each baseline two buffers."""
    kinds = len({name.split("-")[0] for name in baselines})
    rows = (4 + 1 + kinds) * load.most_received + kinds * load.most_sent + (3 + kinds) * load.tokens
    return load.ranks * rows * load.row_nbytes

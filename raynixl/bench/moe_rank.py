"""A rank of the MoE benchmark: a process that dispatches and combines its tokens in every way it knows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

from raynixl.agents import Agent
from raynixl.bench.moe_load import Load, Received, Tokens, is_received, is_result, make_tokens
from raynixl.bench.moe_own import GATHERS, Gather, OwnWay
from raynixl.bench.moe_packed import Buffer, Exchange, PackedWay, Reduce, Sum, sum_by_index_add
from raynixl.bench.step_barrier import StepBarrier
from raynixl.bench.target import Fields, answer_requests
from raynixl.bench.timing import quiet
from raynixl.collectives import Group

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]
"""Nanoseconds at a begin and at its end, by the clock that all processes of a host share."""


class Way(Protocol):
    """One way to bring tokens to their experts and back."""

    def dispatch(self, tokens: Tokens) -> None:
        """Bring rows, ids and weights to the ranks that hold the experts."""

    def received(self) -> Received:
        """Return what came, in order of source and token."""

    def compute(self) -> int:
        """Let the experts work; return how many rows they got."""

    def combine(self) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token."""


class MoeRank:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self, exchanges: Mapping[str, Exchange]) -> None:
        self._stack = ExitStack()
        self._exchanges = exchanges
        self._agent: Agent | None = None
        self._ways: dict[str, Way] = {}
        self._gathers: dict[str, Callable[[], object]] = {}

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request."""
        answer: Fields = getattr(self, f"do_{do}")(**fields)
        return answer

    def close(self) -> None:
        """Let go of everything; idempotent."""
        self._clear()
        self._stack.close()

    def do_start(self, rank: int, ranks: int, barrier: str) -> Fields:
        """Learn this rank's number; one thread computes on each rank."""
        import torch

        torch.set_num_threads(1)
        self._rank = rank
        self._barrier = StepBarrier(Path(barrier), rank, ranks)
        return {}

    def do_agent(self, name: str) -> Fields:
        """Make an agent; answer with its record."""
        self._agent = self._stack.enter_context(Agent(name))
        return {"record": base64.b64encode(self._agent.record()).decode()}

    def do_meet(self, records: list[str], names: list[str]) -> Fields:
        """Know all other agents; be in a group with them."""
        assert self._agent is not None
        for record in records:
            self._agent.peer(base64.b64decode(record))
        self._group = self._stack.enter_context(Group(self._agent, names))
        return {}

    def do_join_gloo(self, rank: int, ranks: int, store: str) -> Fields:
        """Join a process group."""
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        self._stack.callback(dist.destroy_process_group)
        dist.barrier()
        return {}

    def do_load(self, load: Fields, impls: list[str], seed: int) -> Fields:
        """Make tokens and buffers, in place of those that there were."""
        self._clear()
        self._load = Load(**load)
        self._buffer = Buffer(self._load)
        self._tokens = make_tokens(self._load, self._rank, seed)
        for impl in impls:
            self._ways[impl] = self._make_way(impl)
        return {}

    def do_gather(self) -> Fields:
        """Prepare the gathers; answer with their names."""
        if self._load.memory == "vram":
            from raynixl.bench.moe_gpu import gathers

            self._gathers = dict(gathers(self._load, self._rank, self._tokens))
            return {"names": list(self._gathers)}
        gather = Gather(self._load, self._rank, self._tokens)
        self._gathers = {name: gather.by(name) for name in GATHERS}
        return {"names": list(self._gathers)}

    def do_prepare(self, impl: str) -> Fields:
        """Dispatch once and compute what the experts give: every later combine brings that back."""
        way = self._ways[impl]
        way.dispatch(self._tokens)
        rows = way.compute()
        way.combine()
        return {"rows": rows}

    def do_run(self, impl: str, steps: int) -> Fields:
        """Dispatch and combine, first each for itself and then together; answer with when each began and ended."""
        if impl in self._gathers:
            with quiet():
                return {"gather": [self._time(self._gathers[impl]) for _ in range(steps)]}
        way, tokens = self._ways[impl], self._tokens

        def dispatch() -> None:
            way.dispatch(tokens)

        def both() -> None:
            way.dispatch(tokens)
            way.combine()

        with quiet():
            apart = [(self._time(dispatch), self._time(way.combine)) for _ in range(steps)]
            together = [self._time(both) for _ in range(steps)]
        return {"dispatch": [one for one, _ in apart], "combine": [one for _, one in apart], "both": together}

    def do_verify(self, impl: str, seed: int) -> Fields:
        """Send other tokens once; answer whether just the right rows came, and the right sums."""
        way, load, tokens = self._ways[impl], self._load, make_tokens(self._load, self._rank, seed)
        way.dispatch(tokens)
        is_right = is_received(load, self._rank, way.received(), seed)
        way.compute()
        is_exact = not impl.endswith("index-add")
        return {"is_right": is_right and is_result(load, way.combine().cpu(), tokens, is_exact=is_exact)}

    def do_messages(self, impl: str) -> Fields:
        """Answer with how many messages a dispatch and a combine send to one rank at most, if they are counted."""
        way = self._ways[impl]
        if not isinstance(way, OwnWay):
            return {"dispatch": None, "combine": None}
        before = way.sent()
        way.dispatch(self._tokens)
        between = way.sent()
        way.combine()
        return {"dispatch": _most(before, between), "combine": _most(between, way.sent())}

    def _time(self, work: Callable[[], object]) -> Span:
        self._barrier.wait()
        began = perf_counter_ns()
        work()
        return began, perf_counter_ns()

    def _make_way(self, impl: str) -> Way:
        if self._load.memory == "vram":
            from raynixl.bench.moe_gpu import GRAPH, GpuWay

            return GpuWay(self._group, self._load, is_graph=impl == GRAPH)
        if impl == "raynixl":
            return OwnWay(self._group, self._load, self._buffer)
        name = impl.removesuffix("-index-add")
        reduce: Reduce = Sum(self._load) if name == impl else sum_by_index_add
        for first in self._ways.values():
            if isinstance(first, PackedWay):
                return first.variant(self._exchanges[name], reduce)
        return PackedWay(self._exchanges[name], self._load, self._rank, reduce, buffer=self._buffer)

    def _clear(self) -> None:
        """Let go of the present load."""
        for way in self._ways.values():
            close = getattr(way, "close", None)
            if close is not None:
                close()
        self._ways.clear()
        self._gathers.clear()


def _most(before: list[int], after: list[int]) -> int:
    """The largest growth."""
    return max((now - then for then, now in zip(before, after, strict=True)), default=0)


if __name__ == "__main__":
    from raynixl.bench.moe_gloo import GlooExchange

    answer_requests(MoeRank({"gloo": GlooExchange()}))

"""A rank of the MoE benchmark: a process that dispatches and combines its tokens in every way it knows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

from raynixl.agents import Agent
from raynixl.bench.moe_load import Load, Received, Tokens, is_received, is_result, make_tokens, run_experts
from raynixl.bench.moe_own import GATHERS, Gather, OwnWay
from raynixl.bench.moe_packed import Exchange, PackedWay, Reduce, Sum, rows_of, sum_by_index_add
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

    def dispatch(self, tokens: Tokens) -> Received:
        """Bring rows, ids and weights to the ranks that hold the experts."""

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows back and sum them for each token."""


class MoeRank:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self, exchanges: Mapping[str, Callable[[], Exchange]]) -> None:
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
        self._y = rows_of(self._load, self._load.most_received)
        self._tokens = make_tokens(self._load, self._rank, seed)
        for impl in impls:
            self._ways[impl] = self._make_way(impl)
        return {}

    def do_gather(self) -> Fields:
        """Prepare the gathers; answer with their names."""
        gather = Gather(self._load, self._rank, self._tokens)
        self._gathers = {name: gather.by(name) for name in GATHERS}
        return {"names": list(self._gathers)}

    def do_prepare(self, impl: str) -> Fields:
        """Dispatch once and compute what the experts give: every later combine brings that back."""
        received = self._ways[impl].dispatch(self._tokens)
        self._experts(received)
        self._count = len(received.x)
        self._ways[impl].combine(self._y[: self._count])
        return {"rows": self._count}

    def do_run(self, impl: str, steps: int) -> Fields:
        """Dispatch and combine, first each for itself and then together, or gather; answer with when each began and ended."""
        if impl in self._gathers:
            with quiet():
                return {"gather": [self._time(self._gathers[impl]) for _ in range(steps)]}
        way, tokens, y = self._ways[impl], self._tokens, self._y[: self._count]
        dispatch: list[Span] = []
        combine: list[Span] = []
        both: list[Span] = []
        with quiet():
            for _ in range(steps):
                dispatch.append(self._time(lambda: way.dispatch(tokens)))
                combine.append(self._time(lambda: way.combine(y)))
            for _ in range(steps):
                both.append(self._time(lambda: (way.dispatch(tokens), way.combine(y))))
        return {"dispatch": dispatch, "combine": combine, "both": both}

    def do_verify(self, impl: str, seed: int) -> Fields:
        """Send other tokens once; answer whether just the right rows came, and the right sums."""
        way, tokens = self._ways[impl], make_tokens(self._load, self._rank, seed)
        received = way.dispatch(tokens)
        is_right = is_received(self._load, self._rank, received, seed)
        self._experts(received)
        found = way.combine(self._y[: len(received.x)])
        return {"is_right": is_right and is_result(self._load, found, tokens, is_exact=impl == "raynixl")}

    def do_messages(self, impl: str) -> Fields:
        """Answer with the messages of one step to the rank that gets most of them, if they are counted."""
        way = self._ways[impl]
        if not isinstance(way, OwnWay):
            return {"messages": None}
        return {"messages": None}

    def _experts(self, received: Received) -> None:
        run_experts(self._load, self._rank, received, self._y[: len(received.x)])

    def _time(self, work: Callable[[], object]) -> Span:
        self._barrier.wait()
        began = perf_counter_ns()
        work()
        return began, perf_counter_ns()

    def _make_way(self, impl: str) -> Way:
        if impl == "raynixl":
            return OwnWay(self._group, self._load)
        name, _, variant = impl.partition("-")
        reduce: Reduce = sum_by_index_add if variant == "index-add" else Sum(self._load)
        if variant and isinstance(first := self._ways.get(name), PackedWay):
            return first.with_reduce(reduce)
        return PackedWay(self._exchanges[name](), self._load, self._rank, reduce)

    def _clear(self) -> None:
        """Let go of the present load."""
        for way in self._ways.values():
            if isinstance(way, OwnWay):
                way.close()
        self._ways.clear()
        self._gathers.clear()


if __name__ == "__main__":
    from raynixl.bench.moe_gloo import GlooExchange

    answer_requests(MoeRank({"gloo": GlooExchange}))

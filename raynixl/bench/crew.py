"""The crew of the weights benchmark: rank 0 is the source, the others receive, each in a process of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

from raynixl.bench.process import TargetProcess

Fields = dict[str, Any]


class Crew(Protocol):
    """Ranks that do what they are asked, wherever they run."""

    world: int

    def each(self, do: str, fields: list[Fields]) -> list[Fields]:
        """Have every rank do one thing at the same time, each with fields of its own."""

    def some(self, do: str, ranks: range, **fields: Any) -> list[Fields]:
        """Have some ranks do one thing at the same time."""


class ProcessCrew:
    """Plain child processes."""

    def __init__(self, stack: ExitStack, world: int) -> None:
        self.world = world
        self._ranks = [stack.enter_context(TargetProcess("raynixl.bench.weights_rank")) for _ in range(world)]

    def each(self, do: str, fields: list[Fields]) -> list[Fields]:
        """Have every rank do one thing at the same time, each with fields of its own."""
        for rank, own in zip(self._ranks, fields, strict=True):
            rank.tell(do, **own)
        return [rank.hear(do) for rank in self._ranks]

    def some(self, do: str, ranks: range, **fields: Any) -> list[Fields]:
        """Have some ranks do one thing at the same time."""
        for rank in ranks:
            self._ranks[rank].tell(do, **fields)
        return [self._ranks[rank].hear(do) for rank in ranks]

"""Crews: the ranks of a benchmark, each in a process of its own, asked together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
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

    def __init__(
        self,
        stack: ExitStack,
        world: int,
        module: str = "raynixl.bench.weights_rank",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.world = world
        self._ranks = [stack.enter_context(TargetProcess(module, environment)) for _ in range(world)]

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

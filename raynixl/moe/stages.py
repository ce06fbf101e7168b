"""Stages: the columns and the group that one rank takes part in under one view, an `ExpertParallel` for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from raynixl.collectives import Group
from raynixl.moe.parallel import ExpertParallel
from raynixl.moe.placement import NOBODY, Placement
from raynixl.moe.staging import Shares

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.view import View


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a layer is made with: the same on all ranks, whoever takes part."""

    name: str
    experts: int
    hidden: int
    topk: int
    max_tokens: int
    dtype: torch.dtype
    capacity: int | None
    deadline: float
    eager_nbytes: int


class Stages:
    """What one rank has of a view. Whoever it waits for while they are made and used, `watch` may end the wait."""

    def __init__(
        self, agent: Agent, sizes: Sizes, view: View, rank: int, *, placement: Placement,
        building: Callable[[], None], working: Callable[[], None],
    ) -> None:  # fmt: skip
        self.view, self.sizes = view, sizes
        self.grid, self.live = view.grid()
        self._me = self.live.index(rank)
        self._agent, self._working = agent, working
        self._watch = building
        self.columns = self.grid.columns_of(self._me)
        self.across: list[ExpertParallel] = []
        self._stack = ExitStack()
        self._spread(placement)
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._watch = working

    def _open(self) -> None:
        """Meet the members of each column, in ascending order, then those of the group."""
        sizes, grid = self.sizes, self.grid
        spread = sizes.topk * sizes.max_tokens
        arriving = sizes.capacity or min(
            grid.world * sizes.max_tokens, max(spread + spread // 4, sizes.max_tokens)
        )  # fmt: skip
        for column in self.columns:
            ep = self._meet(
                grid.column(column), f"column{column}", self._of_groups, sizes.max_tokens, sizes.capacity
            )  # fmt: skip
            self.across.append(ep)
        most = sizes.max_tokens * self._most_served()
        self.inside = self._meet(self._mates, f"group{self._group}", self._of_mates, most, arriving)
        every = [*self.across, self.inside]
        for ep in every:
            ep.beside([other for other in every if other is not ep])

    def _meet(
        self, places: Sequence[int], label: str, placement: Placement, max_tokens: int, capacity: int | None
    ) -> ExpertParallel:
        sizes, view = self.sizes, self.view
        names = [view.members[self.live[place]].name for place in places]
        name = f"{sizes.name}.v{view.number}.{view.leader}.{label}"
        group = self._stack.enter_context(Group(self._agent, names, name=name))
        ep = ExpertParallel(
            group, experts=sizes.experts, hidden=sizes.hidden, topk=sizes.topk, dtype=sizes.dtype,
            placement=placement, name=name, deadline=sizes.deadline, max_ranks=len(names), max_tokens=max_tokens,
            capacity=capacity, watch=self._look, eager_nbytes=sizes.eager_nbytes,
        )  # fmt: skip
        return self._stack.enter_context(ep)

    def _look(self) -> None:
        self._watch()

    @property
    def _group(self) -> int:
        return int(self.grid.group_of()[self._me])

    @property
    def _mates(self) -> tuple[int, ...]:
        return self.grid.groups[self._group]

    def _most_served(self) -> int:
        """Return how many sources' rows a rank forwards at most."""
        targets = self.grid.forwarders()[:, self.grid.local_of()]
        return int(np.bincount(targets.ravel()).max())

    def parts(self) -> list[tuple[ExpertParallel, tuple[int, ...]]]:
        """Return what this rank takes part in, each with its ranks."""
        places = [*(self.grid.column(column) for column in self.columns), self._mates]
        return [
            (ep, tuple(self.live[place] for place in each))
            for ep, each in zip([*self.across, self.inside], places, strict=True)
        ]

    def gone(self) -> set[int]:
        """Return the ranks that a column or the group goes on without."""
        return {
            ranks[place] for ep, ranks in self.parts() for place in set(range(len(ranks))) - set(ep.active)
        }  # fmt: skip

    def place(self, placement: Placement) -> None:
        """Use another placement."""
        self._spread(placement)
        for ep in self.across:
            ep.place(self._of_groups)
        self.inside.place(self._of_mates)

    def _spread(self, placement: Placement) -> None:
        """Work out the group of each expert, and its place in ours; those of ranks that do not take part have none."""
        self.placement, holders = placement, placement.holders
        place_of = np.full(max(len(self.view.members), int(holders.max(initial=0)) + 1), NOBODY)
        place_of[list(self.live)] = np.arange(len(self.live))
        places = np.where(holders >= 0, place_of[holders], NOBODY)
        groups = np.where(places >= 0, self.grid.group_of()[places], NOBODY)
        self._of_groups = Placement(groups)
        self._of_mates = Placement(np.where(groups == self._group, self.grid.local_of()[places], NOBODY))
        self.physical = torch.tensor(self._of_groups.experts_of(self._group), dtype=torch.int64)
        """By local id of the group, its expert."""

    def shares(self, seconds: float) -> Shares:
        """Share the time out: who waits for a forwarder must wait for longer than the forwarder does."""
        turns = [self.grid.columns_of(place) for place in range(self.grid.world)]
        order = [max(turn.index(column) for turn in turns if column in turn) for column in self.columns]
        return Shares(seconds, tuple(order), max(map(len, turns)) + 1)

    def close(self) -> None:
        """Withdraw the memory of all parts; results that live keep theirs."""
        self._stack.close()

"""Stages: the columns and the group that one rank takes part in under one view, an `ExpertParallel` for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from raynixl.collectives import Group
from raynixl.moe.parallel import ExpertParallel
from raynixl.moe.placement import NOBODY, Placement
from raynixl.moe.rank import OnLost
from raynixl.moe.staging import Shares

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.errors import RaynixlError
    from raynixl.moe.view import View

T = TypeVar("T")


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
    on_lost: OnLost


class Stage(ExpertParallel):
    """A column, or a group: one stage, which is given tensors in memory of the host."""

    def _gpu_of(self, tensor: Any, failed: RaynixlError | None) -> None:
        """Whatever the caller has given was fetched."""

    def _within(self, tensor: Any, operation: Callable[[], T], async_: bool) -> Callable[[], T]:
        return operation


@dataclass(frozen=True, slots=True)
class Room:
    """How much one stage takes, and what it makes of terms that are missing.

    Only the source knows all weights of a token: where a group's holders are lost, the columns make up for them, to
    which their experts are nobody's.
    """

    max_tokens: int
    capacity: int | None
    on_lost: OnLost


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
            room = Room(sizes.max_tokens, sizes.capacity, sizes.on_lost)
            self.across.append(self._meet(grid.column(column), f"column{column}", self._of_groups, room))
        room = Room(sizes.max_tokens * self._most_served(), arriving, OnLost.DROP)
        self.inside = self._meet(self._mates, f"group{self._group}", self._of_mates, room)
        every = [*self.across, self.inside]
        for ep in every:
            ep.beside([other for other in every if other is not ep])

    def _meet(self, places: Sequence[int], label: str, placement: Placement, room: Room) -> Stage:
        sizes, view = self.sizes, self.view
        names = [view.members[self.live[place]].name for place in places]
        name = f"{sizes.name}.v{view.number}.{view.leader}.{label}"
        group = self._stack.enter_context(Group(self._agent, names, name=name))
        ep = Stage(
            group, experts=sizes.experts, hidden=sizes.hidden, topk=sizes.topk, dtype=sizes.dtype,
            placement=placement, name=name, deadline=sizes.deadline, max_ranks=len(names), max_tokens=room.max_tokens,
            capacity=room.capacity, on_lost=room.on_lost, watch=self._look, eager_nbytes=sizes.eager_nbytes,
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

    def waits(self) -> list[torch.Tensor]:
        """Return for each part zeros, to which the seconds are added that its ranks are waited for."""
        return [torch.zeros(len(ranks), dtype=torch.float64) for _, ranks in self.parts()]

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

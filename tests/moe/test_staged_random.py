"""Random programs in two stages and flat, side by side: ranks go meanwhile, and all results are the same bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from raynixl.moe import OnLost
from raynixl.moe.grid import Grid, make_grid
from raynixl.moe.two_level import TwoLevel

HIDDEN, TOKENS = 24, 7
LAYOUTS = ("tokens", "experts", "slots")


@dataclass
class Plan:
    """What a seed says: sizes, and operations one after another."""

    seed: int
    world: int = 0
    grid: Grid | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[Any, ...]] = field(default_factory=list)
    is_exact: bool = False
    """Whether sums are exact: then they are the same wherever the weights are."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.world = int(rng.integers(3, 8))
        self.grid = self._grid(rng) if rng.random() < 0.6 else make_grid(self.world)
        experts, topk = int(rng.integers(self.world, 3 * self.world)), int(rng.integers(1, 5))
        self.is_exact = bool(rng.random() < 0.5)
        dtype = torch.float32 if self.is_exact else torch.bfloat16
        self.options = {
            "experts": experts, "hidden": HIDDEN, "topk": topk, "max_tokens": TOKENS, "dtype": dtype,
            "placement": tuple(rng.integers(0, self.world, experts).tolist()),
        }  # fmt: skip
        handles, left = 0, list(range(self.world))
        for number in range(int(rng.integers(6, 12))):
            kind = rng.choice(["fresh", "cached", "combine", "combine", "weights", "mask", "place"])
            if kind == "mask" and len(left) > 1:
                left.remove(victim := int(rng.choice(left)))
                self.steps.append(("mask", victim))
            elif kind == "place":
                self.steps.append(("place", tuple(rng.integers(0, self.world, experts).tolist())))
            elif kind in ("combine", "weights") and handles:
                self.steps.append((kind, int(rng.integers(handles)), number))
            elif kind == "cached" and handles:
                self.steps.append(("cached", int(rng.integers(handles)), number))
            else:
                at = "holder" if self.is_exact and rng.random() < 0.6 else "source"
                self.steps.append(("fresh", str(rng.choice(LAYOUTS)), int(rng.integers(1, 4)), at, number))
                handles += 1
        self.options["on_lost"] = OnLost.RENORMALISE if rng.random() < 0.5 else OnLost.DROP

    def _grid(self, rng: np.random.Generator) -> Grid:
        cuts = np.unique(rng.choice(np.arange(1, self.world), rng.integers(0, self.world)))
        parts = np.split(rng.permutation(self.world), cuts)
        return Grid(tuple(tuple(sorted(part.tolist())) for part in parts if len(part)))

    def given(self, rank: int, number: int, tokens: int | None = None) -> Any:
        """Draw what a rank gives to an operation."""
        rng = np.random.default_rng([self.seed, rank, number])
        count = int(rng.integers(0, TOKENS + 1)) if tokens is None else tokens
        experts, topk = self.options["experts"], self.options["topk"]
        ids = rng.integers(0, experts, (count, topk))
        ids[rng.random(ids.shape) < 0.15] = -1
        x = rng.integers(-8, 9, (count, HIDDEN)) if self.is_exact else rng.standard_normal((count, HIDDEN))
        weights = rng.integers(1, 4, ids.shape) if self.is_exact else rng.random(ids.shape)
        return (
            torch.from_numpy(x).to(self.options["dtype"]), torch.from_numpy(ids), torch.from_numpy(weights).float()
        )  # fmt: skip


def meetings(plan: Plan) -> list[threading.Barrier]:
    """Return where those that are left meet before they mask or place, so that all do between the same operations."""
    made, left = [], plan.world
    for step in plan.steps:
        if step[0] in ("mask", "place"):
            made.append(threading.Barrier(left))
            left -= step[0] == "mask"
    return made


def play(plan: Plan, rank: int, ep: Any, meetings: list[threading.Barrier]) -> list[Any]:
    """Do a rank's part; return what came of each step in a form that has no order of rows."""
    turns = iter(meetings)
    made: list[Any] = []
    found: list[Any] = []
    for step in plan.steps:
        match step:
            case ("mask", victim):
                next(turns).wait(30.0)
                if victim == rank:
                    break
                ep.mask(victim)
            case ("place", holders):
                next(turns).wait(30.0)
                ep.place(holders)
            case ("fresh", layout, alignment, at, number):
                x, ids, weights = plan.given(rank, number)
                r = ep.dispatch(x, ids, weights, layout=layout, alignment=alignment, weights_at=at)
                made.append((r, ep.local_experts))
                found.append(rows_of(r))
            case ("cached", which, number):
                r, local = made[which]
                if r.handle.placement != ep.placement.digest:
                    continue
                x, _, _ = plan.given(rank, number, len(plan.given(rank, number_of(plan, which))[0]))
                again = ep.dispatch(x, handle=r.handle)
                found.append(rows_of(again))
                found.append(ep.combine(experts(again, local), again.handle))
            case ("combine", which, _):
                r, local = made[which]
                found.append(ep.combine(experts(r, local), r.handle))
            case ("weights", which, _):
                r, local = made[which]
                rows = len(r.sources)
                said = (r.sources * 8 + r.tokens).float()[:, None] + torch.arange(plan.options["topk"]) / 8
                assert said.shape[0] == rows
                found.extend(ep.combine_weights(experts(r, local), said, r.handle))
    return found


def number_of(plan: Plan, which: int) -> int:
    """Return the number of the dispatch that has made a handle."""
    return [step for step in plan.steps if step[0] == "fresh"][which][-1]


def rows_of(r: Any) -> Any:
    """Return what came, by source and token; fixed slots as they lie."""
    if r.handle.layout == "slots":
        filled = (r.topk_idx >= 0).any(-1)
        weights = None if r.topk_weights is None else r.topk_weights[filled].tolist()
        return r.topk_idx.tolist(), r.x[filled].tolist(), weights, r.sources.tolist(), r.tokens.tolist()
    origins = list(zip(r.sources.tolist(), r.tokens.tolist(), strict=True))
    ids = sorted(zip(origins, r.topk_idx.tolist(), strict=True))
    if r.handle.layout == "tokens":
        weights = [None] * len(r.x) if r.topk_weights is None else r.topk_weights.tolist()
        return ids, sorted(zip(origins, r.x.tolist(), weights, strict=True), key=repr), r.counts.tolist()
    begins, weights = r.offsets.tolist(), [None] * len(r.x) if r.topk_weights is None else r.topk_weights.tolist()
    parts = [
        sorted(zip(r.x[begin:end].tolist(), weights[begin:end], strict=True), key=repr)
        for begin, end in pairwise(begins)
    ]
    return ids, parts, begins, r.counts.tolist()


def experts(r: Any, local: tuple[int, ...]) -> torch.Tensor:
    """Compute what the experts make of it: each multiplies by its number."""
    numbers = torch.tensor([*(expert + 1 for expert in local), 0], dtype=r.x.dtype)
    if r.handle.layout == "experts":
        sizes = r.offsets.diff()
        return r.x * numbers[:-1].repeat_interleave(sizes)[:, None]
    factors = torch.where(r.topk_idx >= 0, numbers[r.topk_idx], 0)
    if r.handle.weights_at == "source":
        return (r.x.unsqueeze(-2) * factors.unsqueeze(-1))[r.topk_idx >= 0]
    is_row = (r.topk_idx >= 0).any(-1, keepdim=True)
    return torch.where(is_row, r.x * (factors * r.topk_weights).sum(-1, keepdim=True), 0)


def both(crew: Any, plan: Plan) -> Iterator[tuple[list[Any], list[Any]]]:
    """Play it flat and in two stages; give by rank what came of it."""
    found = []
    for kind in ({}, {"kind": TwoLevel, "grid": plan.grid}):
        turns = meetings(plan)
        with crew.experts(plan.world, **plan.options, **kind) as layer:
            found.append(layer.run(lambda rank, ep, turns=turns: play(plan, rank, ep, turns)))
    yield from zip(*found, strict=True)


@pytest.mark.parametrize("first", [0, 10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 200, 10))])
def test_both_topologies_return_the_same_whoever_goes_meanwhile(crew, first):
    for seed in range(first, first + 10):
        plan = Plan(seed)
        for rank, (flat, staged) in enumerate(both(crew, plan)):
            assert len(flat) == len(staged), f"{plan}: rank {rank}"
            for one, two in zip(flat, staged, strict=True):
                same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
                assert same, f"{plan}: rank {rank}\n{one}\n{two}"

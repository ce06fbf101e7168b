"""Programs of expert parallelism: what ranks do one after another, played by real ranks and by the reference.

A program is a value: every rank draws the same inputs from its seed, so that it can be printed, sent and run again.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from moe_rows import draw_ids, draw_rows, packed, same_numbers, unpacked

from raynixl.moe import reference
from raynixl.moe.grid import Grid
from raynixl.moe.rank import EAGER_NBYTES
from raynixl.moe.reference import Setting, Tokens

WAYS = (
    ("tokens", 1, "holder"), ("tokens", 1, "source"), ("experts", 8, "holder"), ("experts", 4, "source"),
    ("slots", 1, "holder"), ("slots", 1, "source"),
)  # fmt: skip
"""Layouts, alignments, and where the weights are."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Dispatch:
    """Dispatch fresh tokens, `counts[rank]` of each rank, and keep the result under a key."""

    key: str
    counts: tuple[int, ...]
    layout: str = "tokens"
    alignment: int = 1
    weights_at: str = "holder"
    is_weighted: bool = True
    ids_dtype: torch.dtype = torch.int64
    missing: float = 0.0
    """How likely an id is -1."""
    has_duplicates: bool = False
    only: tuple[int, ...] | None = None
    """The experts that tokens choose from; none of them: all ids are -1."""
    silent: tuple[int, ...] = ()
    """Ranks all of whose ids are -1."""
    x_kind: str = "plain"
    """'plain', 'strided', or 'bits': any bits, NaNs among them."""
    is_async: bool = False


@dataclass(frozen=True)
class Cached:
    """Dispatch other rows by the handle of a former dispatch."""

    key: str
    of: str
    x_kind: str = "plain"
    is_async: bool = False


@dataclass(frozen=True)
class Combine:
    """Run the experts on what a dispatch has brought, and combine."""

    key: str
    biases: int = 0
    out: str = ""
    """'' for none given, 'given', or 'float32'."""
    is_async: bool = False
    is_strided: bool = False
    """Whether y and what is given for the result lie within wider tensors."""


@dataclass(frozen=True)
class CombineWeights:
    """Combine with weights that come back, too."""

    key: str


@dataclass(frozen=True)
class Place:
    """Change the placement."""

    holders: tuple[int, ...]


@dataclass(frozen=True)
class Mask:
    """All others mask a rank, which does nothing more."""

    rank: int


@dataclass(frozen=True)
class Drop:
    """Let go of a result."""

    key: str


@dataclass(frozen=True)
class Program:
    """What a layer is made with, and what is done with it."""

    world: int
    holders: tuple[int, ...]
    hidden: int
    topk: int
    steps: tuple[Any, ...]
    max_tokens: int = 8
    dtype: torch.dtype = torch.bfloat16
    capacity: int | None = None
    experts: int = 0
    """How many logical experts there are: physical ones with equal remainders are replicas. 0: no replicas."""
    seed: int = 0
    grid: Grid | None = None
    """For `TwoLevel`."""
    is_eager: bool = False
    """Whether rows go out at once, and no counts before them."""

    def options(self) -> dict[str, Any]:
        """The arguments of `ExpertParallel`."""
        options = {name: getattr(self, name) for name in ("hidden", "topk", "max_tokens", "dtype")}
        more: dict[str, Any] = {} if self.capacity is None else {"capacity": self.capacity}
        if self.grid is None:
            more["eager_nbytes"] = EAGER_NBYTES if self.is_eager else 0
        return {"experts": len(self.holders), "placement": self.holders, **options, **more}

    @property
    def y_dtype(self) -> torch.dtype:
        """What experts compute in."""
        return self.dtype if self.dtype in FLOATS else torch.bfloat16

    def expert(self, name: int, rows: torch.Tensor) -> torch.Tensor:
        """What an expert computes, row by row and element by element."""
        logical = name % self.experts if self.experts else name
        return rows * (1 + logical % 7 / 8) + (logical % 5 - 2) / 4


@dataclass
class State:
    """Where a program is: the same on all ranks."""

    holders: tuple[int, ...]
    lost: frozenset[int] = frozenset()
    settings: dict[str, Setting] = field(default_factory=dict)
    tokens: dict[str, dict[int, Tokens]] = field(default_factory=dict)


def even(world: int, experts: int) -> tuple[int, ...]:
    """Spread experts over ranks, the same number to each or one more to the first."""
    return tuple(rank for rank, each in enumerate(np.array_split(range(experts), world)) for _ in each)


def play(program: Program, rank: int, ep: Any, group: Any = None) -> list[Any]:
    """Do a rank's part of a program; return what came of each step, packed at the very end: results must live on.

    A rank is masked when all have met at a barrier of the group: earlier, ranks might hear of it amid a step.
    """
    state, results, kept = State(program.holders), {}, []
    for number, step in enumerate(program.steps):
        if isinstance(step, Mask):
            group.barrier()
            if step.rank == rank:
                break
        _advance(program, number, state, [rank])
        kept.append(_do(program, number, results, state, rank, ep))
        if isinstance(step, Drop):
            del results[step.key]
            kept = [packed(each) for each in kept]
    return [packed(each) for each in kept]


def _do(program: Program, number: int, results: dict[str, Any], state: State, rank: int, ep: Any) -> Any:
    step = program.steps[number]
    if isinstance(step, Dispatch | Cached):
        results[step.key] = _dispatch(step, results, state, rank, ep)
        return results[step.key]
    if isinstance(step, Combine):
        return _combine(program, number, results[step.key], state, rank, ep)
    if isinstance(step, CombineWeights):
        return _combine_weights(program, step, results[step.key], state, rank, ep)
    if isinstance(step, Place):
        return ep.place(step.holders)
    return ep.mask(step.rank) if isinstance(step, Mask) else None


def expected(program: Program) -> list[list[Any]]:
    """Return what `play` must return on each rank, by the reference."""
    state, results = State(program.holders), {}
    wanted: list[list[Any]] = [[] for _ in range(program.world)]
    for number, step in enumerate(program.steps):
        _advance(program, number, state, range(program.world))
        made: Sequence[Any] = [None] * program.world
        if isinstance(step, Dispatch | Cached):
            made = results[step.key] = reference.dispatch(state.settings[step.key], _given(state, step))
        elif isinstance(step, Combine | CombineWeights):
            made = _reference_combine(program, number, results[step.key], state)
        for rank, each in enumerate(made):
            if rank not in state.lost:
                wanted[rank].append(packed(each))
    return wanted


def differences(program: Program, got: Sequence[Any], wanted: Sequence[Any]) -> list[str]:
    """Say where what one rank has got is not what it must be, to the bit; where numbers are made, NaN is NaN."""
    found = [] if len(got) == len(wanted) else [f"{len(got)} steps instead of {len(wanted)}"]
    for step, mine, theirs in zip(program.steps, got, wanted, strict=False):
        if isinstance(step, Dispatch | Cached):
            layout = step.layout if isinstance(step, Dispatch) else _layout_of(program, step)
            found += [f"{step}: {name}" for name in theirs if not _same_field(name, layout, mine, theirs)]
        elif isinstance(step, Combine | CombineWeights):
            pairs = zip(mine, theirs, strict=True)
            found += [f"{step}: part {part}" for part, (one, two) in enumerate(pairs) if not same_numbers(one, two)]
    return found


def check(program: Program, played: Sequence[Sequence[Any]]) -> None:
    """Fail unless every rank has got what it must get."""
    wanted = expected(program)
    found = {rank: differences(program, got, wanted[rank]) for rank, got in enumerate(played)}
    wrong = {rank: each for rank, each in found.items() if each}
    assert not wrong, f"{program}\ndiffers: {wrong}"


def tokens_of(program: Program, number: int, counts: Sequence[int], rank: int) -> Tokens:
    """Draw what a rank gives to the dispatch that is a program's step of this number."""
    step = program.steps[number]
    rng = _rng(program, number, rank)
    x, scales = draw_rows(rng, counts[rank], program.hidden, program.dtype, step.x_kind)
    pool = list(range(len(program.holders))) if step.only is None else list(step.only)
    ids = draw_ids(rng, (counts[rank], program.topk), [] if rank in step.silent else pool, step.has_duplicates)
    ids[rng.random(ids.shape) < step.missing] = -1
    weights = torch.from_numpy(rng.random(ids.shape, dtype=np.float32)) if step.is_weighted else None
    return Tokens(x, torch.from_numpy(ids).to(step.ids_dtype), weights, scales)


def _rng(program: Program, *what: Any) -> np.random.Generator:
    return np.random.default_rng([program.seed, zlib.crc32(repr(what).encode())])


def _advance(program: Program, number: int, state: State, ranks: Sequence[int]) -> None:
    """Take note of what a step changes, and draw what these ranks give."""
    step = program.steps[number]
    if isinstance(step, Place):
        state.holders = step.holders
    elif isinstance(step, Mask):
        state.lost |= {step.rank}
    elif isinstance(step, Dispatch):
        state.settings[step.key] = Setting(
            world=program.world, holders=state.holders, max_tokens=program.max_tokens, layout=step.layout,
            alignment=step.alignment, weights_at=step.weights_at, lost=state.lost, grid=program.grid,
        )  # fmt: skip
        state.tokens[step.key] = {rank: tokens_of(program, number, step.counts, rank) for rank in ranks}
    elif isinstance(step, Cached):
        former = state.tokens[step.of]
        state.settings[step.key] = state.settings[step.of]
        state.tokens[step.key] = {rank: _again(program, number, former[rank], rank) for rank in ranks}


def _again(program: Program, number: int, former: Tokens, rank: int) -> Tokens:
    x, scales = draw_rows(
        _rng(program, number, rank), len(former.x), program.hidden, program.dtype, program.steps[number].x_kind
    )
    return Tokens(x, former.topk_idx, former.topk_weights, scales)


def _dispatch(step: Dispatch | Cached, results: dict[str, Any], state: State, rank: int, ep: Any) -> Any:
    given, setting = state.tokens[step.key][rank], state.settings[step.key]
    x = given.x if given.scales is None else (given.x, given.scales)
    options = {"layout": setting.layout, "alignment": setting.alignment, "weights_at": setting.weights_at}
    if isinstance(step, Cached):
        made = ep.dispatch(x, handle=results[step.of].handle, async_=step.is_async, **options)
    else:
        made = ep.dispatch(x, given.topk_idx, given.topk_weights, async_=step.is_async, **options)
    return made.wait() if step.is_async else made


def _combine(program: Program, number: int, result: Any, state: State, rank: int, ep: Any) -> tuple[torch.Tensor, ...]:
    step = program.steps[number]
    y = reference.run_experts(state.settings[step.key], rank, result, program.expert, program.y_dtype)
    given = state.tokens[step.key][rank]
    biases, out = _biases(program, number, rank, given.x.shape), _out(program, step, given.x.shape)
    bias = None if not biases else biases[0] if len(biases) == 1 else tuple(biases)
    if step.is_strided:
        y = torch.stack([y, y + 1], -1)[..., 0]
    made = ep.combine(y, result.handle, bias=bias, out=out, async_=step.is_async)
    made = made.wait() if step.is_async else made
    assert out is None or made.data_ptr() == out.data_ptr(), "combine has not used out="
    return (made,)


def _combine_weights(program: Program, step: CombineWeights, result: Any, state: State, rank: int, ep: Any) -> Any:
    y = reference.run_experts(state.settings[step.key], rank, result, program.expert, program.y_dtype)
    return tuple(ep.combine_weights(y, _returned(result.topk_idx), result.handle))


def _reference_combine(
    program: Program, number: int, arrived: Sequence[Any], state: State
) -> list[tuple[torch.Tensor, ...]]:
    step = program.steps[number]
    setting, tokens = state.settings[step.key], _given(state, step)
    ys = [
        reference.run_experts(setting, rank, each, program.expert, program.y_dtype) for rank, each in enumerate(arrived)
    ]
    if isinstance(step, CombineWeights):
        returned = [_returned(each.topk_idx) for each in arrived]
        sums = reference.combine_weights(setting, tokens, returned)
        return list(zip(reference.combine(setting, tokens, ys), sums, strict=True))
    biases = [_biases(program, number, rank, each.x.shape) for rank, each in enumerate(tokens)]
    dtype = torch.float32 if step.out == "float32" else None
    return [(each,) for each in reference.combine(setting, tokens, ys, biases=biases, dtype=dtype)]


def _given(state: State, step: Any) -> list[Tokens]:
    return list(state.tokens[step.key].values())


def _returned(ids: torch.Tensor) -> torch.Tensor:
    """Weights that a holder returns: some number for each of its pairs, by row that came."""
    if ids.dim() > 2:
        ids = ids[(ids >= 0).any(-1)]
    rows = torch.arange(1, len(ids) + 1, dtype=torch.float32)[:, None]
    return torch.where(ids >= 0, rows + torch.arange(ids.shape[1]) / 32, 0.0)


def _biases(program: Program, number: int, rank: int, shape: Sequence[int]) -> list[torch.Tensor]:
    rng = _rng(program, "bias", number, rank)
    wide = [rng.standard_normal(tuple(shape)) for _ in range(program.steps[number].biases)]
    return [torch.from_numpy(each).to(program.y_dtype) for each in wide]


def _out(program: Program, step: Combine, shape: Sequence[int]) -> torch.Tensor | None:
    dtype = {"": None, "given": program.y_dtype, "float32": torch.float32}[step.out]
    if dtype is None:
        return None
    width = shape[1] * (2 if step.is_strided else 1)
    return torch.full((shape[0], width), float("nan"), dtype=dtype)[:, : shape[1]]


def _layout_of(program: Program, step: Cached) -> str:
    former = next(each for each in program.steps if getattr(each, "key", None) == step.of)
    return former.layout if isinstance(former, Dispatch) else _layout_of(program, former)


def _same_field(name: str, layout: str, mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether a field of a dispatch's result is as it must be; in slots, where there are rows."""
    one, two = mine[name], theirs[name]
    if layout != "slots" or two is None or one is None or name not in ("x", "scales", "topk_weights"):
        return bool(one == two)
    filled = (unpacked(theirs["topk_idx"]) >= 0).any(-1)
    same_form = one[:2] == two[:2]
    return same_form and packed(unpacked(one)[filled]) == packed(unpacked(two)[filled])

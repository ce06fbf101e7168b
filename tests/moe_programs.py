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

from raynixl.moe import reference
from raynixl.moe.reference import Setting, Tokens

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

    def options(self) -> dict[str, Any]:
        """The arguments of `ExpertParallel`."""
        options = {name: getattr(self, name) for name in ("hidden", "topk", "max_tokens", "dtype")}
        more = {} if self.capacity is None else {"capacity": self.capacity}
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
    tokens: dict[str, list[Tokens]] = field(default_factory=dict)


def even(world: int, experts: int) -> tuple[int, ...]:
    """Spread experts over ranks, the same number to each or one more to the first."""
    return tuple(rank for rank, each in enumerate(np.array_split(range(experts), world)) for _ in each)


def play(program: Program, rank: int, ep: Any) -> list[Any]:
    """Do a rank's part of a program; return what came of each step, packed at the very end: results must live on."""
    state, results, kept = State(program.holders), {}, []
    for number, step in enumerate(program.steps):
        if isinstance(step, Mask) and step.rank == rank:
            break
        _advance(program, number, state)
        if isinstance(step, Dispatch | Cached):
            results[step.key] = made = _dispatch(step, results, state, rank, ep)
            kept.append(made)
        elif isinstance(step, Combine):
            kept.append(_combine(program, number, results[step.key], state, rank, ep))
        elif isinstance(step, CombineWeights):
            kept.append(_combine_weights(program, step, results[step.key], state, rank, ep))
        elif isinstance(step, Place):
            kept.append(ep.place(step.holders))
        elif isinstance(step, Mask):
            kept.append(ep.mask(step.rank))
        else:
            del results[step.key]
            kept = [packed(each) for each in kept]
            kept.append(None)
    return [packed(each) for each in kept]


def expected(program: Program) -> list[list[Any]]:
    """Return what `play` must return on each rank, by the reference."""
    state, results = State(program.holders), {}
    wanted: list[list[Any]] = [[] for _ in range(program.world)]
    for number, step in enumerate(program.steps):
        _advance(program, number, state)
        made: Sequence[Any] = [None] * program.world
        if isinstance(step, Dispatch | Cached):
            made = results[step.key] = reference.dispatch(state.settings[step.key], state.tokens[step.key])
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
            found += [f"{step}: part {part}" for part, (one, two) in enumerate(pairs) if not _same_numbers(one, two)]
    return found


def check(program: Program, played: Sequence[Sequence[Any]]) -> None:
    """Fail unless every rank has got what it must get."""
    wanted = expected(program)
    found = {rank: differences(program, got, wanted[rank]) for rank, got in enumerate(played)}
    wrong = {rank: each for rank, each in found.items() if each}
    assert not wrong, f"{program}\ndiffers: {wrong}"


def packed(value: Any) -> Any:
    """Turn results into what travels and can be compared."""
    if isinstance(value, torch.Tensor):
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, tuple):
        return value if value and isinstance(value[0], str) else tuple(packed(each) for each in value)
    if value is None or isinstance(value, dict):
        return value
    names = ("x", "scales", "topk_idx", "topk_weights", "counts", "offsets", "sources", "tokens")
    return {name: packed(getattr(value, name)) for name in names} | {"lost": tuple(getattr(value, "lost", ()))}


def unpacked(value: tuple[str, tuple[int, ...], bytes]) -> torch.Tensor:
    """Turn a packed tensor back."""
    dtype, shape, data = value
    kind = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def tokens_of(program: Program, number: int, counts: Sequence[int], rank: int) -> Tokens:
    """Draw what a rank gives to the dispatch that is a program's step of this number."""
    step = program.steps[number]
    rng = _rng(program, number, rank)
    x, scales = draw_rows(rng, counts[rank], program.hidden, program.dtype, step.x_kind)
    if isinstance(step, Cached):
        return Tokens(x, torch.empty(0), None, scales)
    pool = list(range(len(program.holders))) if step.only is None else list(step.only)
    ids = draw_ids(rng, (counts[rank], program.topk), [] if rank in step.silent else pool, step.has_duplicates)
    ids[rng.random(ids.shape) < step.missing] = -1
    weights = torch.from_numpy(rng.random(ids.shape, dtype=np.float32)) if step.is_weighted else None
    return Tokens(x, torch.from_numpy(ids).to(step.ids_dtype), weights, scales)


def draw_ids(rng: np.random.Generator, shape: tuple[int, int], pool: Sequence[int], has_duplicates: bool) -> np.ndarray:
    """Draw ids from a pool, -1 where it does not suffice."""
    ids = np.full(shape, -1, np.int64)
    if not pool or not ids.size:
        return ids
    if has_duplicates:
        return rng.choice(np.asarray(pool), shape)
    order = np.argsort(rng.random((shape[0], len(pool))), axis=1)[:, : shape[1]]
    ids[:, : order.shape[1]] = np.asarray(pool)[order]
    return ids


def draw_rows(
    rng: np.random.Generator, count: int, hidden: int, dtype: torch.dtype, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw rows, and their scales if they are in float8."""
    if kind == "bits":
        width = hidden * dtype.itemsize
        raw = torch.from_numpy(rng.integers(0, 256, (count, width), dtype=np.uint8))
        x = raw.view(dtype) if count else torch.empty((0, hidden), dtype=dtype)
        scales = torch.from_numpy(rng.random((count, hidden // 128), dtype=np.float32))
        return x, scales if dtype == torch.float8_e4m3fn else None
    wide = torch.from_numpy(rng.standard_normal((count, 2 * hidden)))
    part = wide[:, ::2] if kind == "strided" else wide[:, :hidden].contiguous()
    if dtype == torch.float8_e4m3fn:
        x, scales = reference.quantise(part.to(torch.bfloat16))
        return (x.t().contiguous().t(), scales.t().contiguous().t()) if kind == "strided" else (x, scales)
    converted = (wide * 40).clamp(-128, 127).to(dtype) if dtype == torch.int8 else wide.to(dtype)
    return (converted[:, ::2] if kind == "strided" else converted[:, :hidden].contiguous()), None


def _rng(program: Program, *what: Any) -> np.random.Generator:
    return np.random.default_rng([program.seed, zlib.crc32(repr(what).encode())])


def _advance(program: Program, number: int, state: State) -> None:
    """Take note of what a step changes, and draw its inputs."""
    step = program.steps[number]
    if isinstance(step, Place):
        state.holders = step.holders
    elif isinstance(step, Mask):
        state.lost |= {step.rank}
    elif isinstance(step, Dispatch):
        state.settings[step.key] = Setting(
            world=program.world, holders=state.holders, max_tokens=program.max_tokens, layout=step.layout,
            alignment=step.alignment, weights_at=step.weights_at, lost=state.lost,
        )  # fmt: skip
        state.tokens[step.key] = [tokens_of(program, number, step.counts, rank) for rank in range(program.world)]
    elif isinstance(step, Cached):
        former = state.tokens[step.of]
        counts = [len(each.x) for each in former]
        fresh = [tokens_of(program, number, counts, rank) for rank in range(program.world)]
        state.settings[step.key] = state.settings[step.of]
        state.tokens[step.key] = [
            Tokens(new.x, old.topk_idx, old.topk_weights, new.scales) for new, old in zip(fresh, former, strict=True)
        ]


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
    setting, tokens = state.settings[step.key], state.tokens[step.key]
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


def _returned(ids: torch.Tensor) -> torch.Tensor:
    """Weights that a holder returns: some number for each of its pairs."""
    rows = torch.arange(1, len(ids) + 1, dtype=torch.float32)[:, None]
    return torch.where(ids >= 0, rows + torch.arange(ids.shape[1]) / 32, 0.0)


def _biases(program: Program, number: int, rank: int, shape: Sequence[int]) -> list[torch.Tensor]:
    rng = _rng(program, "bias", number, rank)
    wide = [rng.standard_normal(tuple(shape)) for _ in range(program.steps[number].biases)]
    return [torch.from_numpy(each).to(program.y_dtype) for each in wide]


def _out(program: Program, step: Combine, shape: Sequence[int]) -> torch.Tensor | None:
    dtype = {"": None, "given": program.y_dtype, "float32": torch.float32}[step.out]
    return None if dtype is None else torch.full(tuple(shape), float("nan"), dtype=dtype)


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


def _same_numbers(mine: tuple[str, tuple[int, ...], bytes], theirs: tuple[str, tuple[int, ...], bytes]) -> bool:
    if mine == theirs:
        return True
    if mine[:2] != theirs[:2]:
        return False
    one, two = unpacked(mine), unpacked(theirs)
    both = torch.isnan(one) & torch.isnan(two)
    zero = torch.zeros((), dtype=one.dtype)
    return packed(torch.where(both, zero, one)) == packed(torch.where(both, zero, two))

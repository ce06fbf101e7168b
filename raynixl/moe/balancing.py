"""Balance: which experts get replicas, and where, so that ranks have equal work; and which replica a token goes to."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError, RangeError
from raynixl.moe.placement import MAX_EXPERTS, NOBODY, Ints, Placement, even_sizes

if TYPE_CHECKING:
    import torch

_Id = TypeVar("_Id", np.int32, np.int64)


def balance(loads: Sequence[float] | NDArray[Any], ranks: int, physical: int) -> tuple[Placement, Ints]:
    """Return a placement of replicas of the experts on ranks, and of which expert each physical one is a replica.

    The idea is that of DeepSeek's expert-parallel load balancer: again and again the expert whose replicas have most
    to do each gets one more; then each replica, the heaviest first, goes to the rank with least to do that has room.
    Unlike there, replicas of one expert go to different ranks where that can be, and ranks need not divide `physical`.
    Physical ids are contiguous by rank. The same loads give the same placement everywhere.

    Raises:
        ConfigError: loads that are no numbers of 0 or more, fewer physical experts than loads, or no ranks.
    """
    numbers = _checked_loads(loads)
    if ranks < 1 or not len(numbers) <= physical <= MAX_EXPERTS:
        raise ConfigError(
            f"{physical} physical experts on {ranks} ranks for {len(numbers)} experts",
            hint="give each expert one physical one at least, and a rank",
        )
    counts = _replicate(numbers, physical, ranks)
    by_rank = _pack(numbers / counts, counts, even_sizes(physical, ranks).tolist())
    logical = np.array([expert for experts in by_rank for expert in sorted(experts)], np.int32)
    return Placement(np.repeat(np.arange(ranks), [len(experts) for experts in by_rank])), logical


def _checked_loads(loads: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(loads, np.float64)
    except (TypeError, ValueError) as exc:
        raise ConfigError("loads are not numbers", hint="give loads[expert], such as its tokens") from exc
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all() or numbers.min() < 0:
        raise ConfigError(
            f"loads of shape {list(numbers.shape)} are not numbers of 0 or more",
            hint="give loads[expert], such as its tokens, for one layer",
        )
    return numbers


def _replicate(loads: NDArray[np.float64], physical: int, ranks: int) -> NDArray[np.int64]:
    """Return how many replicas each expert has. More than there are ranks only where they would be left over."""

    def key(expert: int, count: int) -> tuple[bool, float, int, int]:
        return count >= ranks, -loads[expert] / count, count, expert

    hottest = [key(expert, 1) for expert in range(len(loads))]
    heapq.heapify(hottest)
    for _ in range(physical - len(loads)):
        _, _, count, expert = hottest[0]
        heapq.heapreplace(hottest, key(expert, count + 1))
    counts = np.zeros(len(loads), np.int64)
    for _, _, count, expert in hottest:
        counts[expert] = count
    return counts


def _pack(loads: NDArray[np.float64], counts: NDArray[np.int64], room: Sequence[int]) -> list[list[int]]:
    """Return the experts of each rank; `loads` are those of one replica of each."""
    by_rank: list[list[int]] = [[] for _ in room]
    idlest = [(0.0, 0, rank) for rank, places in enumerate(room) if places]
    for expert in np.argsort(-loads, kind="stable").tolist():
        for _ in range(int(counts[expert])):
            passed = []
            while idlest and expert in by_rank[idlest[0][2]]:
                passed.append(heapq.heappop(idlest))
            total, held, rank = heapq.heappop(idlest) if idlest else passed.pop(0)
            by_rank[rank].append(expert)
            for one in passed:
                heapq.heappush(idlest, one)
            if held + 1 < room[rank]:
                heapq.heappush(idlest, (total + float(loads[expert]), held + 1, rank))
    return by_rank


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """Which physical experts stand for each expert. With a placement, only those that a rank holds, while there are.

    Raises:
        ConfigError: an expert has no replica, or the placement has another number of physical experts.
    """

    given: InitVar[Sequence[int] | Ints]
    placement: InitVar[Placement | None] = None
    logical: Ints = field(init=False)
    """Of which expert each physical one is a replica."""
    counts: Ints = field(init=False)
    """How many replicas of each expert are chosen from."""
    _starts: Ints = field(init=False)
    _physical: Ints = field(init=False)

    def __post_init__(self, given: Sequence[int] | Ints, placement: Placement | None) -> None:
        logical = _checked_logical(given)
        usable = np.ones(len(logical), np.bool_)
        if placement is not None:
            placement.check(experts=len(logical), ranks=MAX_EXPERTS)
            usable = placement.holders != NOBODY
            is_held = np.bincount(logical[usable], minlength=int(logical.max()) + 1) > 0
            usable = usable | ~is_held[logical]
        physical = np.flatnonzero(usable).astype(np.int32)
        physical = physical[np.argsort(logical[physical], kind="stable")]
        counts = np.bincount(logical[physical]).astype(np.int32)  # of 32 bits: choosing is twice as fast as with 64
        object.__setattr__(self, "logical", logical)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "_starts", np.cumsum(counts, dtype=np.int32) - counts)
        object.__setattr__(self, "_physical", physical)

    @overload
    def choose(self, topk_idx: NDArray[_Id], *, first: int = 0) -> NDArray[_Id]: ...
    @overload
    def choose(self, topk_idx: torch.Tensor, *, first: int = 0) -> torch.Tensor: ...
    def choose(self, topk_idx: Any, *, first: int = 0) -> Any:
        """Return the physical ids for ids of experts [tokens, topk]; -1 stays.

        Token t goes to replica (t + first) modulo their number, so the same ids choose alike everywhere. Ranks that
        give different `first`, such as their own number, do not all begin with the same replica.

        Raises:
            RangeError: an id of no expert.
        """
        if not isinstance(topk_idx, np.ndarray):
            import torch

            return torch.from_numpy(self.choose(topk_idx.detach().numpy(), first=first))
        if topk_idx.size and not (topk_idx.min() >= -1 and topk_idx.max() < len(self.counts)):
            raise RangeError(
                f"ids of experts from {topk_idx.min()} to {topk_idx.max()}",
                hint=f"they are 0 to {len(self.counts) - 1}, or -1 for none",
            )
        turn = np.arange(first, first + len(topk_idx), dtype=np.int32).reshape(-1, *[1] * (topk_idx.ndim - 1))
        at = turn % self.counts.take(topk_idx, mode="wrap")  # -1 wraps to what is not used
        at += self._starts.take(topk_idx, mode="wrap")
        return np.where(topk_idx >= 0, self._physical.take(at), -1).astype(topk_idx.dtype, copy=False)


def _checked_logical(given: Sequence[int] | Ints) -> Ints:
    logical = np.asarray(given)
    if logical.ndim != 1 or logical.dtype.kind not in "iu" or not 0 < len(logical) <= MAX_EXPERTS:
        raise ConfigError("replicas are not a list of experts", hint="give logical[physical expert] = expert")
    if logical.min() < 0 or logical.max() >= len(logical) or not np.bincount(logical).all():
        missing = sorted(set(range(len(logical))) - set(logical.tolist()))[:1]
        raise ConfigError(f"expert {missing[0] if missing else logical.min()} has no replica", hint="give each one")
    out = logical.astype(np.int32)
    out.flags.writeable = False
    return out

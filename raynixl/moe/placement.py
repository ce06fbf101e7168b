"""Placement: which rank holds each physical expert."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from raynixl.errors import ConfigError

Ints = NDArray[np.int32]
NOBODY: Final = -1
"""Holds the experts of ranks that are gone."""

MAX_EXPERTS: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Placement:
    """Which rank holds each physical expert, -1 for nobody; a value: equal placements are the same everywhere.

    The experts of a rank are numbered by ascending physical id: `local`, -1 for an expert that nobody holds.

    Raises:
        ConfigError: not whole numbers of -1 or more, one for each expert.
    """

    given: InitVar[Sequence[int] | NDArray[Any]]
    holders: Ints = field(init=False)
    local: Ints = field(init=False)
    digest: int = field(init=False)
    """A number of 32 bits that equal placements have alike, in every process."""
    _by_rank: dict[int, tuple[int, ...]] = field(init=False)

    def __post_init__(self, given: Sequence[int] | NDArray[Any]) -> None:
        holders = _checked(given)
        local, by_rank = _number(holders)
        object.__setattr__(self, "holders", holders)
        object.__setattr__(self, "local", local)
        object.__setattr__(self, "digest", zlib.crc32(holders.astype("<i4").tobytes()))
        object.__setattr__(self, "_by_rank", by_rank)

    @staticmethod
    def even(experts: int, ranks: int) -> Placement:
        """Return contiguous blocks of experts; where ranks do not divide them, the first ranks have one more.

        Raises:
            ConfigError: no experts, or no ranks.
        """
        if experts < 1 or ranks < 1:
            raise ConfigError(f"{experts} experts on {ranks} ranks", hint="there is one of each at least")
        return Placement(np.repeat(np.arange(ranks), even_sizes(experts, ranks)))

    @property
    def experts(self) -> int:
        """How many physical experts there are."""
        return len(self.holders)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the physical experts of a rank, in the order of their local ids."""
        return self._by_rank.get(rank, ())

    def without(self, ranks: Iterable[int]) -> Placement:
        """Return the placement in which nobody holds what these ranks have. Other experts keep their local ids."""
        gone = np.isin(self.holders, np.fromiter(ranks, np.int32))
        return Placement(np.where(gone, NOBODY, self.holders))

    def check(self, *, experts: int, ranks: int) -> None:
        """Refuse a placement of another number of experts, or on ranks that are not there.

        Raises:
            ConfigError: as said.
        """
        if self.experts != experts:
            raise ConfigError(
                f"a placement of {self.experts} experts where there are {experts}", hint="name a rank for each expert"
            )
        if self.holders.max() >= ranks:
            raise ConfigError(
                f"expert {int(self.holders.argmax())} is placed on rank {int(self.holders.max())} of {ranks}",
                hint=f"ranks are 0 to {ranks - 1}",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and np.array_equal(self.holders, other.holders)

    def __hash__(self) -> int:
        return self.digest

    def __repr__(self) -> str:
        sizes = {rank: len(experts) for rank, experts in sorted(self._by_rank.items())}
        return f"Placement({self.experts} experts, by rank {sizes})"

    def __reduce__(self) -> tuple[object, ...]:
        return (Placement, (self.holders,))


def even_sizes(count: int, shares: int) -> NDArray[np.int64]:
    """Return the sizes of shares that differ by one at most, the larger ones first."""
    return count // shares + (np.arange(shares) < count % shares)


def _checked(holders: Sequence[int] | NDArray[Any]) -> Ints:
    try:
        given = np.asarray(holders)
    except ValueError as exc:  # rows of different lengths
        raise ConfigError("a placement is not a list of ranks", hint="give placement[expert] = rank") from exc
    if given.ndim != 1 or given.dtype.kind not in "iu" or not 0 < len(given) <= MAX_EXPERTS:
        raise ConfigError(
            f"a placement is {given.dtype} of shape {list(given.shape)}",
            hint=f"give the rank, a whole number, of each of 1 to {MAX_EXPERTS} experts",
        )
    if given.min() < NOBODY or given.max() >= 1 << 20:
        raise ConfigError(
            f"a placement names the ranks {given.min()} to {given.max()}", hint="ranks count from 0, -1 is nobody"
        )
    out = given.astype(np.int32)
    out.flags.writeable = False
    return out


def _number(holders: Ints) -> tuple[Ints, dict[int, tuple[int, ...]]]:
    order = np.argsort(holders, kind="stable")
    ranks, starts = np.unique(holders[order], return_index=True)
    local = np.full(len(holders), -1, np.int32)
    by_rank: dict[int, tuple[int, ...]] = {}
    for rank, experts in zip(ranks.tolist(), np.split(order, starts[1:]), strict=True):
        if rank != NOBODY:
            local[experts] = np.arange(len(experts))
            by_rank[rank] = tuple(experts.tolist())
    local.flags.writeable = False
    return local, by_rank

"""Staging: what each of the two stages of a dispatch and of its combine is given, made of what the caller gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.calls import MOST_ALIGNED, number_of
from raynixl.moe.checks import CombineArguments, DispatchArguments, check_stats, combine_call, options
from raynixl.moe.cuda_staged import fetched, host_out
from raynixl.moe.local import expert_places
from raynixl.moe.slots import in_slots, pairs_of, places_of
from raynixl.moe.staged_result import Made, TwoLevelDispatched, TwoLevelHandle

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.cuda_device import Gpu
    from raynixl.moe.parallel import ExpertParallel
    from raynixl.moe.placement import Placement
    from raynixl.moe.result import Dispatched, Handle


LEAST: Final = 0.01
"""Seconds that a stage has at the very least: where earlier ones have left none, the others are late as well."""


@dataclass(slots=True)
class Shares:
    """The time of an operation, of which each stage has an equal share, and what earlier ones have left."""

    seconds: float
    order: tuple[int, ...]
    """Of each column that this rank takes part in: how many columns some member of it takes part in before."""
    count: int
    _began: float = field(init=False, default_factory=time.monotonic)

    def left(self, stage: int) -> float:
        """Return how long a stage may take from now on; the first is 0."""
        return max(LEAST, self._began + self.seconds * (stage + 1) / self.count - time.monotonic())


@dataclass(frozen=True, slots=True, eq=False)
class Sending:
    """One dispatch as the caller wants it."""

    x: Any
    topk_idx: Any
    topk_weights: Any
    extra: tuple[Any, ...]
    handle: Any
    layout: str | None
    alignment: Any
    weights_at: str | None
    stats: Any = None
    waited: Any = None
    error: RaynixlError | None = None
    """What was found wrong before."""

    def fetched(self, gpu: Gpu) -> Sending:
        """Return the same in memory of the host."""
        names = ("x", "topk_idx", "topk_weights", "extra", "stats", "waited")
        found = fetched({name: getattr(self, name) for name in names}, gpu)
        return replace(self, **found.given, error=found.error)

    def check(self, placement: Placement, rank: int, world: int) -> None:
        """Refuse what cannot be taken apart for two stages, and what only the last one would find.

        Raises:
            ConfigError: x is no tensor, the handle is another's or of another placement, there is no such layout, or
                what results are added to does not fit.
        """
        if self.error is not None:
            raise self.error
        rows = self.x[0] if isinstance(self.x, tuple) and self.x else self.x
        if not isinstance(rows, torch.Tensor) or rows.dim() < 1:
            raise ConfigError("x is no tensor with a row for each token", hint="give x as [tokens, hidden]")
        if self.handle is not None and not isinstance(self.handle, TwoLevelHandle):
            raise ConfigError(f"{type(self.handle).__name__} is no handle", hint="give r.handle of an earlier dispatch")
        if self.handle is not None and self.handle.placement != placement.digest:
            raise ConfigError("the handle is of another placement", hint="dispatch with ids: experts have moved since")
        self.options()
        if self.stats is not None:
            check_stats(self.stats, len(placement.experts_of(rank)), of_counts=True)
        check_waits(self.waited, "waited", world)

    def across(self, number: int, rank: int) -> dict[str, Any]:
        """Return what is dispatched in one column: all tokens in our own, none where we stand in for another."""
        rows = self.x[0] if isinstance(self.x, tuple) else self.x
        extra = self.extra
        if self.handle is None:
            origin = torch.empty((len(rows), 2), dtype=torch.int32)
            origin[:, 0], origin[:, 1] = rank, torch.arange(len(rows), dtype=torch.int32)
            extra = (*extra, origin)
        given: dict[str, Any] = {
            "x": self.x, "topk_idx": self.topk_idx, "topk_weights": self.topk_weights, "extra": extra,
        }  # fmt: skip
        if number:
            given = {name: _none_of(value) for name, value in given.items()}
        handle = None if self.handle is None else self.handle.across[number]
        layout, alignment, weights_at = self.options()
        signed = number_of(("inside", layout, alignment)) % MOST_ALIGNED + 1  # all ranks hear where these differ
        return {**given, "handle": handle, "layout": "tokens", "alignment": signed, "weights_at": weights_at}

    def inside(self, came: Sequence[Dispatched], physical: Tensor) -> dict[str, Any]:
        """Return what is sent on: the rows of all columns; `physical` has the expert of each local id of the group."""
        x: Any = _joined([one.x for one in came])
        scales = [one.scales for one in came if one.scales is not None]
        weights = [one.topk_weights for one in came if one.topk_weights is not None]
        is_cached = self.handle is not None
        return {
            "x": (x, _joined(scales)) if scales else x,
            "topk_idx": None if is_cached else _named(_joined([one.topk_idx for one in came]), physical),
            "topk_weights": _joined(weights) if weights and not (is_cached and self.topk_weights is None) else None,
            "extra": tuple(_joined(parts) for parts in zip(*(one.extra for one in came), strict=True)),
            "handle": self.handle.inside if is_cached else None,
            "layout": "tokens" if self.way[0] == "slots" else self.way[0], "alignment": self.alignment,
            "weights_at": self.way[1],
        }  # fmt: skip

    def result(self, r: Dispatched, across: tuple[Handle, ...], made: Made) -> TwoLevelDispatched:
        """Return what the last stage has brought as the caller wants it."""
        sources, tokens = self.origins(r)
        slots, places = made.slots, None
        if self.way[0] == "slots":
            places = places_of(sources, slots[1])
        ids = self.topk_idx.clone() if self.handle is None else self.handle.ids
        handle = TwoLevelHandle(across, r.handle, made, ids, sources, tokens, places)
        extra = r.extra if self.handle is not None else r.extra[:-1]
        if places is None:
            return TwoLevelDispatched.of(r, origins=sources, tokens=tokens, extra=extra, handle=handle)
        order = places.argsort()
        return TwoLevelDispatched.of(
            r, origins=sources[order], tokens=tokens[order], handle=handle,
            x=in_slots(r.x, places, slots), scales=in_slots(r.scales, places, slots),
            topk_idx=in_slots(r.topk_idx, places, slots, -1), topk_weights=in_slots(r.topk_weights, places, slots),
            extra=tuple(in_slots(one, places, slots) for one in extra),
        )  # fmt: skip

    def origins(self, r: Dispatched) -> tuple[Tensor, Tensor]:
        """Return the source and the token of each row that came in the end."""
        if self.handle is not None:
            return self.handle.sources, self.handle.tokens
        origin = r.extra[-1]
        if r.offsets is not None:  # it lies by expert, as x does: take that of each row's first pair
            pairs = (r.topk_idx >= 0).sum(1)
            origin = origin[expert_places(r.topk_idx, r.offsets)[pairs.cumsum(0) - pairs]]
        return origin[:, 0].clone(), origin[:, 1].clone()

    def options(self) -> tuple[str, int, str]:
        """Return layout, alignment and the place of the weights.

        Raises:
            ConfigError: there is no such thing.
        """
        return options(
            DispatchArguments(
                handle=self.handle, layout=self.layout, alignment=self.alignment, weights_at=self.weights_at
            )
        )

    @property
    def way(self) -> tuple[str | None, str | None]:
        """Layout and place of the weights: those of the handle unless told otherwise."""
        handle = self.handle
        if handle is None:
            return self.layout, self.weights_at
        layout = handle.layout if self.layout is None else self.layout
        return layout, handle.weights_at if self.weights_at is None else self.weights_at


@dataclass(frozen=True, slots=True, eq=False)
class Returning:
    """One combine as the caller wants it."""

    y: Any
    weights: Any
    handle: Any
    bias: Any
    out: Any
    summed: bool
    stats: Any
    error: RaynixlError | None = None
    """What was found wrong before."""

    def fetched(self, gpu: Gpu) -> Returning:
        """Return the same in memory of the host; sums go into memory there."""
        found = fetched({name: getattr(self, name) for name in ("y", "weights", "bias", "stats")}, gpu)
        out, error = host_out(self.out, gpu)
        return replace(self, **found.given, out=out, error=found.error or error)

    def checked(self, hidden: int, world: int) -> Returning:
        """Refuse what only the last stage would find: by then others have gone on; return the rest as stages take it.

        Raises:
            ConfigError: the handle is another's, or y, bias, out or stats do not fit.
        """
        if self.error is not None:
            raise self.error
        if not isinstance(self.handle, TwoLevelHandle):
            raise ConfigError(f"{type(self.handle).__name__} is no handle", hint="give r.handle of the dispatch")
        self._check_ends(hidden)
        check_waits(self.stats, "stats", world)
        return self if self.handle.places is None else self._from_slots(hidden)

    def _from_slots(self, hidden: int) -> Returning:
        """Return what lies in fixed slots in the order in which its rows came through the last stage."""
        y, weights, handle = self.y, self.weights, self.handle
        by_pair = handle.weights_at == "source"
        rows = handle.places.argsort().argsort()  # by row as it came: where it lies among those in order of slots
        if isinstance(y, torch.Tensor):
            ids = torch.from_numpy(handle.inside.row_ids) >= 0
            shape = (int(ids.sum()), hidden) if by_pair else (*handle.slots, hidden)
            if tuple(y.shape) != shape:
                raise ConfigError(f"y has the shape {list(y.shape)}", hint=f"the handle wants {list(shape)}")
            y = y[pairs_of(ids, rows)] if by_pair else y.reshape(-1, hidden)[handle.places]
        if isinstance(weights, torch.Tensor) and len(weights) == len(rows):
            weights = weights[rows]
        return replace(self, y=y, weights=weights)

    def _check_ends(self, hidden: int) -> None:
        if not isinstance(self.y, torch.Tensor):
            return
        y = torch.zeros((1, hidden), dtype=self.y.dtype).expand(self._items()[0], hidden)
        given = CombineArguments(y, self.handle.across[0], None, self.bias, self.out, self.summed)
        _, error = combine_call(given, limit=1, hidden=hidden, renormalises=False)
        if error is not None:
            raise error

    def _items(self) -> list[int]:
        """Return how much goes back through each column: rows, or pairs with the weights at the source."""
        by_row = self.handle.weights_at == "holder"
        return [one.rows if by_row else int((one.row_ids >= 0).sum()) for one in self.handle.across]

    def inside(self, ep: ExpertParallel, seconds: float, waited: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bring back to the forwarders the sums of the group's holders, or all pairs if the source weighs them."""
        summed, handle = self.handle.weights_at == "holder", self.handle.inside
        if not self.summed:
            handle = replace(handle, number=~handle.number)  # which all ranks have in what is signed
        if self.weights is None:
            return ep.combine(self.y, handle, summed=summed, deadline=seconds, stats=waited), None
        sums, weights = ep.combine_weights(self.y, self.weights, handle, summed=summed, deadline=seconds)
        return sums, weights

    def across(
        self, ep: ExpertParallel, number: int, came: tuple[Tensor, Tensor | None], seconds: float, waited: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Bring back to the sources of one column what has come to this forwarder."""
        handles, (sums, weights) = self.handle.across, came
        mine = torch.split(sums, self._items())[number]
        own = {"bias": self.bias, "out": self.out} if number == 0 else {}
        if weights is None:
            return ep.combine(mine, handles[number], summed=self.summed, deadline=seconds, stats=waited, **own), None
        both: tuple[Tensor, Tensor] = ep.combine_weights(
            mine,
            torch.split(weights, [handle.rows for handle in handles])[number],
            handles[number],
            deadline=seconds,
            **own,
        )
        return both


def check_waits(waits: Any, what: str, world: int) -> None:
    """Refuse what seconds cannot be added to, one number for each rank.

    Raises:
        ConfigError: as said.
    """
    if waits is None:
        return
    check_stats(waits, world, of_counts=False, what=what)
    if len(waits) != world:
        raise ConfigError(f"{what} has {len(waits)} items", hint=f"give float64 [{world}]")


def _none_of(value: Any) -> Any:
    """Return the same without any token."""
    if isinstance(value, tuple):
        return tuple(_none_of(one) for one in value)
    return None if value is None else value[:0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts, byte for byte; those of the only part that has any are not copied."""
    filled = [part for part in parts if len(part)]
    if len(filled) < 2:
        return filled[0] if filled else parts[0]
    first = filled[0]
    flat = [part.reshape(len(part), -1).contiguous().view(torch.uint8) for part in filled]
    return torch.cat(flat).view(first.dtype).reshape(-1, *first.shape[1:])


def _named(ids: Tensor, physical: Tensor) -> Tensor:
    """Return the physical experts of local ids, -1 where there is none."""
    return torch.where(ids >= 0, physical.to(ids.dtype)[ids.clamp(min=0).long()], -1) if len(physical) else ids

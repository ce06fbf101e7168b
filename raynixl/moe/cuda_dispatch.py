"""A dispatch on a GPU: its kernels in order, and what the host must know in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from raynixl.errors import ConfigError, IntegrityError, RangeError, RaynixlError
from raynixl.moe.cuda_layer import address, nanoseconds
from raynixl.moe.cuda_nothing import arrive_at, take_nothing
from raynixl.moe.cuda_result import CudaHandle
from raynixl.moe.cuda_structs import Kind, Order, Refusal, Send, Take
from raynixl.moe.result import Dispatched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from raynixl.moe.cuda_calls import CudaDispatchCall, RowPlan
    from raynixl.moe.cuda_layer import Call, GpuLayer

_SLICE: Final = 5e-3
QUEUE_SECONDS: Final = 60.0
"""What is on the stream before a dispatch may take that long beyond the deadline, which counts from when it begins."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a dispatch is made under."""

    topk: int
    max_tokens: int
    world: int
    me: int
    placement: int
    holders: Tensor
    """By expert: its rank, or -1. int32, on the GPU."""
    local: Tensor
    """By expert: its local id. int32, on the GPU."""
    loads_count: int
    """The most experts that one rank has."""
    local_experts: int
    session: int
    names: dict[int, str]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What the host knows of the rows before they are taken."""

    rows: int
    loads: tuple[int, ...] | None = None
    expected: Tensor | None = None
    """By source: how many come if all come, where an earlier dispatch tells."""


@dataclass(slots=True, eq=False)
class CudaDispatch:
    """One dispatch of one rank."""

    layer: GpuLayer
    scene: Scene
    call: CudaDispatchCall
    number: int
    seconds: float
    error: RaynixlError | None
    look: Callable[[], None]
    """Looks who is gone, and has kernels not wait for them."""

    def run(self, mask: int) -> Dispatched | RaynixlError:
        """Put it on the current stream; with layouts whose size the rows decide, wait until that is known.

        Returns what is wrong with a rank's call, of which all ranks hear.
        """
        plan = self.call.plan(self.scene.topk)
        with self.layer.begin(mask) as op:
            if self.error is None and self.needs_host and op.is_captured:
                return ConfigError(
                    f"a dispatch in layout {self.call.layout!r} cannot be captured: its size is not known before",
                    hint="capture layout 'slots', or a dispatch by a handle",
                )
            if self.call.handle is not None:
                self.call.handle.use_on(self.layer.gpu)
            tables = self._send(op, plan)
            if self.error is not None:
                self._skip(op)
                return self.error
            known = self._arrive(op) if self.needs_host else self._known()
            if isinstance(known, RaynixlError):
                self._skip(op)
                return known
            return self._take(op, plan, known, tables)

    @property
    def needs_host(self) -> bool:
        """Whether the host must hear how many rows come before there is memory for them."""
        return self.call.layout != "slots" and (self.call.handle is None or self.call.handle.loads is None)

    @property
    def signature(self) -> int:
        """Return what must be alike on all ranks; 0 for who takes part with nothing."""
        return 0 if self.error is not None else self.call.signature(self.scene.placement)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.layer.gpu.empty(shape, dtype)

    # The kernels

    def _send(self, op: Call, plan: RowPlan) -> tuple[Tensor, Tensor, Tensor]:
        call, scene, ranks = self.call, self.scene, self.layer.ranks
        weights = call.weights if call.sends_weights else None
        tables = (self._empty(call.tokens, ranks), self._empty(call.tokens, scene.topk), self._empty(ranks))
        made = Send(
            layer=self.layer.address, ids=address(call.ids), weights=address(weights),
            holders=address(scene.holders), local=address(scene.local), row_of=address(tables[0]),
            holder_of=address(tables[1]), sent=address(tables[2]), signature=self.signature,
            columns_count=len(call.columns), row_nbytes=plan.nbytes, ids_at=plan.ids_at, weights_at=plan.weights_at,
            token_at=plan.token_at, ids_nbytes=4 if call.ids is None else call.ids.element_size(), tokens=call.tokens,
            topk=scene.topk, experts=len(scene.holders), loads_count=scene.loads_count, ranks=ranks,
            status=refusal_of(self.error),
        )  # fmt: skip
        for column, one, at in zip(made.columns, call.columns, plan.columns_at, strict=False):
            column.address, column.stride, column.nbytes, column.at = one.address, one.stride, one.nbytes, at
        op.launch("send", made, self.layer.grid("send", rows=call.tokens, nbytes=plan.nbytes))
        return tables

    def _arrive(self, op: Call) -> Known | RaynixlError:
        """Wait, on the host, until a kernel has told how many rows come."""
        layer = self.layer
        deadline, loads_count = nanoseconds(self.seconds), self.scene.loads_count
        made = arrive_at(layer, Kind.DISPATCH, deadline, signature=self.signature, loads_count=loads_count)
        op.launch("arrive", made, (1, 1, 1))
        layer.wait_ticket(self.seconds + QUEUE_SECONDS, self.look)
        for rank, status in enumerate(layer.statuses()):
            if status != Refusal.FINE:
                return refused(rank, status, self.scene.names)
        page = layer.told
        rows, experts = sum(page.counts[: layer.ranks]), tuple(page.experts[: self.scene.local_experts])
        return Known(rows, experts)

    def _known(self) -> Known:
        handle = self.call.handle
        if self.call.layout == "slots":
            return Known(self.scene.world * self.scene.max_tokens)
        assert handle is not None
        return Known(handle.rows, handle.loads, handle.for_ranks(self.layer.ranks).counts)

    def _skip(self, op: Call) -> None:
        """End the operation with nothing taken."""
        made = take_nothing(self.layer, self.scene.topk, nanoseconds(self.seconds))
        op.launch("take", made, self.layer.grid("take", rows=0, nbytes=0))

    def _take(self, op: Call, plan: RowPlan, known: Known, tables: tuple[Tensor, Tensor, Tensor]) -> Dispatched:
        call, scene, layer = self.call, self.scene, self.layer
        is_major, rows = call.layout == "experts", known.rows
        padded = sum(-(-load // call.alignment) * call.alignment for load in known.loads or ()) if is_major else rows
        outs = [self._empty(padded, *one.tensor.shape[1:], dtype=one.tensor.dtype) for one in call.columns]
        assert call.ids is not None
        ids, row_ids = self._empty(rows, scene.topk, dtype=call.ids.dtype), self._empty(rows, scene.topk)
        weights = self._empty(rows, scene.topk, dtype=torch.float32) if call.sends_weights else None
        tokens, counts = self._empty(rows), self._empty(layer.ranks)
        experts = self._empty(scene.loads_count, dtype=torch.int64)
        positions, offsets, place_weights = None, None, None
        if is_major:
            positions, offsets = self._empty(rows, scene.topk), self._empty(scene.local_experts + 1, dtype=torch.int64)
            if weights is not None:
                place_weights = self._empty(padded, dtype=torch.float32)
            self._order(op, plan, outs, known, (positions, offsets, place_weights))
        waits = not self.needs_host
        if waits and layer.waits_apart(scene.max_tokens * plan.nbytes * layer.ranks):
            deadline, waits = nanoseconds(self.seconds), False
            first = arrive_at(layer, Kind.DISPATCH, deadline, signature=self.signature, loads_count=scene.loads_count)
            op.launch("arrive", first, (1, 1, 1))
        made = Take(
            layer=layer.address, ids=address(ids), row_ids=address(row_ids), weights=0, row_weights=address(weights),
            tokens=address(tokens), counts=address(counts),
            experts=address(experts), expected=address(known.expected), positions=address(positions),
            place_weights=address(place_weights), signature=self.signature, deadline=nanoseconds(self.seconds),
            columns_count=len(outs), row_nbytes=plan.nbytes, ids_at=plan.ids_at, weights_at=plan.weights_at,
            token_at=plan.token_at, ids_nbytes=ids.element_size(), topk=scene.topk, ranks=layer.ranks,
            loads_count=scene.loads_count, is_packed=call.layout != "slots", waits=waits, waited=address(call.waited),
            waited_count=0 if call.waited is None else len(call.waited),
        )  # fmt: skip
        _fill(made.columns, outs, call, plan)
        op.launch("take", made, layer.grid("take", rows=scene.max_tokens, nbytes=plan.nbytes, waits=waits))
        handle = CudaHandle(
            call.kept(), layer.ranks, *tables, counts, row_ids, weights if is_major else None, positions, padded,
            known.loads, scene.placement, self.number, scene.session, scene.world, scene.max_tokens, layer.gpu.stream(),
            call.layout != "slots",
        )  # fmt: skip
        return self._result(handle, outs, ids, place_weights if is_major else weights, (tokens, experts, offsets))

    def _order(
        self, op: Call, plan: RowPlan, outs: Sequence[Tensor], known: Known,
        to: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:  # fmt: skip
        scene, layer, handle = self.scene, self.layer, self.call.handle
        positions, offsets, place_weights = to
        made = Order(
            layer=layer.address, row_ids=0 if known.expected is None else address(handle.row_ids if handle else None),
            expected=address(known.expected), positions=address(positions), offsets=address(offsets),
            place_weights=address(place_weights), columns_count=len(outs), row_nbytes=plan.nbytes, ids_at=plan.ids_at,
            topk=scene.topk, ranks=layer.ranks, local_experts=scene.local_experts, alignment=self.call.alignment,
        )  # fmt: skip
        _fill(made.columns, outs, self.call, plan)
        op.launch("order", made, (max(1, scene.local_experts), 1, 1))

    # What the caller gets

    def _result(
        self, handle: CudaHandle, outs: list[Tensor], ids: Tensor, weights: Tensor | None,
        more: tuple[Tensor, Tensor, Tensor | None],
    ) -> Dispatched:  # fmt: skip
        scene, (tokens, experts, offsets) = self.scene, more
        if self.call.layout == "slots":
            places = (scene.world, scene.max_tokens)
            outs = [one.view(*places, *one.shape[1:]) for one in outs]
            ids, tokens = ids.view(*places, -1), tokens.view(places)
            weights = None if weights is None else weights.view(*places, -1)
        x, *beside = outs
        scales = beside.pop(0) if self.call.has_scales else None
        counts = experts[: scene.local_experts]
        return Dispatched(x, scales, ids, weights, counts, offsets, tokens, tuple(beside), (), cast(Any, handle))


def _fill(columns: Any, outs: Sequence[Tensor], call: CudaDispatchCall, plan: RowPlan) -> None:
    """Say where the columns of a result lie."""
    for column, out, one, at in zip(columns, outs, call.columns, plan.columns_at, strict=False):
        column.address, column.stride, column.nbytes, column.at = address(out), one.nbytes, one.nbytes, at


def refusal_of(error: RaynixlError | None) -> Refusal:
    """Return how a line says what is wrong with its sender's call."""
    if error is None:
        return Refusal.FINE
    return Refusal.RANGE if isinstance(error, RangeError) else Refusal.CONFIG


def refused(rank: int, status: int, names: dict[int, str]) -> RaynixlError:
    """Return the error for a line that was refused."""
    who = f"rank {rank} ({names.get(rank)!r})"
    if status == Refusal.RANGE:
        return RangeError(f"{who}: its ids name no experts, or there are too many tokens", hint="mend that rank's call")
    if status == Refusal.CONFIG:
        return ConfigError(f"{who}: its call cannot be used", hint="see the error that was raised there")
    if status in (Refusal.DIFFERS, Refusal.GROWS):
        return ConfigError(
            f"{who} calls something else{', with longer rows' if status == Refusal.GROWS else ''}",
            hint="call the same operations with the same options, handles, dtypes and placement on every rank",
        )
    return IntegrityError(
        f"{who} tells of rows where none can be", hint="its memory or its version of raynixl is damaged",
        peer=names.get(rank, ""),
    )  # fmt: skip

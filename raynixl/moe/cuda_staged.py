"""Staged: operations on a GPU that go through memory of the host, where kernels do not reach all peers' memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from raynixl.moe.checks import CombineArguments, DispatchArguments
from raynixl.moe.result import Combined, Dispatched, Handle

if TYPE_CHECKING:
    from raynixl.moe.cuda_device import Gpu


@dataclass(frozen=True, slots=True, eq=False)
class StagedHandle:
    """The handle of a dispatch that went through the host: that of the host's own."""

    host: Handle

    @property
    def counts(self) -> Any:
        """By source: how many rows came from there."""
        return self.host.counts

    @property
    def rows(self) -> int:
        """How many rows came."""
        return self.host.rows

    @property
    def lost(self) -> Sequence[int]:
        """Who did not deliver."""
        return self.host.lost

    @property
    def sources(self) -> Tensor:
        """By row: the rank that it came from."""
        return self.host.sources

    def plain(self) -> StagedHandle:
        """Return the same layout without weights."""
        return StagedHandle(self.host.plain())


def fetched_dispatch(given: DispatchArguments, gpu: Gpu) -> DispatchArguments:
    """Return the arguments in memory of the host; what is no tensor is as it is, and refused there."""
    x = tuple(_fetched(one, gpu) for one in given.x) if isinstance(given.x, tuple) else _fetched(given.x, gpu)
    extra = tuple(_fetched(one, gpu) for one in given.extra) if isinstance(given.extra, Sequence) else given.extra
    return replace(
        given, x=x, topk_idx=_fetched(given.topk_idx, gpu), topk_weights=_fetched(given.topk_weights, gpu),
        handle=_host(given.handle), extra=extra, stats=None,
    )  # fmt: skip


def put_dispatched(made: Dispatched, gpu: Gpu) -> Dispatched:
    """Return a result on the GPU; nothing of it lies in registered memory any more."""
    return replace(
        made, x=gpu.bring(made.x), scales=_brought(made.scales, gpu), topk_idx=gpu.bring(made.topk_idx),
        topk_weights=_brought(made.topk_weights, gpu), counts=gpu.bring(made.counts),
        offsets=_brought(made.offsets, gpu), tokens=gpu.bring(made.tokens),
        extra=tuple(gpu.bring(one) for one in made.extra), handle=cast(Any, StagedHandle(made.handle)),
    )  # fmt: skip


def fetched_combine(given: CombineArguments, gpu: Gpu) -> CombineArguments:
    """Return the arguments in memory of the host."""
    bias = given.bias
    if isinstance(bias, Sequence) and not isinstance(bias, Tensor):
        bias = tuple(_fetched(one, gpu) for one in bias)
    out = None
    if isinstance(given.out, Tensor):
        out = torch.empty(given.out.shape, dtype=given.out.dtype)
    return replace(
        given, y=_fetched(given.y, gpu), weights=_fetched(given.weights, gpu), bias=_fetched(bias, gpu), out=out,
        handle=_host(given.handle),
    )  # fmt: skip


def put_combined(made: Combined, given: CombineArguments, gpu: Gpu) -> Combined:
    """Return a result on the GPU, where the caller wants it if he says so."""
    is_given = isinstance(given.out, Tensor) and given.summed
    return Combined(
        given.out.copy_(made.out) if is_given else gpu.bring(made.out), _brought(made.topk_weights, gpu), made.lost
    )


def _fetched(one: Any, gpu: Gpu) -> Any:
    return gpu.fetch(one) if isinstance(one, Tensor) else one


def _brought(one: Tensor | None, gpu: Gpu) -> Tensor | None:
    return None if one is None else gpu.bring(one)


def _host(handle: Any) -> Any:
    return handle.host if isinstance(handle, StagedHandle) else handle

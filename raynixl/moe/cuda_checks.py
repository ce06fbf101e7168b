"""Checks of calls on a GPU: what callers give there; what is wrong is kept, since the other ranks must hear of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.calls import check_ids, check_place, check_tokens, check_weights, columns_of, plain
from raynixl.moe.checks import (
    CombineArguments,
    DispatchArguments,
    Sizes,
    biases_of,
    check_apart,
    check_cached,
    check_out,
    check_session,
    check_stats,
    options,
    rows_of,
    said,
)
from raynixl.moe.cuda_calls import CudaCombineCall, CudaDispatchCall
from raynixl.moe.cuda_result import CudaHandle
from raynixl.moe.cuda_structs import COLUMNS


def cuda_dispatch_call(
    given: DispatchArguments, sizes: Sizes, gpu: int
) -> tuple[CudaDispatchCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call is one of nothing."""
    try:
        return _dispatch_call(given, sizes, gpu), None
    except Exception as exc:  # noqa: BLE001 - the other ranks hear of it, and the caller gets it
        return CudaDispatchCall((), False, 0, None, None, None, "slots", 1, "holder"), said(exc)


def _dispatch_call(given: DispatchArguments, sizes: Sizes, gpu: int) -> CudaDispatchCall:
    handle = given.handle
    if handle is not None and not isinstance(handle, CudaHandle):
        raise ConfigError(
            f"{type(handle).__name__} is no handle of a dispatch on a GPU", hint="give r.handle of an earlier one"
        )
    layout, alignment, weights_at = options(given)
    rows, scales = given.x if isinstance(given.x, tuple) and len(given.x) == 2 else (given.x, None)
    columns = [columns_of(rows, "x", width=sizes.hidden, gpu=gpu)]
    tokens = len(columns[0].tensor)
    check_tokens(tokens, sizes.max_tokens)
    if scales is not None:
        columns.append(columns_of(scales, "scales", tokens, gpu=gpu))
    columns += [columns_of(one, "extra", tokens, gpu=gpu) for one in given.extra]
    if len(columns) > COLUMNS:
        raise ConfigError(f"{len(columns)} tensors travel with a row", hint=f"on a GPU {COLUMNS} do: put some together")
    if given.stats is not None:
        check_stats(given.stats, sizes.local_experts, of_counts=True, gpu=gpu)
    if given.waited is not None:
        _check_waited(given.waited, "waited", sizes.ranks, gpu)
    weights = _weights(given.topk_weights, (tokens, sizes.topk), gpu)
    if weights is not None and weights.data_ptr() == given.topk_weights.data_ptr():
        weights = weights.clone()  # the handle keeps them, and the caller may change his
    has_other_weights = weights is not None
    ids: Tensor | None
    if handle is None:
        ids = _ids(given.topk_idx, (tokens, sizes.topk), gpu)
    else:
        check_place(handle.row_of, "the handle", gpu)
        check_cached(handle, handle.call.tokens, given.topk_idx, tokens, sizes)
        ids = handle.call.ids
        has_other_weights = has_other_weights or (handle.weights_at, weights_at) == ("source", "holder")
        weights = handle.weights if weights is None else weights
    return CudaDispatchCall(
        tuple(columns), scales is not None, tokens, ids, weights, handle, layout, alignment, weights_at,
        has_other_weights, given.waited,
    )  # fmt: skip


def _check_waited(waited: Any, what: str, ranks: int, gpu: int) -> None:
    check_stats(waited, ranks, of_counts=False, gpu=gpu, what=what)
    if waited.dtype != torch.float64 or not waited.is_contiguous():
        raise ConfigError(
            f"{what} is {waited.dtype}{'' if waited.is_contiguous() else ', not contiguous'}",
            hint="seconds are added on a GPU: give a contiguous float64 tensor",
        )  # fmt: skip


def _ids(topk_idx: Any, shape: tuple[int, int], gpu: int) -> Tensor:
    check_ids(topk_idx, *shape)
    check_place(topk_idx, "topk_idx", gpu)
    return cast(Tensor, topk_idx).contiguous()


def _weights(topk_weights: Any, shape: tuple[int, int], gpu: int) -> Tensor | None:
    if topk_weights is None:
        return None
    check_weights(topk_weights, *shape)
    check_place(topk_weights, "topk_weights", gpu)
    return plain(topk_weights).float().contiguous()


def cuda_combine_call(given: CombineArguments, sizes: Sizes, gpu: int) -> tuple[CudaCombineCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call is one of nothing."""
    try:
        return _combine_call(given, sizes, gpu), None
    except Exception as exc:  # noqa: BLE001 - the other ranks hear of it, and the caller gets it
        return CudaCombineCall(None, None, None, (), None, True), said(exc)


def _combine_call(given: CombineArguments, sizes: Sizes, gpu: int) -> CudaCombineCall:
    handle, weights, out, hidden = given.handle, given.weights, given.out, sizes.hidden
    if not isinstance(handle, CudaHandle):
        raise ConfigError(
            f"{type(handle).__name__} is no handle of a dispatch on a GPU", hint="give r.handle of the dispatch"
        )
    check_place(handle.row_of, "the handle", gpu)
    check_session(handle, sizes.session)
    if not given.summed and handle.weights_at != "source":
        raise ConfigError(
            "pairs come back only with the weights at the source", hint="dispatch with weights_at='source'"
        )
    if given.stats is not None:
        _check_waited(given.stats, "stats", sizes.ranks, gpu)
    y = rows_of(given.y, "y", expected_shape(handle), hidden, gpu=gpu)
    shape = (handle.call.tokens, hidden)
    if weights is not None:
        rows = weights.flatten(0, -2) if isinstance(weights, Tensor) and weights.dim() == 3 else weights
        weights = columns_of(rows, "weights", handle.rows, handle.topk, gpu=gpu).tensor.float().contiguous()
    biases = biases_of(given.bias, shape, y.dtype, gpu=gpu)
    if out is not None:
        check_out(out, shape, y.dtype, gpu=gpu)
        check_apart(out, y, biases, weights)
        out = out.detach()
    return CudaCombineCall(y, handle, weights, biases, out, given.summed, given.stats)


def expected_shape(handle: CudaHandle) -> tuple[int | None, ...]:
    """Return the shape of y but for its columns; None where only the GPU knows."""
    if handle.layout == "experts":
        return (handle.padded,)
    if handle.weights_at == "source":
        return (None if handle.loads is None else sum(handle.loads),)
    return (handle.world, handle.max_tokens) if handle.layout == "slots" else (handle.rows,)

"""Checks: what callers give, turned into calls; what is wrong is kept, since the other ranks must hear of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.calls import (
    CODES,
    LAYOUTS,
    WEIGHTS_AT,
    DispatchCall,
    check_choice,
    check_tokens,
    columns_of,
    ids_of,
    weights_of,
)
from raynixl.moe.combining import CombineCall
from raynixl.moe.result import Handle, no_handle

if TYPE_CHECKING:
    from torch import Tensor


def positive(value: Any, what: str) -> int:
    """Check a count.

    Raises:
        ConfigError: no whole number of 1 or more.
    """
    if not hasattr(value, "__index__") or isinstance(value, bool) or int(value) < 1:
        raise ConfigError(f"{what} is {value!r:.40}", hint="give a whole number of 1 or more")
    return int(value)


def dtype_of(dtype: Any) -> torch.dtype:
    """Check a dtype.

    Raises:
        ConfigError: it is none of torch's.
    """
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{dtype!r:.40} is no dtype", hint="give one of torch's, such as torch.bfloat16")
    return dtype


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a dispatch is checked against."""

    topk: int
    max_tokens: int
    hidden: int
    placement: int


@dataclass(frozen=True, slots=True, eq=False)
class DispatchArguments:
    """What a caller gives for a dispatch."""

    x: Any = None
    topk_idx: Any = None
    topk_weights: Any = None
    handle: Any = None
    layout: Any = None
    alignment: Any = None
    weights_at: Any = None
    extra: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class CombineArguments:
    """What a caller gives for a combine."""

    y: Any = None
    handle: Any = None
    weights: Any = None
    bias: Any = None
    out: Any = None
    summed: bool = True


def dispatch_call(given: DispatchArguments, sizes: Sizes) -> tuple[DispatchCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call says only how many exchanges it has."""
    try:
        return _dispatch_call(given, sizes), None
    except RaynixlError as exc:
        handle = given.handle if isinstance(given.handle, Handle) else None
        layout = given.layout if given.layout in LAYOUTS else "tokens"
        return DispatchCall((), False, 0, None, torch.int64, None, handle, layout, 1, "holder"), exc


def _dispatch_call(given: DispatchArguments, sizes: Sizes) -> DispatchCall:
    handle = given.handle
    if handle is not None and not isinstance(handle, Handle):
        raise ConfigError(f"{type(handle).__name__} is no handle", hint="give r.handle of an earlier dispatch")
    layout = check_choice(given.layout or (handle.layout if handle else "tokens"), LAYOUTS, "layout")
    weights_at = check_choice(
        given.weights_at or (handle.weights_at if handle else "holder"), WEIGHTS_AT, "place of weights"
    )
    alignment = given.alignment
    if alignment is None:
        alignment = handle.alignment if handle else 1
    x = given.x
    rows, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    columns = [columns_of(rows, "x", width=sizes.hidden)]
    tokens = len(columns[0].tensor)
    check_tokens(tokens, sizes.max_tokens)
    if scales is not None:
        columns.append(columns_of(scales, "scales", tokens))
    columns += [columns_of(one, "extra", tokens) for one in given.extra]
    weights = weights_of(given.topk_weights, tokens, sizes.topk)
    ids, ids_dtype = None, torch.int64
    if handle is None:
        ids, ids_dtype = ids_of(given.topk_idx, tokens, sizes.topk), given.topk_idx.dtype
    else:
        _check_cached(handle, given.topk_idx, tokens, sizes.placement)
        ids_dtype = handle.ids_dtype
    return DispatchCall(
        tuple(columns), scales is not None, tokens, ids, ids_dtype, weights, handle, layout,
        positive(alignment, "alignment"), weights_at,
    )  # fmt: skip


def _check_cached(handle: Handle, topk_idx: Any, tokens: int, placement: int) -> None:
    if topk_idx is not None:
        raise ConfigError("both ids and a handle", hint="a handle knows the ids: leave topk_idx away, or the handle")
    if tokens != handle.routing.tokens:
        raise ConfigError(
            f"{tokens} tokens with a handle of {handle.routing.tokens}", hint="dispatch with ids instead of a handle"
        )
    if placement != handle.placement:
        raise ConfigError("the handle is of another placement", hint="dispatch with ids: experts have moved since")


def combine_call(
    given: CombineArguments, *, limit: int, hidden: int, renormalises: bool
) -> tuple[CombineCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call takes part with nothing."""
    try:
        return _combine_call(given, hidden, renormalises), None
    except RaynixlError as exc:
        empty = torch.zeros(0, hidden)
        return CombineCall(empty, no_handle(limit), None, (), empty, True, False), exc


def _combine_call(given: CombineArguments, hidden: int, renormalises: bool) -> CombineCall:
    handle, weights, out = given.handle, given.weights, given.out
    if not isinstance(handle, Handle):
        raise ConfigError(f"{type(handle).__name__} is no handle", hint="give r.handle of the dispatch")
    if not given.summed and handle.weights_at != "source":
        raise ConfigError(
            "pairs come back only with the weights at the source", hint="dispatch with weights_at='source'"
        )
    y = _rows_of(given.y, "y", expected_shape(handle), hidden)
    tokens = handle.routing.tokens
    if weights is not None:
        weights = columns_of(weights, "weights", handle.rows, handle.topk).tensor.float().contiguous()
    biases = _biases(given.bias, tokens, hidden)
    if out is None:
        out = torch.empty((tokens, hidden), dtype=y.dtype)
    elif not isinstance(out, torch.Tensor) or tuple(out.shape) != (tokens, hidden) or out.dtype not in CODES:
        raise ConfigError("out does not fit", hint=f"give a float tensor [{tokens}, {hidden}]")
    elif out.device.type != "cpu" or (hidden > 1 and out.stride(1) != 1):
        raise ConfigError("out is not of contiguous rows on the CPU", hint="leave out= away, and copy the result")
    if (y.dtype == torch.float64) != (out.dtype == torch.float64):
        raise ConfigError(f"y is {y.dtype} and out {out.dtype}", hint="float64 goes with float64 only")
    return CombineCall(y, handle, weights, biases, out.detach(), given.summed, renormalises)


def expected_shape(handle: Handle) -> tuple[int, ...]:
    """Return the shape of y but for its columns."""
    if handle.layout == "experts":
        assert handle.major is not None
        return (len(handle.major.rows),)
    if handle.weights_at == "source":
        return (int((handle.row_ids >= 0).sum()),)
    return (handle.world, handle.max_tokens) if handle.layout == "slots" else (handle.rows,)


def _rows_of(y: Any, what: str, shape: tuple[int, ...], hidden: int) -> Tensor:
    if not isinstance(y, torch.Tensor) or y.dtype not in CODES:
        raise ConfigError(
            f"{what} is no float tensor", hint=f"give {', '.join(str(dtype).removeprefix('torch.') for dtype in CODES)}"
        )
    if tuple(y.shape) != (*shape, hidden):
        raise ConfigError(f"{what} has the shape {list(y.shape)}", hint=f"the handle wants {[*shape, hidden]}")
    if y.device.type != "cpu":
        raise ConfigError(f"{what} is on {y.device}", hint="expert parallelism takes CPU tensors so far: pass y.cpu()")
    rows: Tensor = y.detach()
    if len(shape) > 1:
        rows = rows.reshape(-1, hidden)
    return rows if hidden == 1 or rows.numel() == 0 or rows.stride(-1) == 1 else rows.contiguous()


def _biases(bias: Any, tokens: int, hidden: int) -> tuple[Tensor, ...]:
    """Check up to two biases, each [tokens, hidden] or [hidden], and bring them to one form."""
    given = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    given = tuple(one for one in given if one is not None)
    if len(given) > 2:
        raise ConfigError(f"{len(given)} biases", hint="give one or two")
    for one in given:
        if not isinstance(one, torch.Tensor) or one.dtype not in CODES or one.device.type != "cpu":
            raise ConfigError("a bias is no float tensor on the CPU", hint="give a float tensor")
        if tuple(one.shape) not in ((tokens, hidden), (hidden,)):
            raise ConfigError(
                f"a bias has the shape {list(one.shape)}", hint=f"give [{tokens}, {hidden}] or [{hidden}]"
            )
    is_alike = len({(one.dtype, one.dim(), one.stride(0)) for one in given}) < 2
    rows = [one.detach() if is_alike else one.detach().float().expand(tokens, hidden).contiguous() for one in given]
    return tuple(one if one.numel() == 0 or one.stride(-1) == 1 or hidden == 1 else one.contiguous() for one in rows)

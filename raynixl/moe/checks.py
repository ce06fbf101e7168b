"""Checks: what callers give, turned into calls; what is wrong is kept, since the other ranks must hear of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe.calls import (
    CODES,
    LAYOUTS,
    MOST_ALIGNED,
    WEIGHTS_AT,
    DispatchCall,
    check_choice,
    check_place,
    check_tokens,
    columns_of,
    ids_of,
    plain,
    weights_of,
)
from raynixl.moe.combining import CombineCall
from raynixl.moe.overlap import rows_overlap, share_memory
from raynixl.moe.result import Handle, no_handle

if TYPE_CHECKING:
    from torch import Tensor

    from raynixl.moe.cuda_result import CudaHandle


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
    local_experts: int
    ranks: int
    """How many there can be."""
    session: int
    """The key that handles must have."""


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
    extra: Any = ()
    stats: Any = None
    waited: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class CombineArguments:
    """What a caller gives for a combine."""

    y: Any = None
    handle: Any = None
    weights: Any = None
    bias: Any = None
    out: Any = None
    summed: bool = True
    stats: Any = None


def dispatch_call(given: DispatchArguments, sizes: Sizes) -> tuple[DispatchCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call says only how many exchanges it has."""
    try:
        return _dispatch_call(given, sizes), None
    except Exception as exc:  # noqa: BLE001 - it is raised on all ranks
        handle = no_handle(sizes.ranks) if isinstance(given.handle, Handle) else None
        layout = given.layout if isinstance(given.layout, str) and given.layout in LAYOUTS else "tokens"
        return DispatchCall((), False, 0, None, torch.int64, None, handle, layout, 1, "holder"), said(exc)


def said(error: Exception) -> RaynixlError:
    """Return an error of ours for whatever it was, that all ranks may hear of it."""
    if isinstance(error, RaynixlError):
        return error
    said = ConfigError(
        f"what is given cannot be used: {type(error).__name__}: {error!s:.100}", hint="give plain tensors"
    )
    said.__cause__ = error
    return said


def _dispatch_call(given: DispatchArguments, sizes: Sizes) -> DispatchCall:
    handle = given.handle
    if handle is not None and not isinstance(handle, Handle):
        raise ConfigError(f"{type(handle).__name__} is no handle", hint="give r.handle of an earlier dispatch")
    layout, alignment, weights_at = options(given)
    x = given.x
    rows, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    columns = [columns_of(rows, "x", width=sizes.hidden)]
    tokens = columns[0].tensor.shape[0]
    check_tokens(tokens, sizes.max_tokens)
    if scales is not None:
        columns.append(columns_of(scales, "scales", tokens))
    columns += [columns_of(one, "extra", tokens) for one in given.extra]
    if given.stats is not None:
        check_stats(given.stats, sizes.local_experts, of_counts=True)
    if given.waited is not None:
        check_stats(given.waited, sizes.ranks, of_counts=False, what="waited")
    weights = weights_of(given.topk_weights, tokens, sizes.topk)
    ids, ids_dtype = None, torch.int64
    if handle is None:
        ids, ids_dtype = ids_of(given.topk_idx, tokens, sizes.topk), given.topk_idx.dtype
    else:
        check_cached(handle, handle.routing.tokens, given.topk_idx, tokens, sizes)
        ids_dtype = handle.ids_dtype
        if weights is None and (handle.weights_at, weights_at) == ("source", "holder"):
            weights = handle.weights  # they have not gone to the holders so far
    return DispatchCall(
        tuple(columns), scales is not None, tokens, ids, ids_dtype, weights, handle, layout, alignment,
        weights_at,
    )  # fmt: skip


def options(given: DispatchArguments) -> tuple[str, int, str]:
    """Return layout, alignment and the place of weights: those of the handle unless told otherwise."""
    handle = given.handle
    usual = ("tokens", 1, "holder") if handle is None else (handle.layout, handle.alignment, handle.weights_at)
    asked = (given.layout, given.alignment, given.weights_at)
    layout, alignment, weights_at = (one if two is None else two for one, two in zip(usual, asked, strict=True))
    if positive(alignment, "alignment") > MOST_ALIGNED:
        raise ConfigError(f"alignment is {alignment!r:.40}", hint=f"give {MOST_ALIGNED} rows at most")
    return check_choice(layout, LAYOUTS, "layout"), int(alignment), check_choice(weights_at, WEIGHTS_AT, "weights_at")


def check_stats(
    stats: Any, length: int, *, of_counts: bool, gpu: int | None = None, what: str = "stats"
) -> None:  # fmt: skip
    """Refuse what results cannot be added to, before there are any: counts by expert, or seconds by rank."""
    dtypes = (torch.int64, torch.int32, torch.float64, torch.float32) if of_counts else (torch.float64, torch.float32)
    fits = isinstance(stats, torch.Tensor) and stats.dtype in dtypes and stats.dim() == 1
    if not fits or stats.layout is not torch.strided or stats.requires_grad:
        raise ConfigError(f"{what} is no plain tensor", hint=f"give one of {dtypes[0]} with one dimension")
    check_place(stats, what, gpu)
    if len(stats) != length if of_counts else len(stats) > length:
        raise ConfigError(f"{what} has {len(stats)} items", hint=f"give one for each of {length}")


def check_session(handle: Handle | CudaHandle, session: int) -> None:
    """Refuse a handle of another layer, or of a former session of this one."""
    if handle.session != session:
        raise ConfigError(
            "the handle is of another layer, or from before this rank has rejoined",
            hint="give the handle of a dispatch of this layer since then",
        )


def check_known(known: int, topk_idx: Any, tokens: int) -> None:
    """Refuse ids, and another number of tokens than a handle knows."""
    if topk_idx is not None:
        raise ConfigError("both ids and a handle", hint="a handle knows the ids: leave topk_idx away, or the handle")
    if tokens != known:
        raise ConfigError(f"{tokens} tokens with a handle of {known}", hint="dispatch with ids instead of a handle")


def check_cached(handle: Handle | CudaHandle, known: int, topk_idx: Any, tokens: int, sizes: Sizes) -> None:
    """Refuse what does not go with a handle, which knows of so many tokens."""
    check_session(handle, sizes.session)
    check_known(known, topk_idx, tokens)
    if sizes.placement != handle.placement:
        raise ConfigError("the handle is of another placement", hint="dispatch with ids: experts have moved since")


def combine_call(
    given: CombineArguments, *, limit: int, hidden: int, renormalises: bool, session: int | None = None
) -> tuple[CombineCall, RaynixlError | None]:
    """Return the call, and what is wrong with it; then the call takes part with nothing.

    limit: how many ranks there can be. session: the key that the handle must have, if any.
    """
    try:
        if session is not None and isinstance(given.handle, Handle):
            check_session(given.handle, session)
        if given.stats is not None:
            check_stats(given.stats, limit, of_counts=False)
        return _combine_call(given, hidden, renormalises), None
    except Exception as exc:  # noqa: BLE001 - it is raised on all ranks
        empty = torch.zeros(0, hidden)
        return CombineCall(empty, no_handle(limit), None, (), empty, True, False), said(exc)


def _combine_call(given: CombineArguments, hidden: int, renormalises: bool) -> CombineCall:
    handle, weights, out = given.handle, given.weights, given.out
    if not isinstance(handle, Handle):
        raise ConfigError(f"{type(handle).__name__} is no handle", hint="give r.handle of the dispatch")
    if not given.summed and handle.weights_at != "source":
        raise ConfigError(
            "pairs come back only with the weights at the source", hint="dispatch with weights_at='source'"
        )
    y = rows_of(given.y, "y", expected_shape(handle), hidden)
    tokens = handle.routing.tokens
    if weights is not None:
        weights = columns_of(weights, "weights", handle.rows, handle.topk).tensor.float().contiguous()
    biases = biases_of(given.bias, (tokens, hidden), y.dtype)
    if out is None:
        out = torch.empty((tokens, hidden), dtype=y.dtype)
    else:
        check_out(out, (tokens, hidden), y.dtype)
        check_apart(out, y, biases, weights)
    return CombineCall(y, handle, weights, biases, plain(out), given.summed, renormalises)


def check_out(out: Any, shape: tuple[int, int], dtype: torch.dtype, *, gpu: int | None = None) -> None:
    """Refuse memory for a result that does not fit it."""
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != shape or out.dtype not in CODES:
        raise ConfigError("out does not fit", hint=f"give a float tensor {list(shape)}")
    check_place(out, "out", gpu)
    is_plain = out.layout is torch.strided and not out.is_neg()
    if not is_plain or (shape[1] > 1 and out.stride(1) != 1):
        raise ConfigError("out is not of contiguous rows", hint="leave out= away, and copy the result")
    if (dtype == torch.float64) != (out.dtype == torch.float64):
        raise ConfigError(f"y is {dtype} and out {out.dtype}", hint="float64 goes with float64 only")


def check_apart(out: Tensor, y: Tensor, biases: tuple[Tensor, ...], weights: Tensor | None) -> None:
    """Refuse a result that lies over what it is made of, which is still read while it is written."""
    sources = {"y": y, "weights": weights} | {f"bias {number}": bias for number, bias in enumerate(biases)}
    for name, source in sources.items():
        if source is not None and share_memory(out, source):
            raise ConfigError(f"out lies over {name}", hint="give memory of its own")
    if rows_overlap(out):
        raise ConfigError("rows of out lie over each other", hint="give memory for each row")


def expected_shape(handle: Handle) -> tuple[int, ...]:
    """Return the shape of y but for its columns."""
    if handle.layout == "experts":
        assert handle.major is not None
        return (len(handle.major.rows),)
    if handle.weights_at == "source":
        return (int((handle.row_ids >= 0).sum()),)
    return (handle.world, handle.max_tokens) if handle.layout == "slots" else (handle.rows,)


def rows_of(y: Any, what: str, shape: tuple[int | None, ...], hidden: int, *, gpu: int | None = None) -> Tensor:
    """Check rows that go back; a size that is None is not known here."""
    if not isinstance(y, torch.Tensor) or y.dtype not in CODES or y.layout is not torch.strided:
        raise ConfigError(
            f"{what} is no float tensor", hint=f"give {', '.join(str(dtype).removeprefix('torch.') for dtype in CODES)}"
        )
    wanted = (*shape, hidden)
    if y.dim() != len(wanted) or any(two not in (None, one) for one, two in zip(y.shape, wanted, strict=True)):
        raise ConfigError(f"{what} has the shape {list(y.shape)}", hint=f"the handle wants {list(wanted)}")
    check_place(y, what, gpu)
    rows = plain(y)
    if len(shape) > 1:
        rows = rows.reshape(-1, hidden)
    return rows if hidden == 1 or rows.numel() == 0 or rows.stride(-1) == 1 else rows.contiguous()


def biases_of(bias: Any, shape: tuple[int, int], dtype: torch.dtype, *, gpu: int | None = None) -> tuple[Tensor, ...]:
    """Check up to two biases, each of the result's shape or one row, and bring them to one form that y goes with."""
    given = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    given = tuple(one for one in given if one is not None)
    if len(given) > 2:
        raise ConfigError(f"{len(given)} biases", hint="give one or two")
    for one in given:
        is_float = isinstance(one, torch.Tensor) and one.dtype in CODES
        if not is_float or one.layout is not torch.strided:
            raise ConfigError("a bias is no float tensor", hint="give a float tensor")
        check_place(one, "a bias", gpu)
        if tuple(one.shape) not in (shape, shape[1:]):
            raise ConfigError(
                f"a bias has the shape {list(one.shape)}", hint=f"give {list(shape)} or {list(shape[1:])}"
            )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [_summable(plain(one), wide) for one in given]
    if len({(one.dtype, one.dim(), one.stride(0)) for one in rows}) > 1:
        rows = [one.to(wide).expand(shape).contiguous() for one in rows]
    return tuple(rows)


def _summable(bias: Tensor, wide: torch.dtype) -> Tensor:
    """Return a bias with its rows in one piece, in float64 where the sum is, and nowhere else."""
    if torch.float64 in (bias.dtype, wide):
        bias = bias.to(wide)
    return bias if bias.numel() == 0 or bias.stride(-1) == 1 or bias.shape[-1] == 1 else bias.contiguous()

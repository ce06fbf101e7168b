"""Movements: the torch operations of which the recorder knows that they only move values, and where to."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raynixl.weights.ledger import ZEROS, Blot

if TYPE_CHECKING:
    from raynixl.weights.witness import Witness

aten = torch.ops.aten
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def bare(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def line() -> str:
    """Return the line of the loader that is being run: file, number and text."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    path, number = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{number}: {linecache.getline(path, number).strip()}"


def _copy(witness: Witness, target: torch.Tensor, source: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    witness.transfer(target, source)
    return target


def _copy_each(witness: Witness, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *_: Any) -> None:
    for target, source in zip(targets, sources, strict=True):
        witness.transfer(target, source)


def _fill(witness: Witness, target: torch.Tensor, value: Any = 0) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        witness.transfer(target, value)
    else:
        witness.put(target, Blot(f"is filled with {value}", line=line()) if value else ZEROS)
    return target


def _clone(witness: Witness, source: torch.Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    made = witness.fresh(source, source.shape, dtype=dtype)
    witness.transfer(made, source)
    return made


def _cat(witness: Witness, tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    if len({tensor.dtype for tensor in tensors}) > 1:
        return NotImplemented
    plan = torch.cat([bare(tensor) for tensor in tensors], dim)
    made = witness.fresh(tensors[0], plan.shape)
    parts = [tensor for tensor in tensors if tensor.shape != (0,)]
    for place, tensor in zip(torch.split(made, [part.shape[dim] for part in parts], dim), parts, strict=True):
        witness.transfer(place, tensor)
    return made


def _stack(witness: Witness, tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    return _cat(witness, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _repeat(witness: Witness, source: torch.Tensor, repeats: Sequence[int]) -> torch.Tensor:
    shape = (1,) * (len(repeats) - source.dim()) + tuple(source.shape)
    made = witness.fresh(source, [count * size for count, size in zip(repeats, shape, strict=True)])
    pairs = [part for pair in zip(repeats, shape, strict=True) for part in pair]
    apart = source.reshape([part for size in shape for part in (1, size)])
    witness.transfer(made.view(pairs), apart)
    return made


def _pad(witness: Witness, source: torch.Tensor, pad: Sequence[int], value: Any = 0) -> Any:
    if value:
        return NotImplemented
    before, after = [0] * source.dim(), [0] * source.dim()
    for number in range(len(pad) // 2):
        before[-1 - number], after[-1 - number] = pad[2 * number], pad[2 * number + 1]
    made = witness.fresh(source, [sum(sizes) for sizes in zip(before, source.shape, after, strict=True)])
    witness.put(made, ZEROS)
    place = made
    for dim, (low, high) in enumerate(zip(before, after, strict=True)):
        place = place.narrow(dim, max(0, low), place.shape[dim] - max(0, low) - max(0, high))
        source = source.narrow(dim, max(0, -low), source.shape[dim] - max(0, -low) - max(0, -high))
    witness.transfer(place, source)
    return made


def _flip(witness: Witness, source: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for dim in dims:
        source = _select(witness, source, dim, torch.arange(source.shape[dim] - 1, -1, -1))
    return source


def _roll(witness: Witness, source: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if len(dims) != len(shifts):
        return NotImplemented
    for shift, dim in zip(shifts, dims, strict=True):
        source = _select(witness, source, dim, torch.arange(source.shape[dim]).roll(shift))
    return source


def _rows(index: Any) -> list[tuple[int, int, int]] | None:
    """Return known positions as runs (place, first, length), or None where they are not known."""
    if not isinstance(index, torch.Tensor) or index.dim() != 1 or index.device.type == "meta":
        return None
    chosen = (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist()
    runs: list[tuple[int, int, int]] = []
    for place, at in enumerate(chosen):
        if runs and runs[-1][1] + runs[-1][2] == at:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((place, at, 1))
    return runs


def _select(witness: Witness, source: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    runs = _rows(index)
    if runs is None:
        return NotImplemented
    shape = list(source.shape)
    size, shape[dim] = shape[dim], sum(length for _, _, length in runs)
    made = witness.fresh(source, shape)
    for place, first, length in runs:
        witness.transfer(made.narrow(dim, place, length), source.narrow(dim, first % size, length))
    return made


def _index(witness: Witness, source: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    return _select(witness, source, dims[0], indices[dims[0]]) if len(dims) == 1 else NotImplemented  # type: ignore[arg-type]


def _index_copy(witness: Witness, target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Any:
    runs = _rows(index)
    if runs is None:
        return NotImplemented
    shape = list(target.shape)
    size, shape[dim] = shape[dim], sum(length for _, _, length in runs)
    source = source.view(source.shape[max(0, source.dim() - len(shape)) :]).expand(shape)
    for place, first, length in runs:
        witness.transfer(target.narrow(dim, first % size, length), source.narrow(dim, place, length))
    return target


def _index_put(
    witness: Witness, target: torch.Tensor, indices: Sequence[Any], values: torch.Tensor, accumulate: bool = False
) -> Any:
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if len(dims) != 1 or accumulate:
        return NotImplemented
    return _index_copy(witness, target, dims[0], indices[dims[0]], values)


MOVEMENTS: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy,
    aten._foreach_copy_.default: _copy_each,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.zero_.default: _fill,
    aten.clone.default: _clone,
    aten._to_copy.default: _clone,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.repeat.default: _repeat,
    aten.constant_pad_nd.default: _pad,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.index_select.default: _select,
    aten.index.Tensor: _index,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
}

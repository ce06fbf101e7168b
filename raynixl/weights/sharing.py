"""Sharing: which tensors of a model lie in the same memory, wholly (tied) or in part (views of each other)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as it lies in memory: strides in elements, address of its first element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    device: str = "cpu"
    address: int = 0
    form: tuple[bool, bool] = (False, False)
    """Whether it is read conjugated, and negated: torch does both lazily, in the same memory."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no elements, and so no memory."""
        return 0 in self.shape


@dataclass(frozen=True, slots=True)
class Sharing:
    """`same_as[i]` is the first tensor that is tensor i itself; `overlap` holds `Entry.sharing` of partial overlaps."""

    same_as: tuple[int, ...]
    overlap: dict[int, tuple[int, ...]]


def find_sharing(specs: Sequence[TensorSpec], itemsize: Callable[[str], int]) -> Sharing:
    """Find tied tensors and those whose memory partly overlaps. Tensors without address share nothing."""
    first: dict[tuple[object, ...], int] = {}
    same_as = []
    for index, spec in enumerate(specs):
        lone = spec.is_empty or spec.address == 0
        key = (index,) if lone else (spec.device, spec.address, spec.dtype, spec.shape, _strides(spec), spec.form)
        same_as.append(first.setdefault(key, index))
    heads = [i for i in sorted(set(same_as)) if specs[i].address and not specs[i].is_empty]
    spans = {i: _extent(specs[i], itemsize(specs[i].dtype)) for i in heads}
    overlap: dict[int, tuple[int, ...]] = {}
    for number, members in enumerate(_components(specs, spans)):
        start = spans[members[0]][0]
        views = [_View(spans[i][0] - start, specs[i], itemsize(specs[i].dtype)) for i in members]
        if _do_overlap(views, max(spans[i][1] for i in members) - start):
            overlap.update(
                {i: (number, view.offset, *view.byte_strides) for i, view in zip(members, views, strict=True)}
            )
    ties = {index: overlap[head] for index, head in enumerate(same_as) if head in overlap}
    return Sharing(tuple(same_as), ties)


@dataclass(frozen=True, slots=True)
class _View:
    offset: int
    spec: TensorSpec
    itemsize: int

    @property
    def byte_strides(self) -> tuple[int, ...]:
        return tuple(stride * self.itemsize for stride in _strides(self.spec))


def _strides(spec: TensorSpec) -> tuple[int, ...]:
    """Return strides with those of dimensions of one element made equal: they mean nothing."""
    if len(spec.strides) != len(spec.shape):
        return ()
    return tuple(stride if size > 1 else 0 for stride, size in zip(spec.strides, spec.shape, strict=True))


def _extent(spec: TensorSpec, size: int) -> tuple[int, int]:
    strides = _strides(spec)
    if not strides and spec.shape:
        return spec.address, spec.address + size * math.prod(spec.shape)
    last = sum(stride * (count - 1) for stride, count in zip(strides, spec.shape, strict=True))
    return spec.address, spec.address + (last + 1) * size


def _components(specs: Sequence[TensorSpec], spans: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Return groups of two or more tensors whose address ranges touch each other."""
    order = sorted(spans, key=lambda i: (specs[i].device, spans[i]))
    groups: list[list[int]] = []
    device, end = "", 0
    for i in order:
        if groups and specs[i].device == device and spans[i][0] < end:
            groups[-1].append(i)
            end = max(end, spans[i][1])
        else:
            groups.append([i])
            device, end = specs[i].device, spans[i][1]
    return [group for group in groups if len(group) > 1]


def _do_overlap(views: Sequence[_View], nbytes: int) -> bool:
    """Say whether any two views share a byte: interleaved columns share a range but no byte."""
    seen = np.zeros(nbytes, np.bool_)
    for view in views:
        shape, strides = (*view.spec.shape, view.itemsize), (*view.byte_strides, 1)
        marks = np.lib.stride_tricks.as_strided(seen[view.offset :], shape, strides)
        if marks.any():
            return True
        marks[...] = True
    return False

"""Intersect: what boxes of one tensor have in common, and the runs of bytes that carry it. Arrays only."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from raynixl.weights.pieces import Ints

_BLOCK = 4_000_000  # pairs that are looked at at once


class Runs(NamedTuple):
    """Strided runs of boxes: `box` is the box that each belongs to, offsets are in bytes from where it begins."""

    box: Ints
    source: Ints
    target: Ints
    nbytes: Ints
    repeats: Ints
    source_stride: Ints
    stride: Ints


class Cells(NamedTuple):
    """Boxes that do not overlap, each with one of those who have it: it serves in turn `turn` of `turns`."""

    start: Ints
    size: Ints
    holder: Ints
    turn: Ints
    turns: Ints


def cells(start: Ints, size: Ints) -> Cells:
    """Cut boxes so that any two are equal or have nothing in common; `holder` is the box that each was cut from."""
    holder = np.arange(len(start))
    known, of, counts = np.unique(np.hstack((start, size)), axis=0, return_inverse=True, return_counts=True)
    of = of.reshape(-1)
    dims = start.shape[1]
    if not _are_disjoint(known[:, :dims], known[:, dims:]):
        start, size, holder = _on_grid(start, size)
        known, of, counts = np.unique(np.hstack((start, size)), axis=0, return_inverse=True, return_counts=True)
        of = of.reshape(-1)
    order = np.argsort(of, kind="stable")
    turn = np.empty(len(of), np.int64)
    turn[order] = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Cells(start, size, holder, turn, counts[of])


def _are_disjoint(start: Ints, size: Ints) -> bool:
    differs = (start != start[:1]).any(axis=0) | (size != size[:1]).any(axis=0)
    if differs.sum() <= 1:
        at = int(differs.argmax())
        order = np.argsort(start[:, at])
        ends = start[order, at] + size[order, at]
        return bool((ends[:-1] <= start[order[1:], at]).all())
    common, _, _ = overlaps((start, size), (start, size))
    return len(common) == len(start)


def _on_grid(start: Ints, size: Ints) -> tuple[Ints, Ints, Ints]:
    """Cut every box wherever some box begins or ends."""
    cuts = [np.unique(np.concatenate((start[:, dim], start[:, dim] + size[:, dim]))) for dim in range(start.shape[1])]
    rows, holders = [], []
    for at, (begin, length) in enumerate(zip(start.tolist(), size.tolist(), strict=True)):
        sides = []
        for dim, (first, extent) in enumerate(zip(begin, length, strict=True)):
            inside = cuts[dim][(cuts[dim] >= first) & (cuts[dim] <= first + extent)].tolist()
            sides.append(list(itertools.pairwise(inside)))
        for cell in itertools.product(*sides):
            rows.append([a for a, _ in cell] + [b - a for a, b in cell])
            holders.append(at)
    table = np.array(rows, np.int64)
    dims = start.shape[1]
    return table[:, :dims], table[:, dims:], np.array(holders, np.int64)


def overlaps(ours: tuple[Ints, Ints], theirs: tuple[Ints, Ints]) -> tuple[Ints, Ints, Ints]:
    """Return what boxes (start, size) of two lists have in common: pairs (M, 2) of their numbers, starts, sizes."""
    (start, size), (their_start, their_size) = ours, theirs
    step = max(1, _BLOCK // max(1, len(their_start)))
    pairs = []
    for first in range(0, len(start), step):
        block = slice(first, first + step)
        meets = np.ones((len(start[block]), len(their_start)), np.bool_)
        for dim in range(start.shape[1]):
            ends, their_ends = start[block, dim] + size[block, dim], their_start[:, dim] + their_size[:, dim]
            meets &= start[block, dim, None] < their_ends
            meets &= their_start[:, dim] < ends[:, None]
        pairs.append(np.argwhere(meets) + np.array([first, 0]))
    pair = np.concatenate(pairs).astype(np.int64) if pairs else np.zeros((0, 2), np.int64)
    one, other = pair.T
    begin = np.maximum(start[one], their_start[other])
    end = np.minimum(start[one] + size[one], their_start[other] + their_size[other])
    return pair, begin, end - begin


def runs(size: Ints, source_stride: Ints, stride: Ints, itemsize: int) -> Runs:
    """Return the fewest strided runs of boxes whose elements lie with these strides (bytes) on either side."""
    size = size.copy()
    boxes, dims = size.shape
    nbytes = np.full(boxes, itemsize, np.int64)
    for _ in range(dims):  # dimensions are taken into the run from the innermost on, in whatever order they lie
        for dim in range(dims - 1, -1, -1):
            fits = (size[:, dim] > 1) & (source_stride[:, dim] == nbytes) & (stride[:, dim] == nbytes)
            nbytes[fits] *= size[fits, dim]
            size[fits, dim] = 1
    for outer, inner in itertools.permutations(range(dims), 2):
        fits = (size[:, outer] > 1) & (size[:, inner] > 1)
        for strides in (source_stride, stride):
            fits &= strides[:, outer] == strides[:, inner] * size[:, inner]
        size[fits, inner] *= size[fits, outer]
        size[fits, outer] = 1
    longest = size.argmax(axis=1)
    rows = np.arange(boxes)
    count = size[rows, longest]
    size[rows, longest] = 1
    copies = size.prod(axis=1)
    box = np.repeat(rows, copies)
    rest = np.arange(len(box)) - np.repeat(np.cumsum(copies) - copies, copies)
    at = [np.zeros(len(box), np.int64), np.zeros(len(box), np.int64)]
    for dim in range(dims - 1, -1, -1):
        rest, turn = np.divmod(rest, size[box, dim])
        at[0] += turn * source_stride[box, dim]
        at[1] += turn * stride[box, dim]
    long = longest[box]
    return Runs(box, at[0], at[1], nbytes[box], count[box], source_stride[box, long], stride[box, long])

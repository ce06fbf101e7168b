"""Table check: a table says nothing impossible, whoever made it: all pieces lie inside their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raynixl.errors import ConfigError
from raynixl.weights.pieces import Ints, distinct

if TYPE_CHECKING:
    from raynixl.weights.table import Table

MAX_EXTENT = 1 << 44
"""Elements of one tensor, at most: nothing overflows below that."""


def check_table(table: Table) -> None:
    """Refuse a table whose pieces lie outside their full or local tensors.

    Raises:
        ConfigError: they do, or a name is used twice, or a dtype cannot be carried.
    """
    for names in ([info.name for info in table.tensors], table.locals.names):
        if len(set(names)) != len(names):
            raise ConfigError("two tensors have one name", hint="give each tensor its own name")
    _check_shapes([info.shape for info in table.tensors])
    if (table.alias > np.arange(len(table.tensors))).any() or (table.alias[table.alias] != table.alias).any():
        raise ConfigError("a tensor has the values of one after it")
    heads = table.locals.tied
    if (heads > np.arange(len(heads))).any() or (heads[heads] != heads).any():
        raise ConfigError("a local tensor lies where one after it does")
    if (table.entry_itemsizes != table.entry_itemsizes[heads]).any() or _differ(table, heads):
        raise ConfigError("local tensors in one place have several sizes")
    _check_geometries(table)
    _check_boxes(table)
    _check_extents(table)


def _check_shapes(shapes: Sequence[Sequence[int]]) -> None:
    for shape in set(map(tuple, shapes)):
        extent = 1
        for size in shape:
            extent *= max(size, 1)
        if extent > MAX_EXTENT or min(shape, default=0) < 0:
            raise ConfigError(f"a tensor has shape {list(shape)}", hint=f"at most {MAX_EXTENT} elements are carried")


def _differ(table: Table, heads: Ints) -> bool:
    """Whether local tensors in one place differ in size on some rank that has both."""
    pairs, _ = distinct((table.locals.shape_of, table.locals.shape_of[heads]))
    one, other = table.counts[pairs[:, 0]], table.counts[pairs[:, 1]]
    return bool(((one != other) & (one >= 0) & (other >= 0)).any())


def _check_geometries(table: Table) -> None:
    known = table.geometries
    _check_shapes(table.locals.shapes.clip(min=0).reshape(-1, table.locals.shapes.shape[2]).tolist())
    order = known.number * table.ranks + known.rank
    count = int(known.number[-1]) + 1 if len(known.number) else 0
    if (np.diff(order) < 0).any() or (table.geometry_of >= count).any():
        raise ConfigError("pieces are out of order")
    if (known.slot >= len(table.entry_of)).any() or (known.size < 1).any() or (known.stride < 0).any():
        raise ConfigError("a piece is empty or lies backwards")
    if _do_overlap(known.size, known.stride):
        raise ConfigError("elements of a piece share memory", hint="an expanded tensor cannot be carried")
    reach = known.offset.astype(np.float64) + ((known.size - 1).astype(np.float64) * known.stride).sum(axis=1)
    if len(reach) and float(reach.max()) > MAX_EXTENT:
        raise ConfigError("a piece lies outside its local tensor")


def _do_overlap(size: Ints, stride: Ints) -> bool:
    """Whether elements of some box may lie in one place: each stride must step over all smaller ones."""
    order = np.argsort(np.where(size > 1, stride, 0), axis=1, kind="stable")
    steps, extents = np.take_along_axis(stride, order, axis=1), np.take_along_axis(size, order, axis=1)
    spans = np.cumsum((extents - 1) * steps, axis=1) - (extents - 1) * steps
    return bool(((extents > 1) & (steps <= spans)).any())


def _check_boxes(table: Table) -> None:
    """Boxes are inside the shapes of their full tensors."""
    known = table.geometries
    dims = known.start.shape[1]
    used = np.flatnonzero(table.geometry_of >= 0)
    if not len(used):
        return
    shapes: dict[tuple[int, ...], int] = {}
    number = np.array([shapes.setdefault(table.tensors[at].shape, len(shapes)) for at in used.tolist()], np.int64)
    pairs, _ = distinct((table.geometry_of[used], number))
    ends = np.zeros((int(known.number[-1]) + 1, dims), np.int64)
    np.maximum.at(ends, known.number, known.start + known.size)
    sizes = np.array([[*shape, *(1,) * (dims - len(shape))][:dims] for shape in shapes], np.int64)
    too_deep = any(len(shape) > dims for shape in shapes)
    if too_deep or (known.start < 0).any() or (ends[pairs[:, 0]] > sizes[pairs[:, 1]]).any():
        raise ConfigError("a piece lies outside its tensor", hint="give start and size in the full tensor's elements")


def _check_extents(table: Table) -> None:
    """Each slot of each tensor is in a local tensor that reaches far enough, on every rank that has the piece."""
    known = table.geometries
    count = int(known.number[-1]) + 1 if len(known.number) else 0
    for slot in range(len(table.entry_of)):
        rows = np.flatnonzero(known.slot == slot)
        last = np.full((count, table.ranks), -1, np.int64)
        reach = known.offset[rows] + ((known.size[rows] - 1) * known.stride[rows]).sum(axis=1)
        np.maximum.at(last, (known.number[rows], known.rank[rows]), reach)
        least = np.zeros((count, table.ranks), np.int64)
        np.minimum.at(least, (known.number[rows], known.rank[rows]), known.offset[rows])
        used = np.flatnonzero(table.geometry_of >= 0)
        entry = table.entry_of[slot, used]
        if not len(used):
            continue
        ours = (
            table.geometry_of[used],
            table.lead_of[slot, used],
            table.locals.shape_of[entry],
            (entry < 0).astype(np.int64),
        )
        geometry, lead, form, lacks = distinct(ours)[0].T
        needs, has = last[geometry], np.where(lacks[:, None] > 0, -1, table.counts[form])
        begins = table.leads[lead] + least[geometry]
        if ((needs >= 0) & ((table.leads[lead] + needs >= has) | (begins < 0))).any():
            raise ConfigError("a piece lies outside its local tensor", hint="offsets and strides count its elements")

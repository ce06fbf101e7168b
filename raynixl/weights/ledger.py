"""Ledger: which elements of which full tensors every watched memory holds, without a byte of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raynixl.weights.nests import Box, Grid, Nest, boxes, clip, fit, nest_of, without


@dataclass(frozen=True, slots=True)
class Blot:
    """Values that no copy explains: which operation made them, from which full tensors, at which line."""

    why: str
    tensors: frozenset[int] = frozenset()
    line: str = ""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Values that are zero whatever the weights are."""


Origin = int | Blot | Zeros
"""A full tensor by its number, or why there is none."""
ZEROS = Zeros()


class Content(NamedTuple):
    """A box of a memory, and what its elements are of."""

    box: Box
    origin: Origin


class View(NamedTuple):
    """A view of a memory: sizes, strides and offset in elements of `dtype`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: str


@dataclass(slots=True, eq=False)
class Memory:
    """One storage. What no content covers holds what it held before.

    Contents of a single row of the first dimension, such as an expert's, are found by it: there may be thousands.
    """

    grid: Grid
    dtype: str
    is_model: bool = False
    _wide: list[Content] = field(default_factory=list)
    _rows: dict[int, list[Content]] = field(default_factory=dict)

    @property
    def contents(self) -> Iterable[Content]:
        """What is known of it."""
        return itertools.chain(self._wide, *self._rows.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of it."""
        return not self._wide and not self._rows

    def _add(self, boxes: Iterable[Box], origin: Origin) -> None:
        for box in boxes:
            (self._rows.setdefault(box.start[0], []) if box.size[0] == 1 else self._wide).append(Content(box, origin))

    def cover(self, origin: Origin) -> None:
        """Let it hold one thing everywhere: a full tensor as it is, zeros or a blot."""
        steps = self.grid.strides if isinstance(origin, int) else (0,) * len(self.grid.sizes)
        self._rows.clear()
        self._wide = [Content(Box((0,) * len(steps), self.grid.sizes, 0, steps), origin)]

    def put(self, view: View, origin: Blot | Zeros) -> None:
        """Let a view of it hold zeros or a blot."""
        if view.dtype != self.dtype:
            self.cover(origin if isinstance(origin, Blot) else Blot("is filled as another dtype"))
            return
        own = [box._replace(far=0, steps=(0,) * len(box.steps)) for box in self._boxes(view)]
        self._erase(own)
        self._add(own, origin)

    def copy(self, view: View, source: Memory, source_view: View) -> None:
        """Let a view of it hold what an equally large view of a memory holds.

        Raises:
            ConfigError: it takes too many boxes.
        """
        found = list(source.under(source_view, view))
        self._erase(self._boxes(view))
        for nest, origin in found:
            for fitted in fit(nest.flipped(), self.grid):
                self._add(boxes(fitted, self.grid), origin)

    def under(self, view: View, other: View) -> Iterator[tuple[Nest, Origin]]:
        """Yield what lies under a view: nests from what it is of to the places of another view of its shape."""
        if 0 in view.shape:
            return
        whole = nest_of(view.shape, (view.offset, view.strides), (other.offset, other.strides))
        if self._is_uniform and (own := self._wide[0]).box.far == 0 and own.box.steps == self.grid.strides:
            for nest in fit(whole, self.grid):  # it is a full tensor as it is: nothing is to be clipped
                yield nest, own.origin
            return
        for nest in fit(whole, self.grid):
            for box, origin in self.contents:
                for part in clip(nest, self.grid, box):
                    yield part, origin

    def origins(self, view: View | None = None) -> frozenset[int]:
        """Return the full tensors that a view depends on, or the whole memory."""
        if view is None or view.dtype != self.dtype or self._is_uniform:
            return numbers(content.origin for content in self.contents)
        return numbers(origin for _, origin in self.under(view, view))

    @property
    def _is_uniform(self) -> bool:
        """Whether it is of one thing everywhere."""
        return not self._rows and len(self._wide) == 1 and self._wide[0].box.size == self.grid.sizes

    def is_covered(self, view: View) -> bool:
        """Whether contents cover all of a view."""
        return sum(volume_of(nest) for nest, _ in self.under(view, view)) >= volume_of(
            nest_of(view.shape, (0, view.strides), (0, view.strides))
        )

    def _boxes(self, view: View) -> list[Box]:
        if 0 in view.shape:
            return []
        place = (view.offset, view.strides)
        return [box for nest in fit(nest_of(view.shape, place, place), self.grid) for box in boxes(nest, self.grid)]

    def _erase(self, gone: Sequence[Box]) -> None:
        for box in gone:
            self._wide = self._kept(self._wide, box)
            first, end = box.start[0], box.start[0] + box.size[0]
            rows = range(first, end) if end - first < len(self._rows) else list(self._rows)
            for row in rows:
                if first <= row < end and row in self._rows:
                    self._rows[row] = self._kept(self._rows[row], box)
                    if not self._rows[row]:
                        del self._rows[row]

    def _kept(self, contents: list[Content], gone: Box) -> list[Content]:
        """Return what is left of contents outside a box."""
        first, end = gone.start[0], gone.start[0] + gone.size[0]
        near = [own for own in contents if own[0][0][0] < end and first < own[0][0][0] + own[0][1][0]]
        changed = {id(own): rest for own in near if (rest := without(own.box, gone))[:1] != [own.box]}
        if not changed:
            return contents
        kept = [own for own in contents if id(own) not in changed]
        return kept + [Content(part, own.origin) for own in near for part in changed.get(id(own), ())]


def numbers(origins: Iterable[Origin]) -> frozenset[int]:
    """Return the full tensors among origins, those behind blots too."""
    found: set[int] = set()
    for origin in origins:
        if isinstance(origin, Blot):
            found |= origin.tensors
        elif isinstance(origin, int):
            found.add(origin)
    return frozenset(found)


def volume_of(nest: Nest) -> int:
    """Return how many elements a nest copies."""
    count = 1
    for rounds, _, _ in nest.loops:
        count *= rounds
    return count


def boxes_of_full(
    nest: Nest, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, list[int]]]:
    """Cut a nest whose near memory is a C-contiguous full tensor into its boxes: start, size, far offset and strides.

    Raises:
        ConfigError: it takes too many.
    """
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    strides, span = [0] * len(shape), 1
    for dim in reversed(wide):
        strides[dim] = span
        span *= shape[dim]
    grid = Grid.of(span, tuple(strides))
    for fitted in fit(nest, grid):
        for box in boxes(fitted, grid):
            start, size, steps = [0] * len(shape), [1] * len(shape), [0] * len(shape)
            for at, dim in enumerate(wide):
                start[dim], size[dim], steps[dim] = box.start[at], box.size[at], box.steps[at]
            yield tuple(start), tuple(size), box.far, steps

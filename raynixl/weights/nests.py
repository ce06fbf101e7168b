"""Nests: strided copies between two flat memories, cut until each lies in boxes of both."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raynixl.errors import ConfigError

MAX_BOXES = 65_536

Loop = tuple[int, int, int]
"""How often it runs, how far it steps in the near memory, and how far in the far one."""


class Nest(NamedTuple):
    """Loops in loops: which elements of a near memory are which of a far one."""

    near: int
    far: int
    loops: tuple[Loop, ...]

    def flipped(self) -> Nest:
        """Return it seen from the far memory."""
        return Nest(self.far, self.near, tuple((count, far, near) for count, near, far in self.loops))

    def part(self, loop: int, first: int, count: int) -> Nest:
        """Return only some rounds of one loop."""
        _, near, far = self.loops[loop]
        loops = (*self.loops[:loop], *(((count, near, far),) if count > 1 else ()), *self.loops[loop + 1 :])
        return Nest(self.near + first * near, self.far + first * far, loops)

    def rounds(self, loop: int) -> Iterator[Nest]:
        """Yield each round of a loop by itself."""
        return (self.part(loop, at, 1) for at in range(self.loops[loop][0]))


class Box(NamedTuple):
    """A box of the near memory, and where its elements are in the far one: at `far`, `steps` apart."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    far: int
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """The dimensions of a flat memory: sizes and strides, each stride what the next dimension spans."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(nelements: int, strides: tuple[int, ...]) -> Grid:
        """Return the grid of a memory that is seen with these strides; of one dimension if they do not nest."""
        chain = sorted({1, *(stride for stride in strides if 0 < stride < nelements)}, reverse=True)
        if any(outer % inner for outer, inner in itertools.pairwise(chain)):
            chain = [1]
        spans = [-(-nelements // chain[0]) * chain[0], *chain]
        return Grid(tuple(span // stride for span, stride in zip(spans, chain, strict=False)), tuple(chain))

    def index(self, offset: int) -> list[int]:
        """Return the coordinates of an element."""
        found = []
        for stride in self.strides:
            at, offset = divmod(offset, stride)
            found.append(at)
        return found

    def dim(self, stride: int) -> int:
        """Return the dimension along which a stride steps, or -1."""
        return _dim(self.sizes, self.strides, stride)


@functools.lru_cache(maxsize=65_536)
def _dim(sizes: tuple[int, ...], strides: tuple[int, ...], stride: int) -> int:
    for at, (size, own) in enumerate(zip(sizes, strides, strict=True)):
        if own <= stride:
            return at if stride % own == 0 and (at == 0 or stride // own < size) else -1
    return -1


def nest_of(shape: Sequence[int], near: tuple[int, Sequence[int]], far: tuple[int, Sequence[int]]) -> Nest:
    """Return the nest of a copy between two views of one shape, each an offset and strides."""
    loops = tuple(loop for loop in zip(shape, near[1], far[1], strict=True) if loop[0] > 1)
    return Nest(near[0], far[0], loops)


def fit(nest: Nest, grid: Grid) -> Iterator[Nest]:
    """Cut a nest until no loop carries from one dimension of the near memory into another.

    Raises:
        ConfigError: it takes too many.
    """
    pending, made = [nest], 0
    while pending:
        made += 1
        if made > MAX_BOXES:
            raise _too_many()
        whole = pending.pop()
        parts = _cut(whole, grid)
        if parts is None:
            yield whole
        else:
            pending += reversed(parts)


def _cut(nest: Nest, grid: Grid) -> list[Nest] | None:
    """Return parts of a nest that carries somewhere, or None if it does not."""
    used = grid.index(nest.near)
    for number in sorted(range(len(nest.loops)), key=lambda at: nest.loops[at][1]):
        count, near, far = nest.loops[number]
        if near == 0:
            continue
        dim = grid.dim(near)
        if dim < 0:
            return list(nest.rounds(number))
        size, step = grid.sizes[dim], near // grid.strides[dim]
        if used[dim] + step * (count - 1) < size:
            used[dim] += step * (count - 1)
            continue
        inner = size // step
        if size % step == 0 and used[dim] < step:
            outer, rest = divmod(count, inner)
            if rest:
                return [nest.part(number, 0, count - rest), nest.part(number, count - rest, rest)]
            split = ((outer, near * inner, far * inner), (inner, near, far))
            loops = (*nest.loops[:number], *split[outer == 1 :], *nest.loops[number + 1 :])
            return [Nest(nest.near, nest.far, loops)]
        head = max(1, -(-(size - used[dim]) // step))
        return [nest.part(number, 0, head), nest.part(number, head, count - head)]
    return None


def clip(nest: Nest, grid: Grid, box: Box) -> Iterator[Nest]:
    """Yield what of a fitted nest lies in a box of the near memory, with the box's far memory for the near one."""
    lows = grid.index(nest.near)
    for dim, low in enumerate(lows):
        first, last = box.start[dim], box.start[dim] + box.size[dim] - 1
        own = [at for at, loop in enumerate(nest.loops) if loop[1] and grid.dim(loop[1]) == dim]
        steps = [nest.loops[at][1] // grid.strides[dim] for at in own]
        high = low + sum(step * (nest.loops[at][0] - 1) for at, step in zip(own, steps, strict=True))
        if first <= low and high <= last:
            continue
        if high < first or low > last:
            return
        widest = own[steps.index(max(steps))]
        if len(own) == 1:
            begin, end = max(0, -(-(first - low) // steps[0])), min(nest.loops[widest][0], (last - low) // steps[0] + 1)
            if begin < end:
                yield from clip(nest.part(widest, begin, end - begin), grid, box)
            return
        for single in nest.rounds(widest):
            yield from clip(single, grid, box)
        return
    offset = box.far + sum((low - start) * step for low, start, step in zip(lows, box.start, box.steps, strict=True))
    loops = []
    for count, near, far in nest.loops:
        dim = grid.dim(near) if near else 0
        loops.append((count, near // grid.strides[dim] * box.steps[dim] if near else 0, far))
    yield Nest(offset, nest.far, tuple(loops))


def boxes(nest: Nest, grid: Grid) -> Iterator[Box]:
    """Yield the boxes of the near memory that a fitted nest is made of.

    Raises:
        ConfigError: there are too many.
    """
    pending, made = [nest], 0
    while pending:
        made += 1
        if made > MAX_BOXES:
            raise _too_many()
        whole = _merged(pending.pop(), grid)
        loose = _loose(whole, grid)
        if loose is not None:
            pending += reversed(list(whole.rounds(loose)))
            continue
        size, steps = [1] * len(grid.sizes), [0] * len(grid.sizes)
        for count, near, far in whole.loops:
            dim = grid.dim(near)
            size[dim], steps[dim] = count, far
        yield Box(tuple(grid.index(whole.near)), tuple(size), whole.far, tuple(steps))


def _loose(nest: Nest, grid: Grid) -> int | None:
    """Return a loop whose rounds make boxes of their own: it skips, repeats, or shares its dimension."""
    seen: dict[int, int] = {}
    for number, (_, near, _) in enumerate(nest.loops):
        dim = grid.dim(near) if near else -1
        if dim < 0:
            return number
        if dim in seen:
            other = seen[dim]
            return number if near > nest.loops[other][1] else other
        seen[dim] = number
    return next((n for n, (_, near, _) in enumerate(nest.loops) if near != grid.strides[grid.dim(near)]), None)


def _merged(nest: Nest, grid: Grid) -> Nest:
    """Join loops along one dimension of which one goes on where the other ends."""
    loops = sorted(nest.loops, key=lambda loop: loop[1])
    joined: list[Loop] = []
    for count, near, far in loops:
        rounds, inner, other = joined[-1] if joined else (0, 0, 0)
        if near and (near, far) == (rounds * inner, rounds * other) and grid.dim(near) == grid.dim(inner):
            joined[-1] = (rounds * count, inner, other)
        else:
            joined.append((count, near, far))
    return Nest(nest.near, nest.far, tuple(joined))


def without(box: Box, other: Box) -> list[Box]:
    """Return what of a box lies outside another, as boxes."""
    ends = [min(a + n, b + m) for a, n, b, m in zip(box.start, box.size, other.start, other.size, strict=True)]
    starts = [max(a, b) for a, b in zip(box.start, other.start, strict=True)]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return [box]
    rest, left = [], box
    for dim, (start, end) in enumerate(zip(starts, ends, strict=True)):
        low, high = left.start[dim], left.start[dim] + left.size[dim]
        rest += [_slab(left, dim, *span) for span in ((low, start), (end, high)) if span[0] < span[1]]
        left = _slab(left, dim, start, end)
    return rest


def _slab(box: Box, dim: int, first: int, end: int) -> Box:
    start, size = list(box.start), list(box.size)
    far = box.far + (first - start[dim]) * box.steps[dim]
    start[dim], size[dim] = first, end - first
    return Box(tuple(start), tuple(size), far, box.steps)


def _too_many() -> ConfigError:
    return ConfigError(f"it takes more than {MAX_BOXES} boxes", hint="give this tensor's shards by hand")

"""Nests are cut into boxes that hold just the elements of the copy, and none twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raynixl.errors import ConfigError
from raynixl.weights.nests import MAX_BOXES, Box, Grid, Nest, boxes, clip, fit, nest_of, without

pytestmark = pytest.mark.pure


def pairs(nest):
    """Which element of the near memory is which of the far one, for every round of the loops."""
    return sorted(
        (nest.near + sum(n * loop[1] for n, loop in zip(at, nest.loops, strict=True)),
         nest.far + sum(n * loop[2] for n, loop in zip(at, nest.loops, strict=True)))
        for at in itertools.product(*(range(loop[0]) for loop in nest.loops))
    )  # fmt: skip


def pairs_of(box, grid):
    """The same of a box."""
    return [
        (sum((start + n) * stride for start, n, stride in zip(box.start, at, grid.strides, strict=True)),
         box.far + sum(n * step for n, step in zip(at, box.steps, strict=True)))
        for at in itertools.product(*map(range, box.size))
    ]  # fmt: skip


@st.composite
def grids(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return Grid(tuple(sizes), tuple(reversed(strides)))


@st.composite
def nests_in(draw, elements):
    loops = draw(st.lists(st.tuples(st.integers(2, 4), st.integers(0, 12), st.integers(0, 12)), max_size=3))
    nest = Nest(draw(st.integers(0, 20)), draw(st.integers(0, 5)), tuple(loops))
    assume(max(near for near, _ in pairs(nest)) < elements)
    return nest


def size_of(grid):
    return grid.sizes[0] * grid.strides[0]


@given(data=st.data())
def test_boxes_of_a_fitted_nest_are_its_elements(data):
    grid = data.draw(grids())
    nest = data.draw(nests_in(size_of(grid)))
    found = [pair for part in fit(nest, grid) for box in boxes(part, grid) for pair in pairs_of(box, grid)]
    assert sorted(found) == pairs(nest)


@given(data=st.data())
def test_a_clipped_nest_is_what_of_it_lies_in_the_box(data):
    grid = data.draw(grids())
    nest = data.draw(nests_in(size_of(grid)))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in grid.sizes)
    size = tuple(data.draw(st.integers(1, whole - first)) for whole, first in zip(grid.sizes, start, strict=True))
    box = Box(start, size, 1000, tuple(100**n for n in range(len(start))))
    inside = dict(pairs_of(box, grid))
    expected = sorted((inside[near], far) for near, far in pairs(nest) if near in inside)
    found = [pair for part in fit(nest, grid) for cut in clip(part, grid, box) for pair in pairs(cut)]
    assert sorted(found) == expected


@given(data=st.data())
def test_a_box_without_another_keeps_the_rest_in_place(data):
    def box(far):
        start = tuple(data.draw(st.integers(0, 3)) for _ in range(3))
        return Box(start, tuple(data.draw(st.integers(1, 3)) for _ in range(3)), far, (50, 7, 1))

    grid = Grid((8, 8, 8), (64, 8, 1))
    one, other = box(0), box(0)
    gone = {near for near, _ in pairs_of(other, grid)}
    rest = [pair for part in without(one, other) for pair in pairs_of(part, grid)]
    assert sorted(rest) == sorted(pair for pair in pairs_of(one, grid) if pair[0] not in gone)


def test_a_contiguous_tensor_is_one_box_however_it_is_viewed():
    grid = Grid.of(1 << 40, (1 << 20, 1))
    for shape, strides in (((1 << 40,), (1,)), ((1 << 30, 1 << 10), (1 << 10, 1)), ((2, 1 << 39), (1 << 39, 1))):
        (nest,) = fit(nest_of(shape, (0, strides), (0, strides)), grid)
        assert list(boxes(nest, grid)) == [Box((0, 0), (1 << 20, 1 << 20), 0, (1 << 20, 1))]


def test_strides_that_do_not_nest_make_a_flat_grid():
    assert Grid.of(60, (15, 4)) == Grid((60,), (1,))


def test_too_many_boxes_are_refused():
    count = MAX_BOXES + 2
    grid = Grid.of(3 * count, (3,))
    (nest,) = fit(Nest(0, 0, ((count, 3, 0),)), grid)
    assert len(list(boxes(nest, grid))) == 1
    with pytest.raises(ConfigError, match="more than"):
        list(boxes(Nest(0, 0, ((count, 0, 1),)), grid))

"""Ranges: cut at chunks they carry the same bytes, they travel unharmed or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import IntegrityError, RangeError
from raynixl.weights.intersect import cells, overlaps, runs
from raynixl.weights.layout import Layout
from raynixl.weights.ranges import Ranges, join

pytestmark = pytest.mark.pure

ARENAS = (900, 1, 300)


@st.composite
def ranges(draw):
    """Rows that fill parts of an image, each byte once at most."""
    rows = []
    for arena, size in enumerate(ARENAS):
        at = 0
        while at < size and draw(st.booleans()):
            at += draw(st.integers(0, 40))
            run, count, gap = draw(st.integers(1, 120)), draw(st.integers(1, 9)), draw(st.integers(0, 90))
            end = at + (count - 1) * (run + gap) + run
            if end > size:
                break
            strides = (run + draw(st.integers(0, 9)), run + gap) if count > 1 else (0, 0)
            place = (draw(st.integers(0, 3)), draw(st.integers(0, 1)), draw(st.integers(0, 5000)))
            rows.append((*place, arena, at, run, count, *strides))
            at = end
    return Ranges(np.array(rows, np.int64).reshape(-1, 9))


def bytes_of(some):
    """Where each byte of the image comes from."""
    return {
        (arena, offset + at): (part, source_arena, source_offset + at)
        for part, source_arena, source_offset, arena, offset, nbytes in some.expand().tolist()
        for at in range(nbytes)
    }


@given(ranges(), st.integers(1, 500))
def test_cut_at_chunks_they_carry_the_same_bytes(some, chunk_nbytes):
    cuts = some.cut(ARENAS, chunk_nbytes)
    chunks = Layout((), ARENAS).chunks(chunk_nbytes).tolist()
    assert len(cuts) == len(chunks)
    for number, (arena, offset, nbytes) in enumerate(chunks):
        reached = bytes_of(cuts[number])
        assert all(at[0] == arena and offset <= at[1] < offset + nbytes for at in reached)
        assert cuts.nbytes[number] == len(reached) == cuts[number].nbytes
    assert bytes_of(cuts.ranges) == bytes_of(some)
    assert cuts.ranges.nbytes == some.nbytes


@given(ranges())
def test_joined_they_carry_the_same_bytes(some):
    joined = join(some.rows)
    assert bytes_of(joined) == bytes_of(some)
    assert len(joined) <= len(some)
    assert join(joined.rows) == joined


def test_neighbours_are_one_row():
    rows = np.array([[0, 0, 64 * n, 0, 64 * n, 64, 1, 0, 0] for n in (2, 0, 1, 3)], np.int64)
    assert join(rows).rows.tolist() == [[0, 0, 0, 0, 0, 256, 1, 0, 0]]


def test_runs_without_a_gap_are_one_run():
    assert join(np.array([[0, 0, 8, 0, 16, 4, 3, 4, 4]], np.int64)).rows.tolist() == [[0, 0, 8, 0, 16, 12, 1, 0, 0]]


def test_a_chunk_costs_no_row_of_its_own_where_runs_are_strided():
    some = Ranges(np.array([[0, 0, 0, 0, 0, 512, 1 << 16, 1024, 512]], np.int64))
    cuts = some.cut((512 << 16,), 1 << 20)
    assert len(cuts) == 32
    assert len(cuts.ranges) == 32


@given(ranges())
def test_they_travel_unharmed(some):
    assert Ranges.from_bytes(some.to_bytes()) == some


@given(ranges(), st.data())
def test_damaged_ranges_are_refused_or_checked(some, data):
    raw = bytearray(some.to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        again = Ranges.from_bytes(bytes(raw))
        again.check([(6000, 6000)] * 4, ARENAS)
    except (IntegrityError, RangeError):
        return
    for row in again.expand().tolist() if again.count.sum() < 10_000 else ():
        assert row[0] < 4
        assert row[1] < 2
        assert 0 <= row[2] <= row[2] + row[5] <= 6000
        assert 0 <= row[4] <= row[4] + row[5] <= ARENAS[row[3]]


ROW = [1, 1, 10, 2, 20, 5, 2, 6, 7]
OUTSIDE = {
    "no such part": [2, *ROW[1:]],
    "no such source arena": [1, 3, *ROW[2:]],
    "no such arena": [*ROW[:3], 3, *ROW[4:]],
    "past the source": [*ROW[:2], 95, *ROW[3:]],
    "past the image": [*ROW[:4], 290, *ROW[5:]],
    "far": [*ROW[:6], 1 << 20, 1 << 30, 1 << 30],
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_rows_that_reach_outside_are_refused(case):
    known = [(100,), (1, 100)]
    Ranges(np.array([ROW], np.int64)).check(known, ARENAS)
    with pytest.raises(RangeError):
        Ranges(np.array([ROW, OUTSIDE[case]], np.int64)).check(known, ARENAS)


boxes = st.lists(st.tuples(*[st.integers(0, 4), st.integers(1, 4)] * 2), min_size=1, max_size=6)


@given(boxes)
def test_cells_cover_what_boxes_do_and_every_element_is_served_in_every_turn(some):
    table = np.array(some, np.int64)
    found = cells(table[:, ::2], table[:, 1::2])
    holders = {}
    for (a, b), (c, d), holder, turn, turns in zip(*(column.tolist() for column in found), strict=True):
        for at in np.ndindex(c, d):
            holders.setdefault((a + at[0], b + at[1]), []).append((holder, turn, turns))
    covered = {(a + i, c + j) for a, b, c, d in some for i in range(b) for j in range(d)}
    assert set(holders) == covered
    for (row, column), own in holders.items():
        having = [n for n, (a, b, c, d) in enumerate(some) if a <= row < a + b and c <= column < c + d]
        assert sorted(holder for holder, _, _ in own) == having
        assert sorted(turn for _, turn, _ in own) == list(range(len(own)))
        assert {turns for _, _, turns in own} == {len(own)}


@given(boxes, boxes)
def test_overlaps_are_the_elements_in_common(ours, theirs):
    one, other = np.array(ours, np.int64), np.array(theirs, np.int64)
    pairs, start, size = overlaps((one[:, ::2], one[:, 1::2]), (other[:, ::2], other[:, 1::2]))
    found = {
        (int(n), int(m), int(a) + i, int(b) + j)
        for (n, m), (a, b), (c, d) in zip(pairs, start, size, strict=True)
        for i, j in np.ndindex(int(c), int(d))
    }
    assert found == {
        (n, m, i, j)
        for n, (a, b, c, d) in enumerate(ours)
        for m, (e, f, g, h) in enumerate(theirs)
        for i in range(max(a, e), min(a + b, e + f))
        for j in range(max(c, g), min(c + d, g + h))
    }


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_runs_carry_every_element_of_a_box_once(size, data):
    strides = []
    for _ in range(2):
        order = data.draw(st.permutations(range(len(size))))
        step, own = data.draw(st.integers(1, 3)) * 2, [0] * len(size)
        for dim in order:
            own[dim] = step
            step *= size[dim] + data.draw(st.integers(0, 1))
        strides.append(np.array([own], np.int64))
    found = runs(np.array([size], np.int64), *strides, 2)
    moved = sorted(
        (source + turn * source_stride + at, target + turn * stride + at)
        for _, source, target, nbytes, count, source_stride, stride in zip(*(c.tolist() for c in found), strict=True)
        for turn in range(count)
        for at in range(nbytes)
    )
    expected = sorted(
        (int(np.dot(at, strides[0][0])) + byte, int(np.dot(at, strides[1][0])) + byte)
        for at in np.ndindex(*size)
        for byte in range(2)
    )
    assert moved == expected

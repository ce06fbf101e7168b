"""Copying and digesting in one pass gives what copying and then digesting gives, whatever overlaps what."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.native import load
from raynixl.weights.fusing import fuse

pytestmark = pytest.mark.pure

SPACE = 3000


@st.composite
def copies(draw):
    """Disjoint ranges of a copy, in any order, and where each comes from in the original."""
    cuts = sorted(draw(st.sets(st.integers(0, SPACE), max_size=12)))
    ranges = [(low, high) for low, high in itertools.pairwise(cuts) if draw(st.booleans())]
    rows = [(draw(st.integers(0, SPACE - (high - low))), low, high - low) for low, high in ranges]
    return draw(st.permutations(rows))


digests = st.lists(
    st.tuples(st.integers(0, SPACE - 1), st.integers(0, 900), st.integers(0, 1 << 20), st.integers(0, 3)), max_size=8
).map(lambda rows: [(at, min(size, SPACE - at), position, index) for at, size, position, index in rows])


@given(copies(), digests, st.integers(0, 2**32))
def test_all_is_copied_and_every_row_digested_once(copying, digesting, seed):
    core = load(native=True)
    original = np.random.default_rng(seed).integers(0, 256, SPACE, np.uint8)
    expected, found = np.full(SPACE, 7, np.uint8), np.full(SPACE, 7, np.uint8)
    for source, destination, nbytes in copying:
        expected[destination : destination + nbytes] = original[source : source + nbytes]
    wanted, sums = np.zeros((4, 2), np.uint64), np.zeros((4, 2), np.uint64)
    core.digest_rows(rows_at(expected.ctypes.data, digesting, 4), wanted, seed)
    table = rows_at(found.ctypes.data, [(to, nbytes, start) for start, to, nbytes in copying], 3)
    moved = np.stack([table[:, 2] + np.uint64(original.ctypes.data), table[:, 0], table[:, 1]], axis=1)
    fused = fuse(np.ascontiguousarray(moved), rows_at(found.ctypes.data, digesting, 4))
    core.digest_copy(fused.both, sums, seed)
    for source, destination, nbytes in fused.copies.tolist():
        core.copy(destination, source, nbytes)
    core.digest_rows(fused.digests, sums, seed)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sums, wanted)


def test_what_is_digested_for_one_image_is_read_once_and_no_byte_twice():
    copying = np.array([(100, 1000, 50), (500, 1050, 50)], np.uint64)
    digesting = np.array([(1000, 100, 4096, 0), (1000, 100, 9000, 1)], np.uint64)
    fused = fuse(copying, digesting)
    assert fused.both.tolist() == [[100, 1000, 50, 4096, 0], [500, 1050, 50, 4146, 0]]
    assert fused.copies.tolist() == []
    assert fused.digests.tolist() == [[1000, 100, 9000, 1]]


def rows_at(base, rows, columns):
    """Rows whose first column is an offset, as addresses."""
    table = np.array(rows, np.uint64).reshape(-1, columns)
    table[:, 0] += np.uint64(base)
    return table

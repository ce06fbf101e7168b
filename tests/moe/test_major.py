"""Expert-major order is by expert, row and k, padded to the alignment, as a slow and obvious version has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import ConfigError, RangeError
from raynixl.moe.major import expert_major
from raynixl.native import load


@pytest.fixture(params=[True, False], ids=["core", "twin"])
def native(request):
    return load(native=request.param)


def obvious(row_ids, experts, alignment):
    """The same by lists."""
    places, offsets, counts, position = [], [0], [], {}
    for expert in range(experts):
        mine = [(row, k) for row, ids in enumerate(row_ids) for k, one in enumerate(ids) if one == expert]
        for pair in mine:
            position[pair] = len(places)
            places.append(pair)
        counts.append(len(mine))
        while len(places) % alignment:
            places.append((-1, -1))
        offsets.append(len(places))
    return places, offsets, counts, [position[pair] for pair in sorted(position)]


def check(row_ids, experts, alignment):
    major = expert_major(row_ids, experts, alignment)
    places, offsets, counts, positions = obvious(row_ids.tolist(), experts, alignment)
    assert list(zip(major.rows.tolist(), major.slots_k.tolist(), strict=True)) == places
    assert major.offsets.tolist() == offsets
    assert major.counts.tolist() == counts
    assert major.positions.tolist() == positions
    assert major.pairs.tolist() == np.flatnonzero(row_ids.ravel() >= 0).tolist()
    assert (major.counts.dtype, major.offsets.dtype) == (np.int64, np.int64)
    assert {one.dtype for one in (major.rows, major.slots_k, major.positions, major.pairs)} == {np.dtype(np.int32)}
    return major


def ids(rows, topk=2):
    return np.array(rows, np.int32).reshape(-1, topk)


@pytest.mark.parametrize("alignment", [1, 3, 128])
@pytest.mark.parametrize(
    ("row_ids", "experts"),
    [
        (ids([[1, 0], [-1, 1], [0, 2]]), 3),
        (ids([[1, 1], [1, 1]]), 2),
        (ids([[-1, -1], [-1, -1]]), 2),
        (ids([]), 3),
        (ids([[-1, -1]]), 0),
        (ids([[0], [0], [0]], 1), 1),
        (ids([], 22), 2),
        (np.zeros((3, 0), np.int32), 2),
        (ids([[4, -1]]), 5),
    ],
    ids=["mixed", "duplicates", "nobody", "no rows", "no experts", "top-1", "no rows of 22", "top-0", "the last alone"],
)
def test_the_order_is_that_of_the_obvious_version(row_ids, experts, alignment):
    check(row_ids, experts, alignment)


def test_an_order_looks_like_this():
    major = expert_major(ids([[1, 0], [-1, 1], [0, 2]]), 3, 2)
    assert major.counts.tolist() == [2, 2, 1]
    assert major.offsets.tolist() == [0, 2, 4, 6]
    assert major.rows.tolist() == [0, 2, 0, 1, 2, -1]
    assert major.slots_k.tolist() == [1, 0, 0, 1, 1, -1]
    assert major.positions.tolist() == [2, 0, 3, 1, 4]
    assert major.padded == 6


@pytest.mark.parametrize("experts", [1, 255, 256, 257, 65_536, 65_537])
def test_any_number_of_experts_is_sorted_rightly(experts):
    rng = np.random.default_rng(experts)
    row_ids = rng.integers(max(-1, experts - 300), experts, (40, 3)).astype(np.int32)
    major = expert_major(row_ids, experts, 1)
    pairs = [(one, row, k) for row, some in enumerate(row_ids.tolist()) for k, one in enumerate(some) if one >= 0]
    assert list(zip(major.rows.tolist(), major.slots_k.tolist(), strict=True)) == [pair[1:] for pair in sorted(pairs)]


@given(st.data(), st.integers(0, 9), st.integers(1, 5), st.integers(1, 9))
def test_any_order_is_that_of_the_obvious_version(data, experts, topk, alignment):
    one = st.integers(-1, experts - 1)
    rows = data.draw(st.lists(st.lists(one, min_size=topk, max_size=topk), max_size=20))
    major = check(ids(rows, topk), experts, alignment)
    assert (major.offsets % alignment == 0).all()


def test_ids_that_are_a_view_are_read_as_they_lie():
    wide = np.arange(24, dtype=np.int32).reshape(6, 4) % 3
    check(wide[::2, 1:3], 3, 1)


def test_an_id_of_no_local_expert_is_refused():
    with pytest.raises(RangeError, match="expert 3 of 3"):
        expert_major(ids([[0, 3]]), 3)
    with pytest.raises(RangeError, match="expert 0 of 0"):
        expert_major(ids([[0, -1]]), 0)


@pytest.mark.parametrize("alignment", [0, -1])
def test_an_alignment_below_one_is_refused(alignment):
    with pytest.raises(ConfigError):
        expert_major(ids([[0, 1]]), 2, alignment)


@pytest.mark.parametrize("nbytes", [1, 7, 64, 14_336])
@pytest.mark.parametrize("alignment", [1, 16])
def test_rows_are_gathered_to_their_places_and_padding_is_zeroed(native, nbytes, alignment):
    rng = np.random.default_rng(nbytes)
    row_ids = rng.integers(-1, 5, (37, 3)).astype(np.int32)
    source = rng.integers(1, 256, (37, nbytes), dtype=np.uint8)
    major = expert_major(row_ids, 5, alignment)
    out = np.full((major.padded, nbytes), 0xEE, np.uint8)
    major.gather(source, out, native)
    expected = np.where(major.rows[:, None] >= 0, source[major.rows], 0)
    assert out.tobytes() == expected.astype(np.uint8).tobytes()


def test_rows_that_lie_apart_are_gathered(native):
    source = np.random.default_rng(0).integers(1, 256, (10, 40), dtype=np.uint8)[::2, 3:19]
    major = expert_major(ids([[0, 1], [1, -1], [0, 0], [-1, -1], [2, 1]]), 3, 4)
    out = np.full((major.padded, 16), 0xEE, np.uint8)
    major.gather(source, out, native)
    assert out.tobytes() == np.where(major.rows[:, None] >= 0, source[major.rows], 0).astype(np.uint8).tobytes()


@pytest.mark.parametrize(("rows", "nbytes"), [(0, 64), (3, 0)])
def test_nothing_is_gathered_from_nothing(native, rows, nbytes):
    major = expert_major(np.full((rows, 2), 1, np.int32), 2, 8)
    major.gather(np.zeros((rows, nbytes), np.uint8), np.zeros((major.padded, nbytes), np.uint8), native)


def test_weights_go_to_the_places_of_their_pairs_and_padding_has_none():
    row_ids = ids([[1, 0], [-1, 1], [0, 2]])
    weights = np.array([[0.1, 0.2], [9.0, 0.4], [0.5, 0.6]], np.float32)
    assert expert_major(row_ids, 3, 2).weights(weights).tolist() == np.float32([0.2, 0.5, 0.1, 0.4, 0.6, 0.0]).tolist()

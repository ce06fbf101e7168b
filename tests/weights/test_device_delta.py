"""Deltas made and applied on a device are those of the host: equal blobs, equal results, equal refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import IntegrityError
from raynixl.weights.bank import HostBank
from raynixl.weights.delta import SEGMENT_NBYTES, apply, encode_rows
from raynixl.weights.device_delta import DeviceChanges, apply_blobs

torch = pytest.importorskip("torch")
NBYTES = 8192


def flats(arrays):
    return [torch.from_numpy(array) for array in arrays]


def on_device(old, new, rows, itemsize, limit):
    return DeviceChanges(flats(old), flats(new)).encode(rows, itemsize, limit)


def on_host(old, new, rows, itemsize, limit):
    return HostBank(new).encoder(HostBank(old), threads=1)(rows, itemsize, limit)


@st.composite
def versions(draw):
    """Two versions of two arenas, and disjoint rows of them at ascending positions, far apart or close."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = [rng.integers(0, 256, NBYTES, np.uint8) for _ in range(2)]
    new = [array.copy() for array in old]
    for array in new:
        array[rng.integers(0, NBYTES, draw(st.integers(0, 60)))] ^= 1
    rows, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        offset = itemsize * draw(st.integers(0, NBYTES // itemsize - 1))
        nbytes = itemsize * draw(st.integers(0, (NBYTES - offset) // itemsize))
        position += itemsize * draw(st.integers(0, 300) | st.integers(0, 70_000) | st.integers(0, 2**36))
        rows.append((offset, draw(st.integers(0, 1)), nbytes, position))
        position += nbytes
    return old, new, np.array(rows, np.int64).reshape(-1, 4), itemsize


@given(versions(), st.integers(0, 3000))
def test_blobs_are_those_of_the_host(case, limit):
    old, new, rows, itemsize = case
    assert on_device(old, new, rows, itemsize, limit) == on_host(old, new, rows, itemsize, limit)


def test_long_rows_are_cut_as_on_the_host():
    old = np.zeros(SEGMENT_NBYTES + 5000, np.uint8)
    new = old.copy()
    new[[5, 100_000, SEGMENT_NBYTES - 2, SEGMENT_NBYTES, SEGMENT_NBYTES + 4999]] = 1
    rows = np.array([(0, 0, len(old), 0)], np.int64)
    blob = on_device([old], [new], rows, 2, 1 << 20)
    assert blob == on_host([old], [new], rows, 2, 1 << 20)
    apply_blobs(np.frombuffer(blob, np.uint8), flats([old]))
    assert np.array_equal(old, new)


def test_many_changes_are_no_delta():
    old, new = np.zeros(1000, np.uint8), np.ones(1000, np.uint8)
    assert on_device([old], [new], np.array([(0, 0, 1000, 0)], np.int64), 1, 10_000) is None


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, NBYTES // 16 - 1)), unique=True), st.sampled_from([1, 2, 16])
)
def test_blobs_of_the_host_are_applied_as_there(places, itemsize):
    old = [np.zeros(NBYTES, np.uint8) for _ in range(3)]
    new = [array.copy() for array in old]
    for arena, item in places:
        new[arena][item * itemsize] = 1 + item % 255
    rows = np.array([(old[n].ctypes.data, new[n].ctypes.data, NBYTES, n << 48) for n in range(3)], np.uint64)
    blob = np.frombuffer(encode_rows(rows, itemsize=itemsize, limit=1 << 20), np.uint8)
    apply_blobs(blob, flats(old))
    assert all(np.array_equal(one, other) for one, other in zip(old, new, strict=True))


@given(st.data())
def test_a_damaged_blob_is_refused_as_on_the_host_or_does_the_same(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    old, new = (np.zeros(NBYTES, np.uint8) for _ in range(2))
    new[rng.integers(0, NBYTES, 30)] = 1
    rows = np.array([(old.ctypes.data, new.ctypes.data, NBYTES, 0)], np.uint64)
    blob = np.frombuffer(encode_rows(rows, itemsize=2, limit=1 << 20), np.uint8).copy()
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(24, len(blob) - 1))] = data.draw(st.integers(0, 255))
    results = []
    for run in (lambda array: apply(blob, [array]), lambda array: apply_blobs(blob, flats([array]))):
        array = old.copy()
        try:
            run(array)
            results.append(array.tobytes())
        except IntegrityError:
            assert not array.any()
            results.append("refused")
    assert results[0] == results[1]

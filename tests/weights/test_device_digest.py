"""A device gives the digests that the host gives, wherever bytes begin and end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.weights.device_digest import digest_device_rows
from raynixl.weights.digest import digest_rows

torch = pytest.importorskip("torch")
SPACE = 40_000


@pytest.fixture(scope="module")
def memory():
    return np.random.default_rng(3).integers(0, 256, 17 << 20, np.uint8)


def on_host(memory, rows, seed):
    rows = rows.copy()
    rows[:, 0] += np.uint64(memory.ctypes.data)
    out = np.ones((3, 2), np.uint64)
    digest_rows(rows, out, seed=seed)
    return out


def on_device(data, rows, seed):
    out = np.ones((3, 2), np.uint64)
    digest_device_rows(data, rows, out, seed=seed)
    return out


row = st.tuples(
    st.integers(0, SPACE), st.integers(0, 20) | st.integers(0, SPACE), st.integers(0, 2**63), st.integers(0, 2)
)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(row, max_size=8), seed=st.integers(0, 2**64 - 1))
def test_it_is_that_of_the_host(memory, rows, seed):
    rows = np.array(rows, np.uint64).reshape(-1, 4)
    assert np.array_equal(on_device(torch.from_numpy(memory), rows, seed), on_host(memory, rows, seed))


def test_many_pieces_and_tensors_that_begin_anywhere(memory):
    for start, position in [(0, 0), (4, 8192), (3, 4096), (1, 4095)]:
        data = torch.from_numpy(memory)[start:]
        rows = np.array([(0, len(data), position, 1)], np.uint64)
        assert np.array_equal(on_device(data, rows, 5), on_host(memory[start:], rows, 5))


@pytest.mark.parametrize(
    "row", [(0, 8, 0, 3), (0, 101, 0, 0), (100, 1, 0, 0), (2**64 - 1, 2, 0, 0), (0, 2**64 - 1, 0, 0)]
)
def test_rows_outside_are_refused(row):
    out = np.zeros((3, 2), np.uint64)
    with pytest.raises(ValueError):  # noqa: PT011 - as the host's cores do
        digest_device_rows(torch.ones(100, dtype=torch.uint8), np.array([(0, 50, 0, 0), row], np.uint64), out, seed=1)
    assert not out.any()

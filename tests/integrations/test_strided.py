"""Strided: its runs and slices are those of numpy, for any shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import ConfigError
from raynixl.integrations.strided import Strided, contiguous


@st.composite
def arrays_and_indices(draw):
    """A view of a flat array of numbered elements, and an index into it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    base = np.arange(int(np.prod(shape, dtype=int)) + 7, dtype=np.int32)
    view = base[3 : 3 + int(np.prod(shape, dtype=int))].reshape(shape)
    view = view.transpose(draw(st.permutations(range(len(shape)))))
    index = []
    for size in view.shape[: draw(st.integers(0, view.ndim))]:
        if draw(st.booleans()):
            index.append(draw(st.integers(-size, size - 1)))
        else:
            index.append(slice(draw(st.integers(0, size)), draw(st.integers(0, size)), draw(st.integers(1, 3))))
    return base, view, tuple(index)


@given(arrays_and_indices())
def test_runs_of_a_slice_are_its_elements_in_order(case):
    base, view, index = case
    offset = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    cut = Strided(offset, view.shape, view.strides, 4)[index]
    wanted = view[index]
    assert (cut.shape, cut.nbytes) == (np.shape(wanted), np.size(wanted) * 4)
    if cut.nbytes:
        offsets, run = cut.runs()
        raw = base.tobytes()
        assert (
            b"".join(raw[start : start + run] for start in offsets.tolist()) == np.ascontiguousarray(wanted).tobytes()
        )


def test_a_contiguous_tensor_is_one_run():
    offsets, run = contiguous((3, 4, 5), 2, 10).runs()
    assert (offsets.tolist(), run) == ([10], 120)
    rows, row = contiguous((3, 4, 5), 2)[1:3, 2].runs()
    assert (rows.tolist(), row) == ([60, 100], 10)


@pytest.mark.parametrize("index", [(0, 0, 0), 3, -4, slice(None, None, -1), "x", 1.5, None])
def test_an_index_that_fits_not_is_refused(index):
    with pytest.raises(ConfigError):
        contiguous((3, 4), 2)[index]

"""Taking ids in both cores: copied, widened, counted, and refused where there is no such expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import address_of

from raynixl.native import Native

pytestmark = pytest.mark.pure

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    rows=st.integers(0, 9),
    topk=st.integers(1, 5),
    experts=st.integers(1, 6),
    is_wide=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ids_are_copied_widened_and_counted(
    core: Native, rows: int, topk: int, experts: int, is_wide: bool, in_place: bool, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(-1, experts, (rows, topk)).astype(np.int32)
    before = ids.copy()
    copy = ids if in_place else np.full((rows, topk), 77, np.int32)
    wide = np.full((rows, topk), 77, np.int64) if is_wide else None
    counts = np.full(experts, 77, np.int64)
    core.take_ids(address_of(ids), copy, wide, counts)
    assert np.array_equal(ids, before)
    assert np.array_equal(copy, before)
    assert wide is None or np.array_equal(wide, before)
    assert counts.tolist() == [int((before == expert).sum()) for expert in range(experts)]


@pytest.mark.parametrize("wrong", [-2, 3, -(1 << 31), (1 << 31) - 1])
def test_an_id_of_no_expert_is_refused(core: Native, wrong: int) -> None:
    ids = np.array([[0, 1], [2, wrong]], np.int32)
    with pytest.raises(ValueError, match=f"expert {wrong} of 3"):
        core.take_ids(address_of(ids), np.empty((2, 2), np.int32), None, np.empty(3, np.int64))


def test_outputs_of_another_shape_are_refused(core: Native) -> None:
    ids = np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match="shape"):
        core.take_ids(address_of(ids), ids.copy(), np.empty((2, 3), np.int64), np.empty(3, np.int64))

"""Placements cut tensors as torch does: chunks, heads that stay whole, flat runs, owners."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.errors import ConfigError
from raynixl.weights.placement import Flat, Mesh, Owner, Replicate, Shard, boxes, flat_boxes

pytestmark = pytest.mark.pure

ONE = Mesh((("tp", 4),))


def spans(length, placement, mesh=ONE):
    found = boxes((length, 3), mesh, (placement,))
    return list(zip(found.start[:, 0].tolist(), found.size[:, 0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (8, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (5, [(0, 2), (2, 2), (4, 1), (5, 0)]),
        (2, [(0, 1), (1, 1), (2, 0), (2, 0)]),
        (0, [(0, 0)] * 4),
    ],
)
def test_chunks_are_those_of_torch(length, expected):
    assert spans(length, Shard(0)) == expected


def test_heads_that_are_fewer_than_ranks_go_to_several():
    assert spans(10, Shard(0, units=2)) == [(0, 5), (0, 5), (5, 5), (5, 5)]


def test_heads_are_not_split():
    assert spans(15, Shard(0, units=5)) == [(0, 6), (6, 6), (12, 3), (15, 0)]


def test_an_owner_has_all_and_others_nothing():
    found = boxes((2, 3), ONE, (Owner(2),))
    assert found.present.tolist() == [False, False, True, False]


def test_a_flat_run_counts_from_where_its_tensor_lies_in_the_flat_parameter():
    found = boxes((2, 3), ONE, (Flat(start=3, total=10),))
    assert found.first.tolist() == [0, 0, 3, 6]
    assert found.length.tolist() == [0, 3, 3, 0]


def test_placements_are_applied_from_left_to_right():
    mesh = Mesh((("tp", 2), ("fsdp", 2)))
    found = boxes((6, 1), mesh, (Shard(0), Shard(0)))
    assert found.start[:, 0].tolist() == [0, 2, 3, 5]
    assert found.size[:, 0].tolist() == [2, 1, 2, 1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_of_a_flat_run_are_that_run(shape, data):
    count = int(np.prod(shape, dtype=int))
    first = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count - first))
    whole, seen = np.arange(count).reshape(shape), []
    for start, size, at in flat_boxes(shape, first, length):
        assert at == len(seen)
        seen += whole[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))].reshape(-1).tolist()
    assert seen == list(range(first, first + length))
    assert len(flat_boxes(shape, first, length)) <= max(1, 2 * len(shape) - 1)


WRONG = {
    "too few placements": ((4, 4), ()),
    "no such dimension": ((4, 4), (Shard(2),)),
    "a scalar is split": ((), (Shard(0),)),
    "no such owner": ((4, 4), (Owner(4),)),
    "heads that do not divide": ((5, 4), (Shard(0, units=2),)),
    "heads that do not divide the ranks": ((6, 4), (Shard(0, units=3),)),
    "a flat parameter that is too short": ((4, 4), (Flat(0, 15),)),
}


@pytest.mark.parametrize("case", WRONG)
def test_placements_that_do_not_fit_are_refused(case):
    shape, placements = WRONG[case]
    with pytest.raises(ConfigError):
        boxes(shape, ONE, placements)


def test_a_mesh_knows_its_ranks():
    mesh = Mesh((("dp", 2), ("tp", 3)))
    assert [mesh.rank(at) for at in mesh.coordinates()] == list(range(6))
    assert str(mesh) == "dp=2,tp=3"
    assert boxes((4,), mesh, (Replicate(), Replicate())).size.tolist() == [[4]] * 6
    for wrong in ((0,), (0, 3), (-1, 0)):
        with pytest.raises(ConfigError):
            mesh.rank(wrong)
    with pytest.raises(ConfigError):
        Mesh((("tp", 0),))

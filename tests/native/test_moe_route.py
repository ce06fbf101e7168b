"""Routing in both cores: one row for each token and rank, in order, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raynixl.native import Native

pytestmark = pytest.mark.pure

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Routed:
    """What a call of `route` has filled."""

    total: int
    order: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    row_ids: np.ndarray
    row_weights: np.ndarray | None

    def rows(self) -> list[tuple]:
        """Each row: its token, its local ids, its weights."""
        weights = [None] * self.total if self.row_weights is None else self.row_weights.tolist()
        return list(zip(self.order.tolist(), self.row_ids.tolist(), weights, strict=False))[: self.total]


def routed(core: Native, ids: np.ndarray, weights: np.ndarray | None, holder: list[int], ranks: int) -> Routed:
    """Route with room to spare; experts are numbered on each rank as they come."""
    held = np.array(holder, np.int32)
    local = local_of(holder)
    capacity = ids.shape[0] * min(ids.shape[1], ranks) + 3
    out = Routed(
        0,
        np.full(capacity, -7, np.int32),
        np.full(ranks, -7, np.int64),
        np.full(len(ids) + 1, -7, np.int64),
        np.full(capacity, -7, np.int32),
        np.full((capacity, ids.shape[1]), -7, np.int32),
        None if weights is None else np.full((capacity, ids.shape[1]), -7, np.float32),
    )
    out.total = core.route(
        ids, weights, held, local, out.order, out.counts, out.starts, out.positions, out.row_ids, out.row_weights
    )
    return out


def local_of(holder: list[int]) -> np.ndarray:
    """The number of each expert at its rank."""
    return np.array([holder[:e].count(rank) if rank >= 0 else -1 for e, rank in enumerate(holder)], np.int32)


def expected_rows(ids: np.ndarray, weights: np.ndarray | None, holder: list[int], ranks: int) -> list[tuple]:
    """The rows by their definition."""
    local = local_of(holder).tolist()
    rows = []
    for rank in range(ranks):
        for token, chosen in enumerate(ids.tolist()):
            here = [expert >= 0 and holder[expert] == rank for expert in chosen]
            if not any(here):
                continue
            row_ids = [local[expert] if mine else -1 for expert, mine in zip(chosen, here, strict=True)]
            row_weights = None
            if weights is not None:
                row_weights = [w if mine else 0.0 for w, mine in zip(weights[token].tolist(), here, strict=True)]
            rows.append((token, row_ids, row_weights))
    return rows


def check(found: Routed, ids: np.ndarray, weights: np.ndarray | None, holder: list[int], ranks: int) -> None:
    """Compare all that came out with the definition."""
    rows = expected_rows(ids, weights, holder, ranks)
    assert found.rows() == rows
    assert found.total == len(rows) == found.counts.sum()
    bounds = np.concatenate([[0], np.cumsum(found.counts)]).tolist()
    for rank in range(ranks):
        tokens = found.order[bounds[rank] : bounds[rank + 1]]
        assert (np.diff(tokens) > 0).all()
    for token in range(len(ids)):
        mine = found.positions[found.starts[token] : found.starts[token + 1]].tolist()
        assert mine == [j for j, row in enumerate(rows) if row[0] == token]
    assert found.starts[0] == 0
    assert (found.order[found.total :] == -7).all()
    assert (found.row_ids[found.total :] == -7).all()


@quick
@given(data=st.data(), tokens=st.integers(0, 30), topk=st.integers(1, 9), ranks=st.integers(1, 6))
def test_each_rank_gets_each_of_its_tokens_once(
    core: Native, data: st.DataObject, tokens: int, topk: int, ranks: int
) -> None:
    holder = data.draw(st.lists(st.integers(-1, ranks - 1), min_size=1, max_size=20))
    ids = data.draw(st.lists(st.integers(-1, len(holder) - 1), min_size=tokens * topk, max_size=tokens * topk))
    array = np.array(ids, np.int64).reshape(tokens, topk)
    weights = None
    if data.draw(st.booleans()):
        weights = np.random.default_rng(tokens).random((tokens, topk), np.float32)
    check(routed(core, array, weights, holder, ranks), array, weights, holder, ranks)


@pytest.mark.parametrize(
    ("ids", "holder", "ranks", "counts"),
    [
        ([], [0], 1, [0]),
        ([[-1, -1]], [0, 1], 2, [0, 0]),
        ([[0, 1], [1, 0]], [0, 1], 2, [2, 2]),
        ([[1, 1], [1, 1]], [0, 1], 2, [0, 2]),
        ([[0, 3], [3, 0]], [0, -1, 1, 1], 2, [2, 2]),
        ([[1, 1], [0, 1]], [0, -1], 3, [1, 0, 0]),
        ([[0, 1, 2, 3]] * 3, [3, 2, 1, 0], 5, [3, 3, 3, 3, 0]),
    ],
    ids=["no token", "no expert", "all to both", "twice the same", "some nowhere", "one rank has none", "descending"],
)
def test_known_routes(core: Native, ids: list, holder: list[int], ranks: int, counts: list[int]) -> None:
    array = np.array(ids, np.int64).reshape(len(ids), -1 if ids else 2)
    found = routed(core, array, None, holder, ranks)
    assert found.counts.tolist() == counts
    check(found, array, None, holder, ranks)


def test_both_cores_fill_the_same(both: tuple[Native, Native]) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(-1, 256, (4096, 8))
    weights = random.random((4096, 8), np.float32)
    holder = (np.arange(256) // 32).tolist()
    first, second = (routed(core, ids, weights, holder, 8) for core in both)
    assert first.total == second.total
    for name in ("order", "counts", "starts", "positions", "row_ids", "row_weights"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("bad", [-2, 4, 1 << 40, -(1 << 63)])
def test_ids_of_no_expert_are_named(core: Native, bad: int) -> None:
    ids = np.array([[0, 1], [3, bad], [bad, 0]], np.int64)
    with pytest.raises(ValueError, match=f"token 1 names expert {bad} of 4"):
        routed(core, ids, None, [0, 0, 1, 1], 2)


@pytest.mark.parametrize("rank", [-2, 2])
def test_a_holder_that_is_no_rank_is_refused(core: Native, rank: int) -> None:
    with pytest.raises(ValueError, match=f"expert 1 is held by rank {rank} of 2"):
        routed(core, np.zeros((1, 1), np.int64), None, [0, rank], 2)


def test_too_little_room_is_refused(core: Native) -> None:
    ids = np.array([[0, 1], [0, 1]], np.int64)
    arrays = np.zeros(3, np.int32), np.zeros(2, np.int64), np.zeros(3, np.int64), np.zeros(3, np.int32)
    held = np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match="4 rows do not fit into 3"):
        core.route(ids, None, held, held, *arrays, np.zeros((3, 2), np.int32), None)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.zeros((4, 2), np.int32)},
        {"ids": np.zeros((4, 4), np.int64)[:, ::2]},
        {"weights": np.zeros((4, 2), np.float64)},
        {"holder": np.zeros(3, np.int64)},
        {"order": np.zeros((8, 1), np.int32)},
        {"row_weights": np.zeros(16, np.float32)},
    ],
    ids=["ids of 32 bits", "strided ids", "wide weights", "wide holders", "order in two dimensions", "flat weights"],
)
def test_arrays_of_another_form_are_refused(core: Native, change: dict) -> None:
    with pytest.raises(TypeError):
        core.route(*(good_arguments() | change).values())


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.zeros((3, 2), np.float32)},
        {"weights": None},
        {"row_weights": None},
        {"local": np.zeros(2, np.int32)},
        {"starts": np.zeros(4, np.int64)},
        {"positions": np.zeros(7, np.int32)},
        {"row_ids": np.zeros((7, 2), np.int32)},
        {"row_ids": np.zeros((8, 3), np.int32)},
        {"row_weights": np.zeros((7, 2), np.float32)},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(core: Native, change: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        core.route(*(good_arguments() | change).values())


def test_good_arguments_are_taken(core: Native) -> None:
    assert core.route(*good_arguments().values()) == 4


def good_arguments() -> dict:
    """Arguments that fit, by name and in order."""
    return {
        "ids": np.zeros((4, 2), np.int64),
        "weights": np.zeros((4, 2), np.float32),
        "holder": np.zeros(3, np.int32),
        "local": np.zeros(3, np.int32),
        "order": np.zeros(8, np.int32),
        "counts": np.zeros(2, np.int64),
        "starts": np.zeros(5, np.int64),
        "positions": np.zeros(8, np.int32),
        "row_ids": np.zeros((8, 2), np.int32),
        "row_weights": np.zeros((8, 2), np.float32),
    }

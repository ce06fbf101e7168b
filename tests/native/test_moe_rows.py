"""Putting rows in both cores: every byte where it belongs, none elsewhere, and gates that close."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import KIB, MIB, address_of, random_bytes

from raynixl.native import DONE, LOST, STALE, Gate, Native

pytestmark = pytest.mark.pure

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GUARD = 192

lengths = st.one_of(
    st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 14_336, 65_536, 65_537, 256 * KIB - 1, 300 * KIB])
)


def put(core: Native, source: np.ndarray, index: np.ndarray | None, target: np.ndarray, count: int, **more: int) -> int:
    """Put rows of a two-dimensional array of bytes to where `target` begins, plus `skew`."""
    gates: list[Gate] = []
    dst = address_of(target) + more.get("skew", 0)
    return core.put_rows(address_of(source), source.strides[0], source.shape[1], index, dst, gates, count)


@quick
@given(
    nbytes=lengths,
    gap=st.integers(0, 70),
    skews=st.tuples(st.integers(0, 65), st.integers(0, 65)),
    index=st.none() | st.lists(st.integers(-1, 6), max_size=12),
)
def test_rows_land_end_to_end_and_nothing_else_changes(
    core: Native, nbytes: int, gap: int, skews: tuple[int, int], index: list[int] | None
) -> None:
    memory = random_bytes(7 * (nbytes + gap) + skews[0])
    source = memory[skews[0] :].reshape(7, nbytes + gap)[:, :nbytes]
    which = list(range(7)) if index is None else index
    expected = np.stack([source[i] if i >= 0 else np.zeros(nbytes, np.uint8) for i in which] or [source[0]])[
        : len(which)
    ]
    target = random_bytes(GUARD + skews[1] + len(which) * nbytes + GUARD, seed=1)
    before = target.copy()
    rows = None if index is None else np.array(index, np.int32)
    assert put(core, source, rows, target, len(which), skew=GUARD + skews[1]) == DONE
    before[GUARD + skews[1] : len(before) - GUARD] = expected.reshape(-1)
    assert np.array_equal(target, before)


@pytest.mark.parametrize(
    ("nbytes", "count"), [(14_336, 1024), (4096, 3000), (4095, 3000), (1, 70_000), (3 * MIB + 1, 6)]
)
def test_large_totals_land_whole(core: Native, nbytes: int, count: int) -> None:
    source = random_bytes(5 * nbytes).reshape(5, nbytes)
    index = np.random.default_rng(0).integers(-1, 5, count, dtype=np.int32)
    target = np.ones(count * nbytes + 1, np.uint8)
    assert put(core, source, index, target, count, skew=1) == DONE
    expected = np.concatenate([source, np.zeros((1, nbytes), np.uint8)])[index]
    assert np.array_equal(target[1:].reshape(count, nbytes), expected)
    assert target[0] == 1


def test_an_index_may_be_longer_than_the_rows(core: Native) -> None:
    source, target = random_bytes(40).reshape(4, 10), np.zeros(30, np.uint8)
    assert put(core, source, np.array([3, 0, 2, 2], np.int32), target, 2) == DONE
    assert np.array_equal(target[:20].reshape(2, 10), source[[3, 0]])
    assert not target[20:].any()
    with pytest.raises(ValueError, match="shorter"):
        put(core, source, np.array([3], np.int32), target, 2)
    with pytest.raises(TypeError):
        put(core, source, np.array([3, 0], np.int64), target, 2)


def test_a_stride_of_zero_repeats_a_row(core: Native) -> None:
    source, target = random_bytes(100), np.zeros(500, np.uint8)
    assert core.put_rows(address_of(source), 0, 100, None, address_of(target), [], 5) == DONE
    assert np.array_equal(target.reshape(5, 100), np.tile(source, (5, 1)))


# Gates


def test_a_closed_gate_refuses_and_nothing_is_put(core: Native) -> None:
    source, target = random_bytes(64), np.zeros(64, np.uint8)
    gates = [core.Gate(), core.Gate(), core.Gate()]
    gates[1].close(STALE)
    assert core.put_rows(address_of(source), 8, 8, None, address_of(target), gates, 8) == STALE
    assert not target.any()
    assert [gate.inflight for gate in gates] == [0, 0, 0]


def test_gates_are_left_at_the_end(core: Native) -> None:
    source, target, gate = random_bytes(64), np.zeros(64, np.uint8), core.Gate()
    assert core.put_rows(address_of(source), 8, 8, None, address_of(target), (gate, gate), 8) == DONE
    assert np.array_equal(source, target)
    assert gate.inflight == 0


def test_what_is_not_a_gate_is_refused(core: Native) -> None:
    source, target, gate = random_bytes(64), np.zeros(64, np.uint8), core.Gate()
    with pytest.raises((TypeError, RuntimeError)):
        core.put_rows(address_of(source), 8, 8, None, address_of(target), [gate, object()], 8)  # type: ignore[list-item]
    assert gate.inflight == 0


def test_closing_a_gate_stops_who_is_inside(core: Native) -> None:
    source, target, gate = random_bytes(8 * MIB), np.zeros(64 * MIB, np.uint8), core.Gate()
    codes: list[int] = []

    def run() -> None:
        while not codes or codes[-1] == DONE:
            codes.append(core.put_rows(address_of(source), 0, source.nbytes, None, address_of(target), [gate], 8))

    thread = threading.Thread(target=run)
    thread.start()
    while gate.inflight == 0:
        pass
    gate.close(LOST)
    assert gate.drain(30.0)
    thread.join(30.0)
    assert codes[-1] == LOST
    assert gate.inflight == 0


@quick
@given(
    widths=st.lists(st.sampled_from([0, 1, 4, 32, 4097]), min_size=1, max_size=4),
    first=st.integers(0, 4),
    count=st.integers(0, 5),
    offset=st.integers(0, 3),
    is_indexed=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_fields_land_each_at_its_start_and_nothing_else_changes(
    core: Native, widths: list[int], first: int, count: int, offset: int, is_indexed: list[bool]
) -> None:
    index = np.array([3, -1, 0, 8, 8, 1, 2, -1, 5], np.int32)
    sources = [random_bytes(9 * (nbytes + 3), seed=nbytes).reshape(9, nbytes + 3)[:, :nbytes] for nbytes in widths]
    starts = np.cumsum([GUARD] + [8 * nbytes + GUARD for nbytes in widths[:-1]]).astype(np.uint64)
    target = random_bytes(int(starts[-1]) + 8 * widths[-1] + GUARD, seed=1)
    expected = target.copy()
    table = []
    for source, start, indexed in zip(sources, starts.tolist(), is_indexed, strict=False):
        nbytes = source.shape[1]
        table.append((address_of(source), source.strides[0], nbytes, address_of(index) if indexed else 0))
        for row in range(count):
            which = int(index[first + row]) if indexed else first + row
            at = start + (offset + row) * nbytes
            expected[at : at + nbytes] = source[which] if which >= 0 else 0
    fields = np.array(table, np.uint64)
    assert core.put_fields(fields, first, starts, address_of(target), offset, [], count) == DONE
    assert np.array_equal(target, expected)


def test_fields_are_refused_whole_by_a_gate_that_is_closed_and_without_a_start_for_each(core: Native) -> None:
    source, target, gate = random_bytes(64), np.zeros(64, np.uint8), core.Gate()
    fields, starts = np.array([[address_of(source), 8, 8, 0]], np.uint64), np.zeros(1, np.uint64)
    gate.close(STALE)
    assert core.put_fields(fields, 0, starts, address_of(target), 0, [gate], 8) == STALE
    assert not target.any()
    with pytest.raises(ValueError, match="start"):
        core.put_fields(fields, 0, np.zeros(2, np.uint64), address_of(target), 0, [], 8)
    with pytest.raises(ValueError, match="field"):
        core.put_fields(fields[:, :3].copy(), 0, starts, address_of(target), 0, [], 8)

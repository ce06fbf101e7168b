"""Finding and writing changed elements in both cores: which, as what bytes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import MIB, address_of, random_bytes

from raynixl.native import Native

pytestmark = pytest.mark.pure

ITEMSIZES = [1, 2, 4, 8, 16]
FAR = 1 << 40
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

itemsizes = st.sampled_from(ITEMSIZES)
counts = st.one_of(st.integers(0, 80), st.sampled_from([31, 32, 33, 255, 256, 4095, 4096, 4097, 20_000]))
places = st.integers(0, 300) | st.integers(0, 1 << 16)


def rows_of(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Rows of (address before, address after, nbytes, position)."""
    return np.array(rows, np.uint64).reshape(-1, 4)


def arenas_of(*arrays: np.ndarray) -> np.ndarray:
    """Arenas of (address, nbytes)."""
    return np.array([(address_of(one), one.nbytes) for one in arrays], np.uint64).reshape(-1, 2)


def raw(data: bytes) -> np.ndarray:
    """Bytes as an array."""
    return np.frombuffer(data, np.uint8)


def changed_at(before: np.ndarray, itemsize: int, elements: list[int]) -> np.ndarray:
    """A copy of which these elements have changed, each in one bit of its last byte."""
    after = before.copy()
    after[np.array(elements, np.intp) * itemsize + itemsize - 1] ^= 0x80
    return after


def encode(core: Native, before: np.ndarray, after: np.ndarray, itemsize: int, position: int = 0) -> tuple:
    """The delta between two whole arrays."""
    made = core.delta_encode(rows_of((address_of(before), address_of(after), before.nbytes, position)), itemsize, FAR)
    assert made is not None
    return made


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_gaps_and_values_are_as_written_down(core: Native, itemsize: int) -> None:
    before = random_bytes(140_000 * itemsize)
    elements = [0, 1, 254, 508, 763, 763 + 65_536, 763 + 65_536 + 65_537]
    after = changed_at(before, itemsize, elements)
    gaps, values = encode(core, before, after, itemsize)
    # 0, 0, 252, 253 (two bytes follow), 254, 65,535, 65,536 (four bytes follow)
    assert gaps == bytes.fromhex("00 00 fc fd fd00 fd fe00 fd ffff fe 00000100")
    assert values == b"".join(after[at * itemsize : (at + 1) * itemsize].tobytes() for at in elements)


def test_a_gap_of_any_width_is_written_and_read(core: Native) -> None:
    before = np.zeros(8, np.uint8)
    for number in (252, 253, 65_535, 65_536, 2**32 - 1, 2**32, 2**40):
        gaps, values = encode(core, before, changed_at(before, 8, [0]), 8, number * 8)
        assert len(gaps) == 1 + (number >= 253) * 2 + (number >= 2**16) * 2 + (number >= 2**32) * 4
        arenas = np.array([(4096, 1 << 46)], np.uint64)
        assert core.delta_apply(raw(gaps), raw(values), 8, arenas, write=False)
        arenas[0, 1] = number * 8 + 7
        assert not core.delta_apply(raw(gaps), raw(values), 8, arenas, write=False)


@quick
@given(data=st.data(), itemsize=itemsizes, skews=st.tuples(st.integers(0, 33), st.integers(0, 33)))
def test_what_changed_is_written_over_the_old(
    core: Native, data: st.DataObject, itemsize: int, skews: tuple[int, int]
) -> None:
    layout = data.draw(st.lists(st.tuples(places, counts), max_size=6))
    share = data.draw(st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]))
    total = sum(count for _, count in layout) * itemsize
    before, after = random_bytes(total + 33)[skews[0] :][:total], random_bytes(total + 33)[skews[1] :][:total]
    after[:] = before
    which = np.flatnonzero(np.random.default_rng(total).random(total // itemsize) < share)
    after[which * itemsize + which % itemsize] ^= 1
    rows, offset, position = [], 0, 0
    for gap, count in layout:
        position += gap * itemsize
        rows.append((address_of(before) + offset, address_of(after) + offset, count * itemsize, position))
        offset, position = offset + count * itemsize, position + count * itemsize
    made = core.delta_encode(rows_of(*rows), itemsize, FAR)
    assert made is not None
    assert made[1] == after.reshape(-1, itemsize)[which].tobytes()
    check_applied(core, made, itemsize, (rows, before, after))


def check_applied(core: Native, delta: tuple, itemsize: int, case: tuple) -> None:
    """Write a delta into an image that holds the old rows, and compare all its bytes."""
    rows, before, after = case
    image = random_bytes(rows[-1][3] + rows[-1][2] if rows else 0, seed=1)
    expected = image.copy()
    for a, _, nbytes, position in rows:
        start = a - address_of(before)
        image[position : position + nbytes] = before[start : start + nbytes]
        expected[position : position + nbytes] = after[start : start + nbytes]
    untouched = image.copy()
    arguments = raw(delta[0]), raw(delta[1]), itemsize, arenas_of(image)
    assert core.delta_apply(*arguments, write=False)
    assert np.array_equal(image, untouched)
    assert core.delta_apply(*arguments, write=True)
    assert np.array_equal(image, expected)


@quick
@given(itemsize=itemsizes, count=st.integers(0, 30_000), share=st.sampled_from([0.0, 0.0001, 0.01, 0.3, 1.0]))
def test_compiled_and_twin_make_the_same_bytes(
    both: tuple[Native, Native], itemsize: int, count: int, share: float
) -> None:
    before = random_bytes(count * itemsize)
    after = before.copy()
    which = np.flatnonzero(np.random.default_rng(count).random(len(before)) < share / itemsize)
    after[which] ^= 1
    half = count // 2 * itemsize
    a, b = address_of(before), address_of(after)
    rows = rows_of((a, b, half, 0), (a + half, b + half, len(before) - half, (1 << 48) + 16 * count))
    assert both[0].delta_encode(rows, itemsize, FAR) == both[1].delta_encode(rows, itemsize, FAR)


def test_bits_count_not_values(core: Native) -> None:
    before = np.array([0.0, np.nan, 1.0, np.nan], np.float32).view(np.uint8)
    after = np.array([-0.0, np.nan, 1.0, -np.nan], np.float32).view(np.uint8)
    _, values = encode(core, before, after, 4)
    assert values == after[:4].tobytes() + after[12:].tobytes()


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_arenas_are_told_apart(core: Native, itemsize: int) -> None:
    before = np.zeros(4 * itemsize, np.uint8)
    after = changed_at(before, itemsize, [0, 3])
    position = (2 << 48) + itemsize
    gaps, values = encode(core, before, after, itemsize, position)
    images = [np.zeros(nbytes, np.uint8) for nbytes in (100, 0, 5 * itemsize)]
    assert core.delta_apply(raw(gaps), raw(values), itemsize, arenas_of(*images), write=True)
    assert not images[0].any()
    assert np.array_equal(images[2][itemsize:], after)
    assert not core.delta_apply(raw(gaps), raw(values), itemsize, arenas_of(*images[:2]), write=False)
    short = images[2][:-1].copy()
    assert not core.delta_apply(raw(gaps), raw(values), itemsize, arenas_of(*images[:2], short), write=False)


def test_it_gives_up_beyond_a_limit(core: Native) -> None:
    before = random_bytes(4 * MIB)
    after = changed_at(before, 2, list(range(0, 2 * MIB, 100)))
    rows = rows_of((address_of(before), address_of(after), before.nbytes, 0))
    gaps, values = encode(core, before, after, 2)
    exact = len(gaps) + len(values)
    assert core.delta_encode(rows, 2, exact) == (gaps, values)
    assert core.delta_encode(rows, 2, exact - 1) is None
    assert core.delta_encode(rows, 2, 0) is None
    assert core.delta_encode(rows_of((address_of(before), address_of(before), 64, 0)), 2, 0) == (b"", b"")


def test_nothing_is_no_change(core: Native) -> None:
    assert core.delta_encode(rows_of(), 4, 0) == (b"", b"")
    assert core.delta_encode(rows_of((0, 0, 0, 0), (8, 8, 0, 16)), 4, 0) == (b"", b"")
    assert core.delta_apply(raw(b""), raw(b""), 4, arenas_of(), write=True)


# What is refused


@pytest.mark.parametrize(
    ("rows", "itemsize"),
    [
        ([(64, 64, 2, 0)], 4),
        ([(64, 64, 4, 2)], 4),
        ([(64, 64, 6, 0)], 3),
        ([(64, 64, 64, 0)], 32),
        ([(64, 64, 8, 0)], 0),
        ([(64, 64, 8, 8), (64, 64, 8, 0)], 4),
        ([(64, 64, 8, 8), (64, 64, 8, 12)], 4),
        ([(2**64 - 4, 64, 8, 0)], 4),
        ([(64, 2**64 - 4, 8, 0)], 4),
        ([(64, 64, 8, 2**64 - 4)], 4),
    ],
)
def test_impossible_rows_are_refused_before_anything_is_read(core: Native, rows: list, itemsize: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the two cores word it alike, but promise only the type
        core.delta_encode(rows_of(*rows), itemsize, FAR)


def test_arguments_of_another_form_are_refused(core: Native) -> None:
    none, arenas = raw(b""), np.zeros((0, 2), np.uint64)
    with pytest.raises(TypeError):
        core.delta_encode(np.zeros((1, 4), np.int64), 4, FAR)
    with pytest.raises(TypeError):
        core.delta_encode(np.zeros((2, 8), np.uint64)[:, ::2], 4, FAR)
    with pytest.raises(TypeError):
        core.delta_apply(none, np.zeros(4, np.int8), 4, arenas, write=False)
    with pytest.raises(TypeError):
        core.delta_apply(none, none, 4, np.zeros((1, 3), np.uint64), write=False)
    with pytest.raises(ValueError):  # noqa: PT011
        core.delta_apply(none, np.zeros(3, np.uint8), 4, arenas, write=False)
    with pytest.raises(ValueError):  # noqa: PT011
        core.delta_apply(none, none, 3, arenas, write=False)


@pytest.mark.parametrize(
    ("gaps", "count"),
    [
        ("", 1),
        ("00", 0),
        ("0000", 1),
        ("fd01", 1),
        ("fe010000", 1),
        ("ff01000000000000", 1),
        ("fd", 1),
        ("fc", 1),
        ("ff ffffffffffffffff", 1),
        ("00 ff ffffffffffffffff", 2),
        ("ff ffffffffffffff1f", 1),
        ("10", 1),
    ],
)
def test_malformed_gaps_are_refused(core: Native, gaps: str, count: int) -> None:
    image = np.zeros(16 * 8, np.uint8)
    values = np.ones(8 * count, np.uint8)
    assert not core.delta_apply(raw(bytes.fromhex(gaps)), values, 8, arenas_of(image), write=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=st.binary(max_size=40), count=st.integers(0, 40), itemsize=itemsizes)
def test_random_gaps_never_write_outside(both: tuple[Native, Native], gaps: bytes, count: int, itemsize: int) -> None:
    memory = np.zeros(3 * 4096, np.uint8)
    images = memory[4096 : 4096 + 1001], memory[8192 : 8192 + 64]
    arguments = raw(gaps), np.ones(count * itemsize, np.uint8), itemsize, arenas_of(*images)
    fits = [core.delta_apply(*arguments, write=False) for core in both]
    assert fits[0] == fits[1]
    assert not memory.any()
    both[0].delta_apply(*arguments, write=True)  # without looking whether it fits
    written = int(memory.sum())
    assert int(images[0].sum()) + int(images[1].sum()) == written
    assert not fits[0] or written == count * itemsize

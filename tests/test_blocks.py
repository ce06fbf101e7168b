"""Blocks: matching of source and target against a model that moves byte by byte, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl import RangeError
from raynixl.blocks import (
    Segments,
    as_unsigned,
    check_disjoint,
    check_table,
    make_table,
    match,
    page_table,
    refuse_overlap,
)

pytestmark = pytest.mark.pure

NBYTES = 64
REGIONS = 3
Cut = list[tuple[int, int, int]]
"""Blocks of one side: (region, offset, length)."""

cuts = st.lists(
    st.tuples(st.integers(0, REGIONS - 1), st.integers(0, NBYTES - 1), st.integers(0, 12)).map(
        lambda block: (block[0], block[1], min(block[2], NBYTES - block[1]))
    ),
    min_size=1,
    max_size=12,
)


def stream(blocks: Cut) -> list[tuple[int, int]]:
    """Every byte of the blocks, in order: (region, offset)."""
    return [(region, offset + i) for region, offset, length in blocks for i in range(length)]


def tables(blocks: Cut) -> list[tuple[int, np.ndarray]]:
    """The blocks as `match` takes them: neighbours of one region share a table."""
    found: list[tuple[int, Cut]] = []
    for block in blocks:
        if found and found[-1][0] == block[0]:
            found[-1][1].append(block)
        else:
            found.append((block[0], [block]))
    return [(region, make_table([b[1] for b in part], [b[2] for b in part])) for region, part in found]


def moves(segments: Segments) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Every byte that the segments move, in order: (from, to)."""
    return [
        ((int(a), int(b) + i), (int(c), int(d) + i))
        for a, b, c, d, n in zip(
            segments.source_region, segments.source_offset, segments.target_region, segments.target_offset,
            segments.nbytes, strict=True,
        )
        for i in range(int(n))
    ]  # fmt: skip


def recut(blocks: Cut, total: int) -> Cut:
    """The first `total` bytes of the blocks."""
    found: Cut = []
    for region, offset, length in blocks:
        taken = min(length, total)
        found.append((region, offset, taken))
        total -= taken
    return found


@given(cuts, cuts)
def test_matched_pieces_move_what_the_model_moves(source: Cut, target: Cut) -> None:
    total = min(len(stream(source)), len(stream(target)))
    source, target = recut(source, total), recut(target, total)
    model = list(zip(stream(source), stream(target), strict=True))
    overlaps = len(set(stream(target))) < total
    if total == 0 or overlaps:
        with pytest.raises(RangeError, match="no bytes" if total == 0 else "overlap"):
            match(tables(source), tables(target))
        return
    segments = match(tables(source), tables(target))
    assert moves(segments) == model
    assert segments.total == total
    assert (segments.nbytes > 0).all()
    for i in range(1, len(segments)):  # no two neighbours could still be merged
        a, b = moves(segments)[0], segments
        ends = (
            b.source_region[i] == b.source_region[i - 1]
            and b.target_region[i] == b.target_region[i - 1]
            and b.source_offset[i] == b.source_offset[i - 1] + b.nbytes[i - 1]
            and b.target_offset[i] == b.target_offset[i - 1] + b.nbytes[i - 1]
        )
        assert not ends, (a, i)


@given(cuts, cuts)
def test_unequal_totals_are_refused(source: Cut, target: Cut) -> None:
    if len(stream(source)) != len(stream(target)):
        with pytest.raises(RangeError, match="source has"):
            match(tables(source), tables(target))


def test_totals_beyond_64_bits_are_added_exactly() -> None:
    huge = make_table([0] * 4, 1 << 62)
    with pytest.raises(RangeError, match=str(1 << 64)):
        match([(0, huge)], [(0, make_table([0], [8]))])
    with pytest.raises(RangeError, match="split it"):
        match([(0, make_table([0, 0], 1 << 62))], [(0, make_table([0, 1 << 62], 1 << 62))])


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=8))
def test_copies_onto_themselves_are_found_as_the_model_finds_them(rows: list[tuple[int, int, int]]) -> None:
    sources = {address for source, _, n in rows for address in range(source, source + n)}
    targets = {address for _, target, n in rows for address in range(target, target + n)}
    table = np.array(rows, np.uint64)
    if sources & targets:
        with pytest.raises(RangeError, match="overlap in memory"):
            refuse_overlap(table)
    else:
        refuse_overlap(table)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 10)), min_size=1, max_size=8))
def test_disjoint_is_what_the_model_calls_disjoint(rows: list[tuple[int, int, int]]) -> None:
    bytes_ = stream(rows)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    sides = (columns[0].astype(np.int64), columns[1].astype(np.uint64), columns[2].astype(np.uint64))
    if len(set(bytes_)) < len(bytes_):
        with pytest.raises(RangeError, match="overlap"):
            check_disjoint(*sides)
    else:
        check_disjoint(*sides)


_numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(0, 300), st.floats(), st.none(), st.booleans(), st.text()
)


@given(st.lists(_numbers, max_size=4))
def test_numbers_are_taken_exactly_or_refused(values: list[object]) -> None:
    is_fine = all(type(value) is int and 0 <= value < 2**64 for value in values)
    try:
        found = as_unsigned(values, "offsets")  # type: ignore[arg-type]
    except RangeError:
        assert not is_fine
    else:
        assert found.tolist() == [int(value) for value in values]  # type: ignore[call-overload]
        assert found.dtype == np.uint64


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=5), st.data())
def test_a_table_is_inside_or_refused(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    limit = data.draw(st.sampled_from([0, 1, 4096, 2**62, 2**63 - 1, max(a + n for a, n in rows) % 2**63]))
    table = make_table([a for a, _ in rows], [n for _, n in rows])
    bad = [i for i, (a, n) in enumerate(rows) if a + n > limit]
    if bad:
        with pytest.raises(RangeError, match=rf"block {bad[0]} \["):
            check_table(table, limit, "it")
    else:
        check_table(table, limit, "it")


def test_tables_are_read_only_and_pages_are_whole() -> None:
    table = page_table([2, 0], 100, nbytes=399, what="it")
    assert table.tolist() == [[200, 100, 0], [0, 100, 0]]
    assert not table.flags.writeable
    with pytest.raises(RangeError, match="page 3 is outside it of 399 bytes, 3 pages"):
        page_table([3], 100, nbytes=399, what="it")

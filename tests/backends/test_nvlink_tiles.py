"""How lists of blocks are cut for a GPU: nothing is lost or done twice, and tiles are as long as they may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.backends.nvlink_digest import number_tiles
from raynixl.backends.nvlink_digest import tile_nbytes as digest_tile_nbytes
from raynixl.backends.nvlink_tiles import Cut, Tuning, Way, cut_rows, merge, plan, small_threads, tile_nbytes

pytestmark = pytest.mark.pure

KIB, MIB = 1 << 10, 1 << 20
SPAN = 4096


@st.composite
def tables(draw: st.DrawFn) -> Any:
    """Rows whose destinations lie apart, some of them adjoining on both sides."""
    rows, at = [], draw(st.integers(0, 300))
    for _ in range(draw(st.integers(0, 12))):
        nbytes = draw(st.one_of(st.integers(0, 40), st.integers(0, SPAN)))
        if rows and draw(st.booleans()):
            source = sum(rows[-1][::2])
        else:
            source, at = draw(st.integers(0, SPAN)), at + draw(st.integers(0, 200))
        rows.append((source, at, nbytes))
        at += nbytes
    return np.array(rows, np.uint64).reshape(-1, 3)


def moved(rows: Any) -> Any:
    """What bytes of the source come to each byte of the destination; -1 where none does, and each at most once."""
    found = np.full(100_000, -1)
    for source, target, nbytes in rows.tolist():
        assert (found[target : target + nbytes] == -1).all(), "a byte is written twice"
        found[target : target + nbytes] = np.arange(source, source + nbytes)
    return found


@given(tables())
def test_merged_rows_move_the_same_bytes_and_none_adjoin(rows: Any) -> None:
    merged = merge(rows)
    assert (moved(merged) == moved(rows)).all()
    assert (merged[:, 2] > 0).all()
    for before, after in zip(merged.tolist(), merged[1:].tolist(), strict=False):
        assert [before[0] + before[2], before[1] + before[2]] != after[:2]


@given(tables(), st.sampled_from([128, 256, 1024]))
def test_tiles_move_the_same_bytes_and_meet_at_lines_of_the_cache(rows: Any, tile: int) -> None:
    rows = merge(rows)
    tiles = cut_rows(rows, tile)
    assert (moved(tiles) == moved(rows)).all()
    starts = set(rows[:, 1].tolist())
    assert all(target in starts or target % 128 == 0 for target in tiles[:, 1].tolist())
    assert (tiles[:, 2] <= tile + 127).all()
    assert (tiles[:, 2] > 0).all()
    assert len(tiles) <= len(rows) + int(rows[:, 2].sum()) // tile + len(rows)


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.integers(1, 300_000), st.integers(0, 1 << 62)), min_size=1, max_size=8
    ),
    st.sampled_from([4 * KIB, 16 * KIB, 128 * KIB]),
)
def test_tiles_of_rows_to_digest_are_numbered(rows: Any, tile: int) -> None:
    table = np.array([(*row, number) for number, row in enumerate(rows)], np.uint64)
    numbered, tiles, length = number_tiles(table, tile)
    assert length == tile
    assert (numbered[:, :4] == table).all()
    counts = [(position + nbytes - 1) // tile - position // tile + 1 for _, nbytes, position in rows]
    assert tiles == sum(counts)
    assert numbered[:, 4].tolist() == [sum(counts[:number]) for number in range(len(rows))]


def test_tiles_are_numbered_up_to_the_end_of_all_positions() -> None:
    row = np.array([[4096, 100, (1 << 64) - 100, 0]], np.uint64)
    assert number_tiles(row, 4096)[1] == 1


@pytest.mark.parametrize(
    ("nbytes", "blocks"), [(1, 4), (MIB, 4), (1 << 30, 8), (2 << 30, 16), (4 << 30, 32), (1 << 40, 32)]
)
def test_a_warp_digests_enough_at_a_time_and_32_blocks_at_most(nbytes: int, blocks: int) -> None:
    assert digest_tile_nbytes(nbytes, 4224) == blocks * 4096


@pytest.mark.parametrize(
    ("rows", "touches_host", "way"),
    [
        ([], False, Way.SMALL),
        ([(0, 0, 0), (5, 5, 0)], False, Way.SMALL),
        ([(0, MIB, 64 * KIB)], False, Way.SMALL),
        ([(0, MIB, 32 * KIB), (32 * KIB, MIB + 32 * KIB, 32 * KIB)], False, Way.SMALL),
        ([(0, MIB, 64 * KIB + 1)], False, Way.RANGE),
        ([(0, 1 << 30, 1 << 30)], False, Way.ENGINE),
        ([(0, MIB, 64 * KIB), (MIB, 0, 64 * KIB)], False, Way.TILES),
        ([(MIB * k, MIB * (99 - k), 64 * KIB) for k in range(99)], True, Way.TILES),
        ([(MIB * k, MIB * (20 - k), 64 * KIB) for k in range(20)], True, Way.ENGINE),
        ([(MIB * k, MIB * (99 - k), 100) for k in range(99)], False, Way.NARROW),
    ],
)
def test_the_way_suits_number_and_length_of_the_blocks(rows: Any, touches_host: bool, way: Way) -> None:
    cut = plan(np.array(rows, np.uint64).reshape(-1, 3), 132, touches_host=touches_host, tuning=Tuning())
    assert cut.way is way
    assert sum(row[2] for row in rows) == int(cut.rows[:, 2].sum())


@given(tables(), st.integers(1, 200))
def test_a_plan_has_threads_for_every_tile(rows: Any, multiprocessors: int) -> None:
    cut = plan(rows, multiprocessors)
    assert isinstance(cut, Cut)
    assert 1 <= cut.grid <= multiprocessors * Tuning().ctas
    assert 32 <= cut.threads <= 1024
    assert (moved(cut.rows) == moved(rows)).all()


@pytest.mark.parametrize("nbytes", [0, 1, 64, 2048, 2049, 64 * KIB, MIB])
def test_a_small_block_has_whole_warps(nbytes: int) -> None:
    threads = small_threads(nbytes)
    assert threads % 32 == 0
    assert threads == 1024 or threads * 64 >= nbytes


def test_tiles_are_shorter_where_there_are_few_bytes_for_all_warps() -> None:
    tuning = Tuning(least_tile_nbytes=4 * KIB, most_tile_nbytes=64 * KIB, tiles_per_warp=4)
    lengths = [tile_nbytes(total, 1000, tuning) for total in (1, MIB, 40 * MIB, 100 * MIB, 1 << 40)]
    assert lengths == [4 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB]

"""Digests notice every change, also of places; workers stop at the first failure."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.native import load
from raynixl.weights.digest import (
    ARENA_BIT,
    chunk_rows,
    digest_chunks,
    digest_rows,
    version_digest,
)
from raynixl.weights.layout import Layout
from raynixl.weights.workers import run_workers


def test_swapped_chunks_and_single_bits_are_noticed_where_they_are():
    arena = np.random.default_rng(1).integers(0, 256, 5 * 4096, np.uint8)
    chunks = Layout((), (len(arena),)).chunks(4096)
    before = digest_chunks([arena], chunks, threads=2, seed=1)
    swapped = arena.copy()
    swapped[:4096], swapped[4096:8192] = arena[4096:8192], arena[:4096]
    after = digest_chunks([swapped], chunks, threads=2, seed=1)
    assert np.flatnonzero((after != before).any(axis=1)).tolist() == [0, 1]
    assert version_digest(after) != version_digest(before)
    flipped = arena.copy()
    flipped[9000] ^= 1
    after = digest_chunks([flipped], chunks, threads=2, seed=1)
    assert np.flatnonzero((after != before).any(axis=1)).tolist() == [2]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20_000), max_size=4), st.integers(1, 4), st.sampled_from([4096, 5000, 8192]))
def test_a_version_has_one_digest_however_it_is_cut(sizes, threads, chunk_nbytes):
    arenas = [np.random.default_rng(size).integers(0, 256, size, np.uint8) for size in sizes]
    layout = Layout((), tuple(sizes))
    chunks = digest_chunks(arenas, layout.chunks(chunk_nbytes), threads=threads, seed=9)
    whole = digest_chunks(arenas, layout.chunks(1 << 20), threads=1, seed=9, native=load(native=False))
    assert len(chunks) == len(layout.chunks(chunk_nbytes))
    assert version_digest(chunks) == version_digest(whole)
    assert len(version_digest(chunks)) == 32
    assert not sizes or version_digest(chunks) != version_digest(
        digest_chunks(arenas, layout.chunks(chunk_nbytes), threads=threads, seed=10)
    )


def test_shares_of_several_sources_add_up_to_a_chunks_digest():
    image = np.random.default_rng(2).integers(0, 256, 3 * 4096, np.uint8)
    chunks = Layout((), (len(image),)).chunks(4096)
    expected = digest_chunks([image], chunks, threads=1, seed=4)
    total = np.zeros_like(expected)
    for first in (0, 1):  # one source has the even rows of 100 bytes, the other the odd ones
        starts = [(a, b) for n in range(3) for a, b in _cuts(n * 4096, (n + 1) * 4096)][first::2]
        rows = [(image.ctypes.data + a, b - a, a, a // 4096) for a, b in starts]
        digest_rows(np.array(rows, np.uint64), total, seed=4)
    assert np.array_equal(total, expected)


def _cuts(start, end):
    return [(at, min(at + 100, end)) for at in range(start, end, 100)]


def test_threads_share_one_long_row_and_many_short_ones():
    data = np.random.default_rng(5).integers(0, 256, 30 << 20, np.uint8)
    long = [(data.ctypes.data, len(data), 12_345, 2)]
    short = [(data.ctypes.data + at, 64, at, at // 64 % 5) for at in range(0, 1 << 20, 64)]
    rows = np.array(long + short + long, np.uint64)
    alone, together = np.zeros((5, 2), np.uint64), np.zeros((5, 2), np.uint64)
    digest_rows(rows, alone, seed=3)
    digest_rows(rows, together, seed=3, threads=3)
    assert np.array_equal(alone, together)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_thread_reads_a_row_before_all_are_checked(threads):
    data, out = np.ones(64, np.uint8), np.zeros((1, 2), np.uint64)
    rows = np.array([(data.ctypes.data, 64, 0, 0), (data.ctypes.data, 64, 0, 1)], np.uint64)
    with pytest.raises(ValueError):  # noqa: PT011 - as the cores do
        digest_rows(rows, out, seed=1, threads=threads)
    digest_rows(rows[:0], out, seed=1, threads=threads)
    assert not out.any()


def test_rows_of_chunks_name_their_place_and_positions():
    arenas = [np.zeros(5000, np.uint8), np.zeros(100, np.uint8)]
    rows = chunk_rows(arenas, Layout((), (5000, 100)).chunks(4096))
    first, second = (arena.ctypes.data for arena in arenas)
    assert rows.tolist() == [
        [first, 4096, 0, 0], [first + 4096, 904, 4096, 1], [second, 100, 1 << ARENA_BIT, 2],
    ]  # fmt: skip


def test_workers_stop_at_the_first_failure_and_leave_no_thread():
    done = []

    def work(number):
        if number == 3:
            raise ValueError("three")
        done.append(number)

    before = threading.active_count()
    with pytest.raises(ValueError, match="three"):
        run_workers(work, 10_000, threads=4)
    assert threading.active_count() == before
    assert len(done) < 10_000


@pytest.mark.parametrize("room", [0, 2])
def test_workers_do_all_with_the_threads_that_can_be_started(monkeypatch, room):
    start, started, done = threading.Thread.start, [], []

    def start_some(thread):
        if len(started) == room:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    run_workers(done.append, 1000, threads=5)
    assert sorted(done) == list(range(1000))
    assert len(started) == room
    assert not any(thread.is_alive() for thread in started)

"""Digests notice every change, also of places; workers stop at the first failure."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.weights.digest import DIGEST_NBYTES, chunk_digest, digest_chunks, version_digest
from raynixl.weights.layout import Layout
from raynixl.weights.workers import run_workers


def digests(arenas, threads=2):
    layout = Layout((), tuple(len(arena) for arena in arenas))
    return digest_chunks(arenas, layout.chunks(4096), threads=threads)


def test_swapped_chunks_and_single_bits_are_noticed():
    arena = np.random.default_rng(1).integers(0, 256, 5 * 4096, np.uint8)
    before = digests([arena])
    swapped = arena.copy()
    swapped[:4096], swapped[4096:8192] = arena[4096:8192], arena[:4096]
    assert digests([swapped]) != before
    assert version_digest(digests([swapped])) != version_digest(before)
    flipped = arena.copy()
    flipped[9000] ^= 1
    after = digests([flipped])
    changed = [n for n in range(5) if after[n * 16 : n * 16 + 16] != before[n * 16 : n * 16 + 16]]
    assert changed == [2]


def test_equal_chunks_have_different_digests():
    raw = digests([np.zeros(3 * 4096, np.uint8)])
    assert len({raw[at : at + DIGEST_NBYTES] for at in range(0, len(raw), DIGEST_NBYTES)}) == 3


@settings(deadline=None)
@given(st.lists(st.integers(1, 20_000), max_size=4), st.integers(1, 5))
def test_threads_and_arenas_change_nothing(sizes, threads):
    arenas = [np.full(size, number + 1, np.uint8) for number, size in enumerate(sizes)]
    raw = digests(arenas, threads)
    chunks = [arena[at : at + 4096] for arena in arenas for at in range(0, len(arena), 4096)]
    assert raw == b"".join(chunk_digest(number, chunk) for number, chunk in enumerate(chunks))


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

"""Outgoing rows: partial digests of several sources add up to those of the image that their bytes make."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl.errors import IntegrityError
from raynixl.weights.bank import HostBank
from raynixl.weights.digest import digest_chunks
from raynixl.weights.outgoing import OutgoingRows
from raynixl.weights.ranges import Ranges
from raynixl.weights.sourcing import ImageRows, Outgoing

PLAN = "a" * 32
CHUNK = 4096


def chunks_of(sizes):
    rows = [
        (arena, offset, min(CHUNK, size - offset))
        for arena, size in enumerate(sizes)
        for offset in range(0, size, CHUNK)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


@st.composite
def images(draw):
    """Return the arenas of an image, and for each of some sources its rows of it (packed in its own one arena)."""
    sizes = draw(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=3))
    sources = draw(st.integers(1, 3))
    rows, ends = [[] for _ in range(sources)], [0] * sources
    for arena, size in enumerate(sizes):
        at = 0
        while at < size:
            source, gap = draw(st.integers(0, sources - 1)), draw(st.integers(0, 40))
            run, count = draw(st.integers(1, 6000)), draw(st.integers(1, 5))
            stride = run + draw(st.integers(0, 9))
            if at + gap + stride * count > size:
                break
            own_stride = run + draw(st.integers(0, 3))
            rows[source].append((0, 0, ends[source], arena, at + gap, run, count, own_stride, stride))
            ends[source] += own_stride * count
            at += gap + stride * count
    return sizes, [np.array(own, np.int64).reshape(-1, 9) for own in rows], ends


@settings(max_examples=60, deadline=None)
@given(images(), st.integers(0, 2**32), st.integers(1, 3))
def test_partial_digests_of_sources_add_up_to_those_of_the_image(made, seed, threads):
    sizes, rows, ends = made
    version = seed + 1
    random = np.random.default_rng(seed)
    image = [np.zeros(size, np.uint8) for size in sizes]
    chunks = chunks_of(sizes)
    sums = np.zeros((len(chunks), 2), np.uint64)
    for own, end in zip(rows, ends, strict=True):
        source = random.integers(0, 256, max(1, end), np.uint8)
        for _, _, start, arena, offset, run, count, own_stride, stride in own.tolist():
            for turn in range(count):
                piece = source[start + turn * own_stride :][:run]
                image[arena][offset + turn * stride :][:run] = piece
        message = Outgoing(PLAN, CHUNK, (ImageRows(5, 0, tuple(sizes), Ranges(own).to_bytes()),))
        partial = OutgoingRows(message, [len(source)]).digest(HostBank([source]), version=version, threads=threads)[5]
        sums[partial.chunks] += partial.digests
    assert np.array_equal(sums, digest_chunks(image, chunks, threads=1, seed=version))


def outgoing(row, image=(2 * CHUNK,)):
    ranges = Ranges(np.array([row], np.int64)).to_bytes()
    return Outgoing(PLAN, CHUNK, (ImageRows(0, 0, image, ranges),))


@pytest.mark.parametrize(
    "row",
    [
        (0, 1, 0, 0, 0, 8, 1, 0, 0),  # of an arena that the source lacks
        (0, 0, 93, 0, 0, 8, 1, 0, 0),  # past the end of the source
        (0, 0, 0, 0, 2 * CHUNK - 7, 8, 1, 0, 0),  # past the end of the image
        (0, 0, 0, 1, 0, 8, 1, 0, 0),  # to an arena that the image lacks
        (0, 0, 0, 0, 0, 8, 12, 9, 8),  # runs past the end of the source
    ],
)
def test_rows_that_reach_outside_are_refused_before_any_byte_is_read(row):
    with pytest.raises(IntegrityError):
        OutgoingRows(outgoing(row), [100])


def test_one_source_serves_several_images_at_other_places():
    source = np.arange(100, dtype=np.uint8)
    rows = [(0, 0, 0, 0, 0, 100, 1, 0, 0), (0, 0, 50, 0, 4090, 50, 1, 0, 0)]
    parts = [Ranges(np.array([row], np.int64)).to_bytes() for row in rows]
    message = Outgoing(PLAN, CHUNK, tuple(ImageRows(n + 3, 0, (2 * CHUNK,), part) for n, part in enumerate(parts)))
    prepared = OutgoingRows(message, [100])
    assert prepared.nbytes == 150
    found = prepared.digest(HostBank([source]), version=1, threads=1)
    assert {image: partial.chunks.tolist() for image, partial in found.items()} == {3: [0], 4: [0, 1]}
    image = np.zeros(2 * CHUNK, np.uint8)
    image[4090:4140] = source[50:]
    assert np.array_equal(found[4].digests, digest_chunks([image], chunks_of([2 * CHUNK]), threads=1, seed=1))


def test_a_source_that_serves_nothing_answers_nothing():
    prepared = OutgoingRows(Outgoing(PLAN, CHUNK, ()), [100])
    assert prepared.digest(HostBank([np.zeros(100, np.uint8)]), version=1, threads=2) == {}

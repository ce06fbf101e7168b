"""A delta carries what changed bit for bit, is small, and harms nothing when it is damaged."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.errors import IntegrityError
from raynixl.native import load
from raynixl.weights.delta import apply, encode_rows

MIB = 1 << 20
FAR = 1 << 40
HEADER = 24
twin = load(native=False)


def random_bytes(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def trained(before, itemsize, share, seed=0):
    """A copy of which a share of the elements has changed."""
    after = before.copy()
    which = np.flatnonzero(np.random.default_rng(seed).random(len(before) // itemsize) < share)
    after[which * itemsize] ^= 1
    return after


def row(before, after, position=0):
    return np.array([(before.ctypes.data, after.ctypes.data, before.nbytes, position)], np.uint64)


def encode(before, after, itemsize=2, position=0, **options):
    return encode_rows(row(before, after, position), itemsize=itemsize, limit=options.pop("limit", FAR), **options)


def test_one_percent_of_bf16_is_under_two_percent_of_the_bytes():
    before = random_bytes(40 * MIB)
    after = trained(before, 2, 0.01)
    blob = encode(before, after, threads=2)
    assert len(blob) < 0.0165 * len(before)
    image = before.copy()
    apply(blob, [image], threads=2)
    assert np.array_equal(image, after)


def test_threads_and_cores_make_one_blob():
    before = random_bytes(36 * MIB)  # several segments
    after = trained(before, 4, 0.001)
    blob = encode(before, after, 4)
    assert encode(before, after, 4, threads=3) == blob
    assert encode(before, after, 4, native=twin) == blob
    for options in ({"threads": 3}, {"native": twin}):
        image = before.copy()
        apply(blob, [image], **options)
        assert np.array_equal(image, after)


@pytest.mark.parametrize("threads", [1, 3])
def test_it_gives_up_beyond_a_limit_to_the_byte(threads):
    before = random_bytes(36 * MIB)
    after = trained(before, 2, 0.0005)
    blob = encode(before, after)
    assert encode(before, after, limit=len(blob), threads=threads) == blob
    assert encode(before, after, limit=len(blob) - 1, threads=threads) is None
    assert encode(before, before, limit=0, threads=threads) is None


def test_no_change_is_a_blob_too():
    before = random_bytes(100)
    for blob in (encode(before, before), encode_rows(np.zeros((0, 4), np.uint64), itemsize=8, limit=FAR)):
        assert len(blob) == HEADER
        image = before.copy()
        apply(blob, [image])
        assert np.array_equal(image, before)


def test_blobs_of_several_kinds_are_one_when_joined():
    before, image = random_bytes(30_000), random_bytes(30_000)
    after = trained(trained(before, 2, 0.1), 8, 0.1)
    image[:] = before
    parts = [encode(before[a:b], after[a:b], size, a) for a, b, size in [(0, 9_000, 2), (9_000, 30_000, 8)]]
    assert parts[0] != parts[1]
    apply(b"".join(reversed(parts)), [image])
    assert np.array_equal(image, after)


def test_threads_apply_parts_of_one_image_beside_each_other():
    before = random_bytes(8 * MIB)
    after, image = trained(before, 2, 0.05), before.copy()
    step = MIB
    blobs = [encode(before[at : at + step], after[at : at + step], 2, at) for at in range(0, len(before), step)]
    threads = [threading.Thread(target=apply, args=(blob, [image])) for blob in blobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(image, after)


@pytest.mark.parametrize("rows", [[(64, 64, 8, 8), (64, 64, 8, 0)], [(64, 64, 8, 2**64 - 4)], [(64, 64, 6, 0)]])
def test_impossible_rows_are_refused(rows):
    with pytest.raises(ValueError):  # noqa: PT011 - that and not a RaynixlError is what is promised
        encode_rows(np.array(rows, np.uint64), itemsize=4, limit=FAR)


# Damage


def damaged_image(blob, image, options):
    """Apply what may be damaged to a part of memory; return whether it was taken."""
    memory = np.zeros(len(image) + 8192, np.uint8)
    inside = memory[4096 : 4096 + len(image)]
    inside[:] = image
    try:
        apply(blob, [inside[:1000], inside[1000:]], **options)
    except IntegrityError:
        assert np.array_equal(inside, image), "a blob that was refused has changed something"
        return False
    finally:
        assert not memory[:4096].any(), "it wrote before the image"
        assert not memory[4096 + len(image) :].any(), "it wrote behind the image"
    return True


@pytest.fixture(scope="module")
def sample():
    """An image in two arenas, and the blob of two segments that changes it."""
    before = random_bytes(3000)
    after = trained(before, 2, 0.1)
    rows = np.concatenate([row(before[:1000], after[:1000]), row(before[1000:], after[1000:], 1 << 48)])
    blob = encode_rows(rows[:1], itemsize=2, limit=FAR) + encode_rows(rows[1:], itemsize=2, limit=FAR)
    return before, after, blob


CORES = [{}, {"native": twin}]


@pytest.mark.parametrize("options", CORES, ids=["default", "ctypes"])
def test_a_blob_cut_short_anywhere_is_refused(sample, options):
    before, _, blob = sample
    boundary = blob.index(b"RXD1", 1)
    for length in range(len(blob)):
        if length != boundary:
            assert not damaged_image(blob[:length], before, options)
    assert not damaged_image(blob + b"\0", before, options)
    assert damaged_image(blob, before, options)


@given(data=st.data())
def test_a_blob_with_changed_bytes_never_writes_outside_nor_half(sample, data):
    before, _, blob = sample
    broken = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, HEADER - 1))
        broken[at] = data.draw(st.sampled_from([0, 1, 253, 254, 255]) | st.integers(0, 255))
    taken = [damaged_image(bytes(broken), before, options) for options in CORES]
    assert taken[0] == taken[1]


@given(junk=st.binary(max_size=100), count=st.integers(0, 2**64 - 1), nbytes=st.integers(0, 2**64 - 1))
def test_junk_is_refused(sample, junk, count, nbytes):
    before = sample[0]
    assert not damaged_image(junk, before, {})
    header = b"RXD1" + bytes([16, 0, 0, 0]) + count.to_bytes(8, "little") + nbytes.to_bytes(8, "little")
    if count or nbytes:
        assert not damaged_image(header + junk[:20], before, {})


def test_an_image_of_another_form_is_refused(sample):
    before, _, blob = sample
    for arrays in ([before[:1000]], [before[:1000], before[1000:1100]], []):
        image = [one.copy() for one in arrays]
        with pytest.raises(IntegrityError):
            apply(blob, image)
        assert all(np.array_equal(one, old) for one, old in zip(image, arrays, strict=True))

"""Sizes as people write them, and layouts: every block goes somewhere once, and digests notice changes."""

import numpy as np
import pytest

from raynixl.bench.layout import Layout, digest, fill
from raynixl.bench.sizes import format_size, parse_size, parse_sizes
from raynixl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("8", 8), ("4K", 4096), ("4k", 4096), ("1.5M", 3 << 19), (" 2 GiB", 2 << 30), ("64MB", 64 << 20)],
)
def test_sizes_are_powers_of_1024(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1.3", "4Q", "4K4", "1e6", "nan", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_a_list_of_sizes_is_parsed_and_formatted():
    assert [format_size(size) for size in parse_sizes("8,4K,1M,1.5G")] == ["8 B", "4 KiB", "1 MiB", "1.5 GiB"]


@pytest.mark.parametrize("blocks", [1, 2, 7, 1000])
@pytest.mark.parametrize("is_random", [False, True])
def test_a_layout_moves_every_block_once(blocks, is_random):
    layout = Layout(24, blocks, is_random)
    source, target = np.empty(layout.nbytes, np.uint8), np.zeros(layout.nbytes, np.uint8)
    fill(source, 7)
    rows, into = source.reshape(blocks, 24), target.reshape(blocks, 24)
    into[layout.target_ids] = rows[layout.source_ids]
    assert sorted(layout.source_ids) == sorted(layout.target_ids) == list(range(blocks))
    assert digest(target) == layout.digest_moved(source)


def test_a_random_layout_is_the_same_in_every_process_and_not_sorted():
    one, other = Layout(8, 100, True), Layout(8, 100, True)
    assert np.array_equal(one.source_of_place, other.source_of_place)
    assert not np.array_equal(one.source_ids, np.arange(100))
    assert not np.array_equal(one.source_ids, one.target_ids)


@pytest.mark.parametrize("nbytes", [1, 7, 8, 4096, (1 << 20) + 13])
def test_filled_bytes_differ_by_seed_and_position(nbytes):
    one, other = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    fill(one, 7)
    fill(other, 8)
    assert digest(one) != digest(other)
    fill(other, 0)
    assert not other.any()
    if nbytes > 8192:
        assert len({one[at : at + 4096].tobytes() for at in range(0, nbytes - 4096, 4096)}) == nbytes // 4096

"""Transfers are cut over rails: every byte once, evenly, and small ones not at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl import ConfigError, RangeError
from raynixl.topology import Stripes, stripe


def per_rail(stripes: Stripes, rails: int) -> list[int]:
    return [int(stripes.nbytes[stripes.rail == rail].sum()) for rail in range(rails)]


lengths = st.lists(st.integers(0, 5000), max_size=40)


@given(lengths, st.integers(1, 9), st.integers(1, 4000), st.sampled_from([1, 8, 64, 100, 4096]), st.integers(0, 20))
def test_every_byte_goes_exactly_once(nbytes: list[int], rails: int, least: int, align: int, first: int) -> None:
    stripes = stripe(nbytes, rails, min_nbytes=least, align=align, first=first)
    rows = zip(stripes.block.tolist(), stripes.offset.tolist(), stripes.nbytes.tolist(), strict=True)
    moved = [(block, at) for block, offset, length in rows for at in range(offset, offset + length)]
    assert moved == [(block, at) for block, length in enumerate(nbytes) for at in range(length)]
    assert (stripes.nbytes > 0).all()
    assert ((stripes.rail >= 0) & (stripes.rail < rails)).all()


@given(lengths, st.integers(1, 9), st.integers(1, 4000), st.sampled_from([1, 8, 64, 100, 4096]))
def test_rails_get_equal_shares_of_neighbouring_bytes(nbytes: list[int], rails: int, least: int, align: int) -> None:
    stripes = stripe(nbytes, rails, min_nbytes=least, align=align)
    used = max(1, min(rails, sum(nbytes) // max(least, align)))
    shares = per_rail(stripes, used)
    assert sum(shares) == sum(nbytes)
    assert max(shares) - min(shares) <= 2 * align
    assert min(shares) > 0 or used == 1
    assert (np.diff(stripes.rail) >= 0).all()
    assert len(stripes) <= sum(length > 0 for length in nbytes) + used - 1
    cut = stripes.offset[stripes.offset > 0]
    assert (cut % align == 0).all()


def test_small_transfers_stay_on_one_rail_which_the_caller_may_choose() -> None:
    assert set(stripe([4096] * 15, 4, min_nbytes=65536, align=4096).rail.tolist()) == {0}
    assert set(stripe([4096] * 15, 4, min_nbytes=65536, align=4096, first=6).rail.tolist()) == {2}


def test_a_large_block_is_cut_at_aligned_offsets() -> None:
    stripes = stripe([10 << 20], 3, min_nbytes=1 << 20, align=1 << 16)
    assert len(stripes) == 3
    assert (stripes.offset % (1 << 16) == 0).all()
    assert per_rail(stripes, 3) == [3473408, 3538944, 3473408]


def test_whole_small_blocks_are_shared_out_uncut() -> None:
    stripes = stripe([4096] * 10_000, 4, min_nbytes=1 << 20, align=4096)
    assert len(stripes) == 10_000
    assert per_rail(stripes, 4) == [2500 * 4096] * 4


def test_lengths_near_the_limit_of_64_bits_are_cut_exactly() -> None:
    nbytes = [(1 << 62) - 1, (1 << 61) + 3]
    stripes = stripe(nbytes, 7, min_nbytes=1, align=4096)
    assert sum(stripes.nbytes.tolist()) == sum(nbytes)
    assert max(per_rail(stripes, 7)) - min(per_rail(stripes, 7)) <= 8192


def test_what_64_bits_do_not_hold_is_refused() -> None:
    with pytest.raises(RangeError, match=r"2\^63 bytes"):
        stripe([1 << 62, 1 << 62], 2, min_nbytes=1, align=1)
    with pytest.raises(RangeError):
        stripe([-1], 2, min_nbytes=1, align=1)


@pytest.mark.parametrize(("rails", "least", "align"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_cut_that_makes_no_sense_is_refused(rails: int, least: int, align: int) -> None:
    with pytest.raises(ConfigError):
        stripe([1], rails, min_nbytes=least, align=align)

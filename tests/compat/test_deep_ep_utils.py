"""Eight-bit rows: the casts that DeepEP's users call, and that its low-latency mode makes."""

from __future__ import annotations

import math

import pytest
import torch

from raynixl import ConfigError
from raynixl.compat.deep_ep.utils import (
    calc_diff,
    pack_scales,
    per_token_cast_back,
    per_token_cast_to_fp8,
    quantise,
    unpack_scales,
)

pytestmark = pytest.mark.pure


def rows(count=9, hidden=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((count, hidden), generator=generator) * torch.logspace(-6, 4, count).view(-1, 1)).bfloat16()


def test_each_128_columns_share_the_scale_of_their_largest():
    x = rows()
    cast, scales = quantise(x)
    for row in range(len(x)):
        for block in range(4):
            part = x[row, 128 * block : 128 * block + 128].float()
            amax = part.abs().max().clamp(min=1e-4)
            assert float(scales[row, block]) == float(amax / 448)
            expected = (part * (448 / amax)).to(torch.float8_e4m3fn)
            assert torch.equal(cast[row, 128 * block : 128 * block + 128].view(torch.uint8), expected.view(torch.uint8))


def test_rounded_scales_are_the_next_powers_of_two():
    x = rows()
    cast, scales = quantise(x, round_scale=True)
    amax = x.float().view(len(x), 4, 128).abs().amax(2).clamp(min=1e-4)
    for found, largest in zip(scales.flatten().tolist(), amax.flatten().tolist(), strict=True):
        assert math.log2(found).is_integer()
        assert found / 2 < largest / 448 * (1 + 1e-6)
        assert largest / 448 <= found * (1 + 1e-6)
    assert calc_diff(per_token_cast_back(cast, scales), x) < 1e-3
    assert torch.equal(unpack_scales(pack_scales(scales)), scales)
    assert torch.equal(per_token_cast_back(cast, pack_scales(scales)), per_token_cast_back(cast, scales))


def test_packed_scales_have_the_first_exponent_in_the_lowest_byte():
    scales = torch.tensor([[1.0, 2.0, 4.0, 0.5]])
    assert pack_scales(scales).tolist() == [[127 | 128 << 8 | 129 << 16 | 126 << 24]]


def test_every_scale_packs_whatever_its_strides():
    scales = 2.0 ** torch.arange(-100, 100).float().view(-1, 4)
    columns = scales.t().contiguous().t()
    assert torch.equal(unpack_scales(pack_scales(columns)), scales)
    for row in range(len(scales)):
        assert torch.equal(unpack_scales(pack_scales(columns)[row]), scales[row])


def test_casts_take_any_width_and_no_rows():
    x = rows(hidden=200)
    cast, scales = per_token_cast_to_fp8(x)
    assert cast.shape == x.shape
    assert scales.shape == (9, 2)
    assert calc_diff(per_token_cast_back(cast, scales), x) < 1e-3
    nothing = per_token_cast_to_fp8(x[:0])
    assert per_token_cast_back(*nothing).shape == (0, 200)


def test_nan_and_zero_rows():
    x = torch.zeros((2, 128), dtype=torch.bfloat16)
    x[1, 3] = float("nan")
    back = per_token_cast_back(*quantise(x))
    assert not back[0].any()
    assert back[1, 3].isnan()


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiples of 128"):
        quantise(rows(hidden=100), round_scale=True)
    with pytest.raises(ConfigError, match="512 columns"):
        pack_scales(torch.ones((2, 3)))

"""Rows in FP8 are the bytes of a written reference, and come back as near as eight bits allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from raynixl.errors import ConfigError
from raynixl.moe import quantising as module
from raynixl.moe.quantising import dequantise, quantise, scale_columns

pytestmark = pytest.mark.pure
HIDDENS = [1, 127, 128, 129, 1024, 2880, 3584, 7168]
REAL = [torch.bfloat16, torch.float16, torch.float32]


def reference(x):
    """Block by block: magnitudes of 1e-4 at least, times 448 over the largest one, all in float32."""
    blocks = x.float().split(128, dim=1)
    largest = [block.abs().amax(dim=1, keepdim=True).clamp(min=1e-4) for block in blocks]
    values = [(block * (448.0 / one)).to(torch.float8_e4m3fn) for block, one in zip(blocks, largest, strict=True)]
    return torch.cat(values, dim=1), torch.cat([one / 448.0 for one in largest], dim=1)


def same(ours, theirs):
    return all(
        one.dtype == other.dtype and one.shape == other.shape and as_bytes(one) == as_bytes(other)
        for one, other in zip(ours, theirs, strict=True)
    )


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def rows(count, hidden, dtype=torch.bfloat16, seed=0):
    made = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))
    return (made * torch.logspace(-6, 4, count).unsqueeze(1)).to(dtype)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("hidden", HIDDENS)
def test_the_bytes_are_those_of_the_reference(hidden, dtype):
    x = rows(9, hidden, dtype)
    values, scales = quantise(x)
    assert same((values, scales), reference(x))
    assert scales.shape == (9, scale_columns(hidden))
    assert values.is_contiguous()


class NoDivisionByNumbers(TorchFunctionMode):
    """Fails what has other bits on a GPU, where torch multiplies with the reciprocal of a number that it divides by."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        divides = func.__name__ in ("div", "div_", "true_divide", "__truediv__", "__itruediv__")
        assert not (divides and isinstance(args[1], int | float)), "divided by a number"
        return func(*args, **(kwargs or {}))


def test_nothing_is_divided_by_a_number_which_gpus_do_otherwise():
    x = rows(9, 256)
    with NoDivisionByNumbers():
        with pytest.raises(AssertionError):
            _ = x / 3
        found = quantise(x)
    assert same(found, reference(x))


def test_every_finite_value_of_sixteen_bits_has_the_reference_s_bytes():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].view(-1, 128)
    assert same(quantise(x), reference(x))
    assert same(quantise(x.t().contiguous()), reference(x.t().contiguous()))


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 400), st.integers(0, 1 << 30), st.sampled_from(REAL))
def test_any_rows_have_the_reference_s_bytes(count, hidden, seed, dtype):
    x = rows(count, hidden, dtype, seed)
    assert same(quantise(x), reference(x))


def test_rows_of_several_strips_and_of_views_have_the_reference_s_bytes(monkeypatch):
    monkeypatch.setattr(module, "_STRIP_NBYTES", 3 * 4 * 384)
    x = rows(23, 700)[::2, 5:305]
    assert not x.is_contiguous()
    ours = quantise(x)
    assert same(ours, reference(x.contiguous()))
    wide = torch.stack([ours[1][:, column // 128] for column in range(300)], dim=1)
    assert same([dequantise(*ours)], [ours[0].float() * wide])


def test_a_block_of_zeros_and_one_of_tiny_values_has_the_smallest_scale():
    x = torch.zeros(2, 256)
    x[1, :128] = 5e-5
    values, scales = quantise(x)
    assert scales.tolist() == torch.full((2, 2), 1e-4).div(448.0).tolist()
    assert values[0].float().tolist() == [0.0] * 256
    assert set(values[1, :128].float().tolist()) == {224.0}
    assert dequantise(values, scales)[0].tolist() == [0.0] * 256


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", REAL)
def test_what_is_not_finite_makes_its_block_nan_and_no_other(bad, dtype):
    x = rows(3, 300, dtype)
    clean = quantise(x)
    x[1, 130] = bad
    values, scales = quantise(x)
    back = dequantise(values, scales)
    assert not scales[1, 1].isfinite()
    assert back[1, 128:256].isnan().all()
    keep = torch.ones(3, 300, dtype=torch.bool)
    keep[1, 128:256] = False
    assert as_bytes(values.view(torch.uint8)[keep]) == as_bytes(clean[0].view(torch.uint8)[keep])
    assert as_bytes(back[keep]) == as_bytes(dequantise(*clean)[keep])


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_no_rows_and_no_columns_are_quantised_to_none(shape):
    values, scales = quantise(torch.zeros(shape))
    assert (values.shape, scales.shape) == (shape, (shape[0], scale_columns(shape[1])))
    assert dequantise(values, scales).shape == shape


def test_values_of_64_bits_are_rounded_to_32_first():
    x = rows(4, 200, torch.float64)
    assert same(quantise(x), reference(x.float()))


def test_values_come_back_as_near_as_eight_bits_allow():
    x = rows(64, 1000, torch.float32)
    values, scales = quantise(x)
    step = scales.repeat_interleave(128, dim=1)[:, :1000] * 2.0**-10
    assert ((dequantise(values, scales) - x).abs() <= torch.maximum(x.abs() / 16, step) * (1 + 1e-5)).all()


def test_what_came_back_is_quantised_to_the_same_bytes():
    x = rows(16, 512, torch.float32).clamp(min=1e-3)
    values, scales = quantise(x)
    assert same([quantise(dequantise(values, scales))[0]], [values])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_come_back_in_the_dtype_asked_for(dtype):
    values, scales = quantise(rows(4, 300).clamp(-100, 100))
    assert same([dequantise(values, scales, dtype)], [dequantise(values, scales).to(dtype)])


def test_gradients_are_not_followed():
    values, scales = quantise(rows(2, 128, torch.float32).requires_grad_())
    assert not scales.requires_grad
    assert not values.requires_grad


@pytest.mark.parametrize("x", [torch.zeros(128), torch.zeros(2, 2, 128), torch.zeros(2, 128, dtype=torch.int8)])
def test_what_is_no_rows_of_real_numbers_is_refused(x):
    with pytest.raises(ConfigError):
        quantise(x)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 3), (2,)])
def test_scales_of_other_rows_are_refused(shape):
    with pytest.raises(ConfigError):
        dequantise(torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(shape))

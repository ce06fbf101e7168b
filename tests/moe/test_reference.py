"""The reference itself: it is close to the dense sum in float64, and its parts are what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_programs import Combine, Dispatch, Program, even, expected, tokens_of
from moe_rows import draw_rows, unpacked

from raynixl.moe import reference
from raynixl.moe.quantising import quantise
from raynixl.moe.reference import Setting, Tokens

pytestmark = pytest.mark.pure

WAYS = [
    (layout, weights_at) for layout in ("tokens", "experts", "slots") for weights_at in ("holder", "source")
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float32: 1e-5, torch.float64: 1e-12}


def a_program(dtype=torch.float32, layout="tokens", weights_at="holder", **more):
    first = Dispatch("a", (3, 0, 6), layout, 4, weights_at, missing=0.2, **more)
    return Program(3, even(3, 7), 8, 3, (first, Combine("a")), dtype=dtype)


def outs(program):
    return [unpacked(each[-1][0]) for each in expected(program)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("layout", "weights_at"), WAYS)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_it_is_close_to_the_dense_sum(dtype, layout, weights_at, is_weighted):
    program = a_program(dtype, layout, weights_at, is_weighted=is_weighted, has_duplicates=True)
    setting = Setting(3, program.holders, program.max_tokens)
    for rank, out in enumerate(outs(program)):
        exact = reference.dense(setting, tokens_of(program, 0, (3, 0, 6), rank), program.expert)
        torch.testing.assert_close(out.double(), exact, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["experts", "slots"])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_layout_gives_the_same_bits(dtype, layout, weights_at):
    plain, other = outs(a_program(dtype, "tokens", weights_at)), outs(a_program(dtype, layout, weights_at))
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_rows_lie_by_source_and_token_with_local_ids():
    x = [torch.arange(4.0).reshape(2, 2) + 10 * rank for rank in range(2)]
    ids = [torch.tensor([[0, 2], [3, -1]]), torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)]
    weights = [torch.tensor([[0.5, 0.25], [1.0, 2.0]]) for _ in range(2)]
    tokens = [Tokens(*each) for each in zip(x, ids, weights, strict=True)]
    first, second = reference.dispatch(Setting(2, (0, 0, 1, 1), 4), tokens)
    assert first.x.tolist() == [[0, 1], [10, 11]]
    assert first.topk_idx.tolist() == [[0, -1], [1, 0]]
    assert first.topk_weights.tolist() == [[0.5, 0.0], [0.5, 0.25]]
    assert first.counts.tolist() == [2, 1]
    assert (second.sources.tolist(), second.tokens.tolist()) == ([0, 0, 1], [0, 1, 1])
    assert second.topk_idx.tolist() == [[-1, 0], [1, -1], [0, 1]]
    assert (first.topk_idx.dtype, second.topk_idx.dtype) == (torch.int64, torch.int32)


def test_experts_begin_at_multiples_of_the_alignment_and_padding_is_zero():
    x = torch.arange(1.0, 7.0).reshape(3, 2)
    tokens = [Tokens(x, torch.tensor([[1, 0], [1, 1], [2, -1]]), torch.full((3, 2), 0.5))]
    (made,) = reference.dispatch(Setting(1, (0, 0, 0), 4, layout="experts", alignment=4), tokens)
    assert made.offsets.tolist() == [0, 4, 8, 12]
    assert made.counts.tolist() == [1, 3, 1]
    zero = [0.0, 0.0]
    assert made.x.tolist() == [[1, 2], zero, zero, zero, [1, 2], [3, 4], [3, 4], zero, [5, 6], zero, zero, zero]
    assert made.topk_weights.tolist() == [0.5, 0, 0, 0, 0.5, 0.5, 0.5, 0, 0.5, 0, 0, 0]


def test_a_lost_rank_gives_and_takes_nothing():
    tokens = [Tokens(torch.ones(1, 1), torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]])) for _ in range(2)]
    setting = Setting(2, (0, 1), 4, lost=frozenset({1}))
    first, second = reference.dispatch(setting, tokens)
    assert (first.sources.tolist(), len(second.x)) == ([0], 0)
    ys = [torch.full((1, 1), 8.0 * 0.25), torch.ones(0, 1)]
    assert reference.combine(setting, tokens, ys)[0].tolist() == [[2.0]]
    whole = Setting(2, (0, 1), 4, lost=frozenset({1}), renormalise=True)
    assert reference.combine(whole, tokens, ys)[0].tolist() == [[8.0]]


def test_partial_sums_are_rounded_once_at_each_holder_and_once_at_the_source():
    ulp = 2.0**-7  # of bfloat16 at 1
    part = torch.tensor([[3 * ulp / 8]], dtype=torch.bfloat16)
    tokens = [Tokens(torch.ones(1, 1), torch.tensor([[0, 1, 2]])), Tokens(torch.ones(0, 1), torch.empty(0, 3).long())]
    ys = [torch.cat([torch.ones(1, 1, dtype=torch.bfloat16), part]), part]
    at_holders = reference.combine(Setting(2, (0, 0, 1), 4, layout="experts"), tokens, ys)[0]
    at_source = reference.combine(Setting(2, (0, 0, 1), 4, layout="experts", weights_at="source"), tokens, ys)[0]
    assert (at_holders.item(), at_source.item()) == (1.0, 1 + ulp)


def test_biases_are_added_before_the_only_rounding():
    tokens = [Tokens(torch.ones(1, 1), torch.tensor([[0]]))]
    y = [torch.tensor([[1.0]], dtype=torch.bfloat16)]
    biases = [[torch.full((1, 1), 2.0**-8, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16)]]
    assert reference.combine(Setting(1, (0,), 4), tokens, y, biases=biases)[0].item() == 1 + 2.0**-7


def test_quantised_rows_have_a_scale_for_each_128_columns():
    x, _ = draw_rows(np.random.default_rng(5), 5, 256, torch.float32, "plain")
    rows, scales = quantise(x)
    assert (rows.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 2))
    assert torch.equal(scales[:, 1], x[:, 128:].abs().amax(1) / 448)
    torch.testing.assert_close(reference.as_rows(rows, scales, torch.float32), x, rtol=0.07, atol=0.01)

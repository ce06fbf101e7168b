"""Rows of every dtype and width arrive byte by byte, and sums have the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from moe_programs import Combine, Dispatch, Program, even
from moe_rows import draw_rows

from raynixl.moe.quantising import quantise

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8]
WAYS = [("tokens", "holder"), ("experts", "holder"), ("experts", "source"), ("slots", "source")]


@pytest.mark.parametrize("layout_and_place", WAYS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_kind", ["plain", "strided", "bits"])
def test_every_dtype(plays, dtype, layout_and_place, x_kind):
    layout, weights_at = layout_and_place
    first = Dispatch("a", (5, 0, 3), layout, 4, weights_at, x_kind=x_kind, missing=0.2)
    plays(Program(3, even(3, 7), 256, 3, (first, Combine("a")), dtype=dtype))


@pytest.mark.parametrize("layout_and_place", WAYS, ids="-".join)
@pytest.mark.parametrize("hidden", [1, 2, 3, 7, 33, 1024, 2880, 3584, 7168])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_every_width(plays, hidden, dtype, layout_and_place):
    layout, weights_at = layout_and_place
    first = Dispatch("a", (3, 4), layout, 1, weights_at)
    plays(Program(2, even(2, 8), hidden, 3, (first, Combine("a", biases=1)), dtype=dtype))


@pytest.mark.parametrize("hidden", [128, 1024, 7168])
def test_rows_in_float8_are_those_of_quantising_here(crew, hidden):
    import numpy as np

    x = [draw_rows(np.random.default_rng(rank), 5, hidden, torch.bfloat16, "plain")[0] for rank in range(3)]
    ids = torch.arange(5)[:, None] % 3

    def work(rank, ep):
        return ep.dispatch(quantise(x[rank]), ids)

    options = {"experts": 3, "hidden": hidden, "topk": 1, "max_tokens": 5, "dtype": torch.float8_e4m3fn}
    with crew.experts(3, **options) as layer:
        for rank, made in enumerate(layer.run(work)):
            tokens = [token for token in range(5) if token % 3 == rank]
            rows, scales = zip(*(quantise(each[tokens]) for each in x), strict=True)
            assert made.x.dtype == torch.float8_e4m3fn
            assert torch.equal(made.x.view(torch.uint8), torch.cat(rows).view(torch.uint8))
            assert torch.equal(made.scales, torch.cat(scales))
            del made


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_experts_may_answer_in_another_dtype(crew, y_dtype):
    x = [torch.full((4, 32), rank + 0.5, dtype=torch.bfloat16) for rank in range(2)]
    ids = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 1]])

    def work(rank, ep):
        made = ep.dispatch(x[rank], ids)
        pairs = (made.topk_idx >= 0).sum(1, keepdim=True)
        return ep.combine(made.x.to(y_dtype) * pairs, made.handle)

    with crew.experts(2, experts=2, hidden=32, topk=2, max_tokens=4) as layer:
        for rank, out in enumerate(layer.run(work)):
            assert out.dtype == y_dtype
            assert torch.equal(out, torch.tensor([[2], [2], [1], [1]], dtype=y_dtype) * x[rank].to(y_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_to_the_nearest_and_ties_to_even(crew, dtype):
    ulp = torch.finfo(dtype).eps
    parts = torch.tensor([ulp / 2, 3 * ulp / 2, 0.75 * ulp, 0.25 * ulp], dtype=dtype)
    wanted = torch.tensor([1.0, 1 + 2 * ulp, 1 + ulp, 1.0], dtype=dtype)

    def work(rank, ep):
        made = ep.dispatch(torch.ones(1, 4, dtype=dtype), torch.tensor([[0, 1]]))
        y = torch.ones_like(made.x) if rank == 0 else parts.expand(made.x.shape)
        return ep.combine(y, made.handle)

    with crew.experts(2, experts=2, hidden=4, topk=2, max_tokens=1, dtype=dtype) as layer:
        for out in layer.run(work):
            assert torch.equal(out[0], wanted)


def test_sums_that_are_too_large_become_infinite(crew):
    def work(rank, ep):
        made = ep.dispatch(torch.full((1, 4), 60000.0, dtype=torch.float16), torch.tensor([[0, 1]]))
        return ep.combine(made.x, made.handle)

    with crew.experts(2, experts=2, hidden=4, topk=2, max_tokens=1, dtype=torch.float16) as layer:
        assert all(torch.isinf(out).all() for out in layer.run(work))

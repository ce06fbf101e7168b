"""Expert parallelism of one process equals the written reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from moe_autograd import LAYOUTS
from torch import Tensor

from raynixl.errors import ConfigError, RangeError
from raynixl.moe import reference
from raynixl.moe.local import LocalParallel

EXPERTS, HIDDEN, TOPK = 5, 16, 3


def _tokens(count: int, dtype: torch.dtype) -> reference.Tokens:
    generator = torch.Generator().manual_seed(count)
    idx = torch.randint(-1, EXPERTS, (count, TOPK), generator=generator)
    x = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    return reference.Tokens(x, idx, torch.rand(count, TOPK, generator=generator))


def _expert(name: int, rows: Tensor) -> Tensor:
    return rows * (name + 0.37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize(("layout", "weights_at"), LAYOUTS)
def test_one_process_returns_what_the_reference_does(
    layout: str, weights_at: str, count: int, dtype: torch.dtype
) -> None:
    given = _tokens(count, dtype)
    alignment = 8 if layout == "experts" else 1
    setting = reference.Setting(1, [0] * EXPERTS, 32, layout, alignment, weights_at)
    (arrived,) = reference.dispatch(setting, [given])
    ep = LocalParallel(experts=EXPERTS, hidden=HIDDEN, topk=TOPK)
    r = ep.dispatch(
        given.x, given.topk_idx, given.topk_weights, layout=layout, alignment=alignment, weights_at=weights_at
    )
    for name in ("x", "topk_idx", "topk_weights", "counts", "offsets", "sources", "tokens"):
        ours, theirs = getattr(r, name), getattr(arrived, name)
        assert (ours is None) == (theirs is None), name
        assert theirs is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), name
    y = reference.run_experts(setting, 0, arrived, _expert, dtype)
    (expected,) = reference.combine(setting, [given], [y])
    out = ep.combine(y, r.handle)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


def test_a_sum_starts_with_its_first_term() -> None:
    ep = LocalParallel(experts=2, hidden=1, topk=2)
    r = ep.dispatch(torch.full((1, 1), -0.0), torch.tensor([[0, -1]]), layout="experts", weights_at="source")
    assert torch.signbit(ep.combine(r.x, r.handle)).all()


def test_what_does_not_fit_is_refused() -> None:
    ep = LocalParallel(experts=EXPERTS, hidden=HIDDEN, topk=TOPK)
    x = torch.zeros(2, HIDDEN)
    with pytest.raises(RangeError, match=r"topk_idx lies in 0\.\.5; experts are 0\.\.4"):
        ep.dispatch(x, torch.tensor([[0, 1, 5], [0, 1, 2]]))
    with pytest.raises(ConfigError, match="do not fit each other"):
        ep.dispatch(x, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs topk_idx or a handle"):
        ep.dispatch(x)

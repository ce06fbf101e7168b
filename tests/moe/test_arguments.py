"""Arguments of any kind: all ranks hear of what cannot be used, before rows go anywhere; views are what they show."""

from __future__ import annotations

import pytest
import torch

from raynixl.errors import ConfigError

HIDDEN, TOKENS = 8, 4
OPTIONS = {"experts": 2, "hidden": HIDDEN, "topk": 1, "max_tokens": 16, "dtype": torch.float32}
X = torch.arange(1.0, TOKENS + 1)[:, None].repeat(1, HIDDEN)
IDS = torch.tensor([[0], [1], [0], [1]])


@pytest.fixture(scope="module")
def pair(crew):
    with crew.experts(2, deadline=5.0, **OPTIONS) as made:
        yield made


def refused_by_all(layer, work, good):
    """Whether all ranks raise ConfigError where rank 1 does what is wrong, and then do what is right."""
    errors = layer.errors(lambda rank, ep: work(ep) if rank == 1 else good(ep))
    assert [type(error) for error in errors] == [ConfigError] * 2, errors
    assert layer.errors(lambda rank, ep: good(ep)) == [None, None]
    return True


class Odd:
    """Neither true nor false."""

    def __bool__(self):
        raise RuntimeError("neither")


ODD_DISPATCH = {
    "sparse rows": {"x": X.to_sparse()},
    "rows without memory": {"x": X.to("meta")},
    "ids without memory": {"topk_idx": IDS.to("meta")},
    "weights without memory": {"topk_weights": torch.ones(TOKENS, 1, device="meta")},
    "nothing beside": {"extra": None},
    "lists beside": {"extra": ([1, 2, 3, 4],)},
    "a list of layouts": {"layout": ["tokens"]},
    "a tensor for a layout": {"layout": torch.ones(2)},
    "what has no truth": {"layout": Odd()},
    "a huge alignment": {"layout": "experts", "alignment": 1 << 40},
    "no alignment": {"alignment": "two"},
    "counts for other experts": {"stats": torch.zeros(5, dtype=torch.int64)},
    "counts that are true or false": {"stats": torch.zeros(1, dtype=torch.bool)},
    "counts in a list": {"stats": [0]},
    "counts of a leaf": {"stats": torch.zeros(1, requires_grad=True)},
}


@pytest.mark.parametrize("what", ODD_DISPATCH)
def test_all_ranks_hear_what_a_dispatch_cannot_use(pair, what):
    given = ODD_DISPATCH[what]
    weights = torch.ones(TOKENS, 1) if "topk_weights" in given else None
    usual = {"x": X, "topk_idx": IDS, "topk_weights": weights} | {k: v for k, v in given.items() if v == "experts"}
    assert refused_by_all(pair, lambda ep: ep.dispatch(**{**usual, **given}), lambda ep: ep.dispatch(**usual))


ODD_COMBINE = {
    "sparse y": {"y": X.to_sparse()},
    "y without memory": {"y": X.to("meta")},
    "a sparse bias": {"bias": X.to_sparse()},
    "a bias without memory": {"bias": X.to("meta")},
    "a number for a bias": {"bias": 3},
    "a sparse result": {"out": X.to_sparse()},
    "a negated result": {"out": torch._neg_view(X.clone())},
    "a result over itself": {"out": torch.zeros(1, HIDDEN).expand(TOKENS, HIDDEN)},
    "a result whose rows meet": {"out": torch.zeros(64).as_strided((TOKENS, HIDDEN), (HIDDEN - 1, 1))},
    "waits of many ranks": {"stats": torch.zeros(100, dtype=torch.float64)},
    "waits in whole numbers": {"stats": torch.zeros(2, dtype=torch.int64)},
    "waits in a list": {"stats": [0.0, 0.0]},
}


@pytest.mark.parametrize("what", ODD_COMBINE)
def test_all_ranks_hear_what_a_combine_cannot_use(pair, what):
    made = pair.run(lambda rank, ep: ep.dispatch(X, IDS))

    def odd(ep):
        return ep.combine(**{"y": made[1].x, "handle": made[1].handle, **ODD_COMBINE[what]})

    assert refused_by_all(pair, odd, lambda ep: ep.combine(made[ep.rank].x, made[ep.rank].handle))


def overlapping(way: str) -> dict[str, torch.Tensor]:
    """y, out and bias of which out shares memory with another."""
    memory = torch.ones(32, HIDDEN)
    y, bias, out = memory[:TOKENS], memory[8 : 8 + TOKENS], memory[16 : 16 + TOKENS]
    if way == "y":
        out = memory[1 : 1 + TOKENS]
    elif way == "y itself":
        out = y
    elif way == "the last element of y":
        out = memory.view(-1)[TOKENS * HIDDEN - 1 :][: TOKENS * HIDDEN].view(TOKENS, HIDDEN)
    elif way == "bias":
        out = memory[8 : 8 + TOKENS]
    elif way == "row of bias":
        bias = memory[18]
    return {"y": y, "bias": bias, "out": out}


@pytest.mark.parametrize("way", ["y", "y itself", "the last element of y", "bias", "row of bias"])
def test_a_result_that_lies_over_what_it_is_made_of_is_refused(pair, way):
    made = pair.run(lambda rank, ep: ep.dispatch(X, IDS))

    def odd(ep):
        return ep.combine(handle=made[1].handle, **overlapping(way))

    assert refused_by_all(pair, odd, lambda ep: ep.combine(made[ep.rank].x, made[ep.rank].handle))


def test_a_result_may_lie_beside_y_in_one_tensor(pair):
    def work(rank, ep):
        made = ep.dispatch(X, IDS)
        wide = torch.cat([made.x, torch.zeros_like(made.x)], dim=1)
        return ep.combine(wide[:, :HIDDEN], made.handle, out=wide[:TOKENS, HIDDEN:])

    assert all(torch.equal(out, X) for out in pair.run(work))


def test_rows_of_lazy_views_are_what_they_show(pair):
    def work(rank, ep):
        x = torch.complex(torch.zeros_like(X), X).conj().imag if rank else -X
        assert x.is_neg() == bool(rank)
        made = ep.dispatch(x, IDS, torch._neg_view(torch.full((TOKENS, 1), -2.0)), weights_at="source")
        return made.x.clone(), ep.combine(torch._neg_view(made.x), made.handle, bias=torch._neg_view(X))

    for rows, out in pair.run(work):
        assert bool((rows < 0).all())
        assert torch.equal(out, 2 * X - X)


def test_rows_of_conjugates_are_what_they_show(pair):
    def work(rank, ep):
        values = torch.complex(X, X)
        return ep.dispatch(values.conj() if rank else values.conj().resolve_conj(), IDS).x.clone()

    for rows in pair.run(work):
        assert bool((rows.imag == -rows.real).all())


def biases_of(kind: str) -> tuple[torch.Tensor, ...]:
    wide = torch.arange(float(TOKENS * 2 * HIDDEN)).view(TOKENS, 2 * HIDDEN)
    return {
        "one row length, other steps": (wide[:, :HIDDEN], wide[:, ::2]),
        "other steps first": (wide[:, ::2], wide[:, :HIDDEN]),
        "both in steps": (wide[:, ::2], wide[:, 1::2]),
        "a row and rows": (wide[0, :HIDDEN], wide[:, ::2]),
        "rows in steps": (wide[0, ::2], wide[1, 1::2]),
        "one row for all": (wide[:1, :HIDDEN].expand(TOKENS, HIDDEN), wide[:, HIDDEN:]),
        "columns": (wide.t().contiguous().t()[:, :HIDDEN], wide[:, HIDDEN:]),
        "other dtypes": (wide[:, :HIDDEN].bfloat16(), wide[:, ::2].half()),
        "float64": (wide[:, ::2].double(),),
        "a row of float64": (wide[0, ::2].double(),),
        "float64 and float32": (wide[:, ::2].double(), wide[:, 1::2]),
    }[kind]


KINDS = (
    "one row length, other steps", "other steps first", "both in steps", "a row and rows", "rows in steps",
    "one row for all", "columns", "other dtypes", "float64", "a row of float64", "float64 and float32",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_biases_of_any_form_are_added(pair, kind, dtype):
    biases = biases_of(kind)

    def work(rank, ep):
        made = ep.dispatch(X.to(dtype), IDS)
        return ep.combine(made.x, made.handle, bias=biases)

    want = X.to(dtype)
    for bias in biases:
        want = want + bias.to(dtype)
    for out in pair.run(work):
        assert out.dtype == dtype
        assert torch.equal(out, want)


def test_biases_are_exact_beside_float64(pair):
    fine = torch.full((TOKENS, HIDDEN), 1 + 2.0**-40, dtype=torch.float64)

    def work(rank, ep):
        made = ep.dispatch(torch.zeros_like(fine), IDS)
        return ep.combine(made.x, made.handle, bias=(fine, torch.zeros(HIDDEN)))

    assert all(torch.equal(out, fine) for out in pair.run(work))

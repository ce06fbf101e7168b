"""Gradients of dispatch and combine: those of plain torch, on every rank, in every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from moe_autograd import LAYOUTS, dense, matrices, run, run_experts, tokens_of
from moe_tools import Layer, Threads
from torch import Tensor
from torch.autograd import gradcheck

from raynixl.errors import ConfigError
from raynixl.moe.functional import combine, dispatch
from raynixl.moe.local import LocalParallel

EXPERTS, HIDDEN, TOPK, COUNTS = 5, 4, 3, (5, 0, 4)
SIZES = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK}
in_every_layout = pytest.mark.parametrize(("layout", "weights_at"), LAYOUTS)


@pytest.fixture(scope="module")
def crew() -> Iterator[Threads]:
    """Three ranks, each with one thread: there is one for each of them already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Threads(3) as crew:
        yield crew
    torch.set_num_threads(threads)


def own_experts(ep: Any, dtype: torch.dtype = torch.float64) -> dict[int, Tensor]:
    everybody = matrices(EXPERTS, HIDDEN, dtype)
    return {expert: everybody[expert] for expert in ep.local_experts}


@pytest.mark.pure
@in_every_layout
@pytest.mark.parametrize("given", [True, False], ids=["weights", "no-weights"])
@pytest.mark.usefixtures("crew")
def test_gradients_of_one_process_are_those_of_differences(layout: str, weights_at: str, *, given: bool) -> None:
    _check_by_differences(LocalParallel(**SIZES), layout, weights_at, given=given)


@in_every_layout
def test_gradients_of_one_rank_are_those_of_differences(crew: Threads, layout: str, weights_at: str) -> None:
    with crew.experts(1, **SIZES, max_tokens=16, dtype=torch.float64) as layer:
        layer.run(lambda _, ep: _check_by_differences(ep, layout, weights_at, given=True))


def _check_by_differences(ep: Any, layout: str, weights_at: str, *, given: bool) -> None:
    x, idx, weights = tokens_of(0, COUNTS[0], **SIZES)
    held = matrices(EXPERTS, HIDDEN)
    share = weights.detach() if given else None

    def of_rows(x: Tensor, *held: Tensor) -> Tensor:
        return run(ep, x, idx, share, dict(enumerate(held)), layout, weights_at)

    assert gradcheck(of_rows, [x, *held.values()])
    if given:  # weights travel in float32, in which steps of 1/64 are exact; the sum is linear in them

        def of_weights(weights: Tensor) -> Tensor:
            return run(ep, x.detach(), idx, weights, held, layout, weights_at)

        assert gradcheck(of_weights, [weights.detach().double().requires_grad_()], eps=1 / 64, atol=1e-6)


class Together(torch.autograd.Function):
    """All ranks' layer as one function: forward and backward run on all of them, each in its thread."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, layout: str, weights_at: str, *inputs: Tensor) -> Tensor:
        xs, held = inputs[: layer.world], inputs[layer.world :]
        leaves = [x.detach().requires_grad_() for x in xs]
        copies = [[one.detach().requires_grad_() for one in held] for _ in xs]

        @torch.enable_grad()
        def work(rank: int, ep: Any) -> Tensor:
            _, idx, weights = tokens_of(rank, COUNTS[rank], **SIZES)
            return run(ep, leaves[rank], idx, weights, dict(enumerate(copies[rank])), layout, weights_at)

        ctx.layer, ctx.leaves, ctx.copies = layer, leaves, copies
        ctx.outs = layer.run(work)
        return torch.cat([out.detach() for out in ctx.outs])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        parts = g.split([len(out) for out in ctx.outs])
        ctx.layer.run(lambda rank, _: ctx.outs[rank].backward(parts[rank], retain_graph=True))
        grads = [_taken(leaf) for leaf in ctx.leaves]
        held = [sum(_taken(copies[expert]) for copies in ctx.copies) for expert in range(EXPERTS)]
        return None, None, None, *grads, *held


def _taken(leaf: Tensor) -> Tensor:
    grad, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if grad is None else grad


@in_every_layout
def test_gradients_of_ranks_together_are_those_of_differences(crew: Threads, layout: str, weights_at: str) -> None:
    with crew.experts(2, **SIZES, max_tokens=16, dtype=torch.float64) as layer:
        xs = [tokens_of(rank, COUNTS[rank], **SIZES)[0] for rank in range(2)]
        held = [one.detach().requires_grad_() for one in matrices(EXPERTS, HIDDEN).values()]
        assert gradcheck(Together.apply, [layer, layout, weights_at, *xs, *held], fast_mode=True)


@in_every_layout
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_ranks_are_those_of_the_dense_layer(
    crew: Threads, world: int, layout: str, weights_at: str
) -> None:
    counts = COUNTS[-world:]
    expected = [_gradients(rank, counts, None, layout, weights_at) for rank in range(world)]
    with crew.experts(world, **SIZES, max_tokens=16, dtype=torch.float64) as layer:
        results = layer.run(lambda rank, ep: _gradients(rank, counts, ep, layout, weights_at))
        owners = [ep.local_experts for ep in layer.eps]
    for (out, dx, dweights, _), (their_out, their_dx, their_dweights, _) in zip(results, expected, strict=True):
        assert torch.allclose(out, their_out, rtol=0, atol=1e-12)
        assert torch.allclose(dx, their_dx, rtol=0, atol=1e-12)
        assert torch.allclose(dweights, their_dweights, rtol=1e-6, atol=1e-6)  # float32, as they travel
    for (_, _, _, held), names in zip(results, owners, strict=True):
        for name in names:
            assert torch.allclose(held[name], sum(one[3][name] for one in expected), rtol=0, atol=1e-12)


def _gradients(
    rank: int, counts: Sequence[int], ep: Any, layout: str, weights_at: str
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """Return output and gradients of one rank's loss; by the dense layer without `ep`."""
    x, idx, weights = tokens_of(rank, counts[rank], **SIZES)
    held = matrices(EXPERTS, HIDDEN)
    out = dense(x, idx, weights, held) if ep is None else run(ep, x, idx, weights, held, layout, weights_at)
    out.backward(torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).sin())
    assert x.grad is not None
    assert weights.grad is not None
    return out.detach(), x.grad, weights.grad, {name: _taken(one) for name, one in held.items()}


@in_every_layout
def test_ranks_that_need_no_gradient_take_part_in_backward(crew: Threads, layout: str, weights_at: str) -> None:
    """Rank 1 has no tokens; ranks 1 and 2 get no rows, since all go to rank 0; none of theirs asks for gradients."""

    def work(rank: int, ep: Any) -> Tensor | None:
        held = {expert: one.requires_grad_(rank == 0) for expert, one in own_experts(ep).items()}
        x = torch.ones(3 * (rank != 1), HIDDEN, dtype=torch.float64, requires_grad=rank == 0)
        idx = torch.zeros(len(x), TOPK, dtype=torch.int64)
        idx[:, 1:] = -1
        out = run(ep, x, idx, torch.ones(idx.shape), held, layout, weights_at)
        assert out.requires_grad
        (out.sum() * (rank != 1)).backward()
        return x.grad

    with crew.experts(**SIZES, max_tokens=16, dtype=torch.float64) as layer:
        first, *others = layer.run(work)
    x = torch.ones(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    torch.tanh(x @ matrices(EXPERTS, HIDDEN)[0]).sum().backward()
    assert torch.allclose(first, x.grad, rtol=0, atol=1e-12)
    assert others == [None, None]


def test_with_weights_at_the_source_values_and_gradients_have_the_same_bits_for_any_number_of_ranks(
    crew: Threads,
) -> None:
    options = {**SIZES, "hidden": 64}
    x, idx, weights = tokens_of(0, 24, **options, dtype=torch.float32)

    def work(ep: Any, part: slice) -> tuple[Any, ...]:
        own = [tensor[part].detach().requires_grad_(tensor.is_floating_point()) for tensor in (x, weights)]
        held = matrices(EXPERTS, 64, torch.float32)
        out = run(ep, own[0], idx[part], own[1], held, "experts", "source")
        out.backward(out.detach().cos())
        return out.detach(), own[0].grad, own[1].grad, {name: held[name].grad for name in ep.local_experts}

    expected = work(LocalParallel(**options), slice(None))
    for world, cuts in ((1, (0, 24)), (2, (0, 5, 24)), (3, (0, 11, 11, 24))):
        with crew.experts(world, **options, max_tokens=24, dtype=torch.float32) as layer:
            results = layer.run(lambda rank, ep, cuts=cuts: work(ep, slice(cuts[rank], cuts[rank + 1])))
        for ours, theirs in zip(zip(*[one[:3] for one in results], strict=True), expected, strict=False):
            assert torch.cat(ours).view(torch.int32).equal(theirs.view(torch.int32))
        for _, _, _, held in results:
            assert all(torch.equal(grad, expected[3][name]) for name, grad in held.items())


@in_every_layout
def test_rows_in_bfloat16_have_gradients_in_bfloat16(crew: Threads, layout: str, weights_at: str) -> None:
    def work(rank: int, ep: Any) -> float:
        x, idx, weights = tokens_of(rank, 5, **SIZES)
        grads = []
        for dtype in (torch.bfloat16, torch.float64):
            own = x.detach().bfloat16().to(dtype).requires_grad_()
            held = {name: one.bfloat16().to(dtype) for name, one in matrices(EXPERTS, HIDDEN).items()}
            if dtype is torch.bfloat16:
                run(ep, own, idx, weights, held, layout, weights_at).sum().backward()
            else:
                dense(own, idx, weights, held).sum().backward()
            assert own.grad is not None
            assert own.grad.dtype == dtype
            grads.append(own.grad.double())
        return (grads[0] - grads[1]).abs().max().item() / grads[1].abs().max().item()

    with crew.experts(2, **SIZES, max_tokens=16, dtype=torch.bfloat16) as layer:
        assert max(layer.run(work)) < 0.05


@in_every_layout
def test_a_handle_carries_other_rows_with_other_weights(crew: Threads, layout: str, weights_at: str) -> None:
    """The gradients of both dispatches come back, and where the second has no weights it has the first one's."""

    def work(rank: int, ep: Any) -> list[Tensor]:
        x, idx, weights = tokens_of(rank, COUNTS[rank], **SIZES)
        held, new = matrices(EXPERTS, HIDDEN), (weights.detach() / 2).requires_grad_()
        names = [held[name] for name in ep.local_experts]
        first = dispatch(ep, x, idx, weights, layout=layout, weights_at=weights_at)
        total = combine(ep, run_experts(first, names, layout, weights_at), first.handle)
        for factor, given in ((2, new), (3, None)):
            r = dispatch(ep, factor * x, topk_weights=given, handle=first.handle)
            total = total + combine(ep, run_experts(r, names, layout, weights_at), r.handle)
        total.sum().backward()
        ours = [total.detach(), *(_taken(leaf) for leaf in (x, weights, new))]
        total = dense(x, idx, weights, held) + dense(2 * x, idx, new, held)
        total = total + dense(3 * x, idx, weights.detach(), held)
        total.sum().backward()
        for mine, theirs in zip(ours, [total, *(_taken(leaf) for leaf in (x, weights, new))], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12 if mine.dtype == torch.float64 else 1e-5)
        return ours

    with crew.experts(**SIZES, max_tokens=16, dtype=torch.float64) as layer:
        layer.run(work)
    work(0, LocalParallel(**SIZES))


def test_two_layers_go_back_in_the_reverse_order(crew: Threads) -> None:
    def work(rank: int, ep: Any) -> tuple[Tensor, Tensor]:
        x, idx, weights = tokens_of(rank, COUNTS[rank], **SIZES)
        held = matrices(EXPERTS, HIDDEN)
        inner = x + run(ep, x, idx, weights, held, "experts", "source")
        outer = inner + run(ep, inner, idx.flip(1), weights, held, "tokens", "holder")
        outer.sum().backward()
        ours, x.grad = x.grad, None
        inner = x + dense(x, idx, weights, held)
        (inner + dense(inner, idx.flip(1), weights, held)).sum().backward()
        assert ours is not None
        assert x.grad is not None
        return ours, x.grad

    with crew.experts(**SIZES, max_tokens=16, dtype=torch.float64) as layer:
        for ours, theirs in layer.run(work):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_result_says_where_rows_came_from(crew: Threads) -> None:
    def work(rank: int, ep: Any) -> tuple[list[int], list[int]]:
        x, _, _ = tokens_of(rank, 2, **SIZES)
        r = dispatch(ep, x, torch.full((2, TOPK), EXPERTS - 1))
        return r.sources.tolist(), r.tokens.tolist()

    with crew.experts(2, **SIZES, max_tokens=16, dtype=torch.float64) as layer:
        assert layer.run(work) == [([], []), ([0, 0, 1, 1], [0, 1, 0, 1])]


def test_without_gradients_no_graph_is_made() -> None:
    ep = LocalParallel(**SIZES)
    x, idx, weights = tokens_of(0, 4, **SIZES)
    with torch.no_grad():
        r = dispatch(ep, x, idx, weights, layout="experts")
        out = combine(ep, r.x, r.handle)
    assert not r.x.requires_grad
    assert not out.requires_grad


def test_gradients_of_gradients_are_refused() -> None:
    x, idx, weights = tokens_of(0, 4, **SIZES)
    out = run(LocalParallel(**SIZES), x, idx, weights, matrices(EXPERTS, HIDDEN), "experts", "source")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_has_no_gradient_is_refused() -> None:
    ep = LocalParallel(**SIZES)
    x, idx, weights = tokens_of(0, 4, **SIZES)
    with pytest.raises(ConfigError, match="eight bits have no gradient"):
        dispatch(ep, (x, weights), idx)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layout 'slots' has no gradient"):
        dispatch(ep, x, idx, layout="slots")
    with pytest.raises(ConfigError, match=r"give the handle of raynixl\.moe\.dispatch"):
        combine(ep, x, ep.dispatch(x, idx).handle)

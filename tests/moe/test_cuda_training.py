"""Gradients on GPUs that are made up: a layer over ranks trains as it does in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import GpuCrew, gpu_crew
from torch import nn

from raynixl.moe import MoELayer, Router, TwoLevel
from raynixl.moe.grid import Grid

EXPERTS, HIDDEN, TOPK, WORLD = 5, 8, 2, 2


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(WORLD) as made:
        yield made


class Scaled(nn.Module):
    """An expert that works row by row and column by column, so that its bits do not hang on how many rows there are."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, HIDDEN + 1) / (number + 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.relu(rows * self.weight)


def made(ep=None, weights_at="source"):
    router = Router(hidden=HIDDEN, experts=EXPERTS, topk=TOPK)
    with torch.no_grad():  # ranks are threads, which share torch's own generator
        router.linear.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3)))
    held = range(EXPERTS) if ep is None else ep.local_experts
    return MoELayer(router, {number: Scaled(number) for number in held}, ep=ep, weights_at=weights_at)


def rows_of(rank):
    return torch.randn(7 - 3 * rank, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()


@pytest.mark.parametrize("weights_at", ["source", "holder"])
def test_values_and_gradients_are_those_of_one_process(crew, weights_at):
    def run(rank, ep):
        layer, x = made(ep, weights_at), rows_of(rank)
        outs = []
        for _ in range(2):
            out = layer(x)
            out.square().sum().backward()
            outs.append(out.detach())
        return outs, x.grad, layer.router.linear.weight.grad, {k: e.weight.grad for k, e in layer.experts.items()}

    options = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": 8, "dtype": torch.float32}
    with crew.experts(WORLD, **options) as layers:
        results = layers.run(run)
        assert all("put rows into the peers' memory" in ep.explain() for ep in layers.eps)
    grads = {name: grad for *_, each in results for name, grad in each.items()}
    whole = {str(number): torch.zeros(HIDDEN) for number in range(EXPERTS)}
    for rank, (outs, x_grad, router_grad, _) in enumerate(results):
        local, x = made(weights_at=weights_at), rows_of(rank)
        for out in outs:
            wanted = local(x)
            wanted.square().sum().backward()
            if weights_at == "source":
                assert torch.equal(out, wanted.detach())
            torch.testing.assert_close(out, wanted.detach())
        torch.testing.assert_close(x_grad, x.grad)
        torch.testing.assert_close(router_grad, local.router.linear.weight.grad)
        for name, expert in local.experts.items():
            whole[name] += expert.weight.grad
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole[name])


@pytest.mark.parametrize("weights_at", ["source", "holder"])
def test_so_they_are_in_two_stages_by_way_of_the_host(crew, weights_at):
    """With the weights at the source values have the bits of one process, and all that comes back was brought."""

    def run(rank, ep):
        layer, x = made(ep, weights_at), rows_of(rank)
        out = layer(x)
        out.square().sum().backward()
        assert out.data_ptr() in crew.gpus.brought
        return (
            out.detach(),
            x.grad,
            layer.router.linear.weight.grad,
            {k: e.weight.grad for k, e in layer.experts.items()},
        )

    options = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": 8, "dtype": torch.float32}
    with crew.experts(WORLD, **options, kind=TwoLevel, grid=Grid(((0,), (1,)))) as layers:
        results = layers.run(run)
        assert all("through memory of the host" in ep.explain() for ep in layers.eps)
    whole = {str(number): torch.zeros(HIDDEN) for number in range(EXPERTS)}
    for rank, (out, x_grad, router_grad, _) in enumerate(results):
        local, x = made(weights_at=weights_at), rows_of(rank)
        wanted = local(x)
        wanted.square().sum().backward()
        assert weights_at != "source" or torch.equal(out, wanted.detach())
        for found, grad in ((out, wanted.detach()), (x_grad, x.grad), (router_grad, local.router.linear.weight.grad)):
            torch.testing.assert_close(found, grad)
        for name, expert in local.experts.items():
            whole[name] += expert.weight.grad
    for *_, grads in results:
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name])

"""The layer: routers, experts that lie on ranks or in one process, loads, and experts that move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_tools import Threads
from torch import Tensor, nn

from raynixl.errors import ConfigError
from raynixl.moe.layer import MoELayer, Router, Scores

EXPERTS, HIDDEN, TOPK, LEARNING_RATE = 5, 32, 2, 0.5
SIZES = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK}
CUTS = {1: (0, 20), 2: (0, 7, 20), 3: (0, 13, 13, 20)}


@pytest.fixture(scope="module")
def crew() -> Iterator[Threads]:
    """Three ranks, each with one thread: there is one for each of them already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Threads(3) as crew:
        yield crew
    torch.set_num_threads(threads)


def make_expert(name: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    weights = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(name)) / 8
    expert = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Tanh())
    expert[0].weight.data = weights
    return expert.to(dtype)


def make_layer(ep: Any = None, **options: Any) -> MoELayer:
    router = Router(**SIZES)
    router.linear.weight.data = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(99))
    names = range(EXPERTS) if ep is None else ep.local_experts
    return MoELayer(router, {name: make_expert(name) for name in names}, ep=ep, **options)


def tokens() -> Tensor:
    return torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(7))


def test_the_layer_is_the_weighted_sum_of_the_chosen_experts() -> None:
    layer, x = make_layer().double(), tokens().double()
    chosen, weights = layer.router(x)
    assert torch.allclose(weights.sum(1), torch.ones(20, dtype=torch.float64))
    expected = torch.zeros_like(x)
    for token in range(20):
        for name, weight in zip(chosen[token].tolist(), weights[token].float().double(), strict=True):
            expected[token] += weight * layer.experts[str(name)](x[token])
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(layer(x.reshape(4, 5, HIDDEN)).reshape(20, HIDDEN), layer(x))


@pytest.mark.parametrize("scores", list(Scores))
@pytest.mark.parametrize("normalised", [True, False])
def test_a_router_weighs_its_choice_by_its_scores(scores: Scores, *, normalised: bool) -> None:
    router = Router(**SIZES, scores=scores, normalised=normalised)
    chosen, weights = router(tokens())
    logits = router.linear(tokens())
    all_scores = logits.softmax(1) if scores is Scores.SOFTMAX else logits.sigmoid()
    best, order = all_scores.topk(TOPK, dim=1)
    assert torch.equal(chosen, order)
    assert torch.allclose(weights, best / best.sum(1, keepdim=True) if normalised else best)


def test_a_router_of_bfloat16_weighs_in_float32() -> None:
    _, weights = Router(**SIZES).bfloat16()(tokens().bfloat16())
    assert weights.dtype == torch.float32


def test_a_router_that_chooses_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match="top 6 of 5 experts"):
        Router(hidden=HIDDEN, experts=EXPERTS, topk=6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_on_ranks_is_training_in_one_process_bit_for_bit(crew: Threads, world: int) -> None:
    expected, _ = _train(make_layer(), [slice(None)])
    parts = [slice(begin, end) for begin, end in zip(CUTS[world], CUTS[world][1:], strict=False)]
    with crew.experts(world, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        results = layer.run(lambda rank, ep: _train(make_layer(ep), [parts[rank]]))
    for step, whole in enumerate(expected):
        assert torch.equal(torch.cat([outs[step] for outs, _ in results]), whole)
    states = {name: value for _, state in results for name, value in state.items()}
    assert states.keys() == {f"experts.{name}.0.weight" for name in range(EXPERTS)}
    assert all(torch.equal(states[name], value) for name, value in _train(make_layer(), [slice(None)])[1].items())


def _train(layer: MoELayer, parts: list[slice]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train the experts for some steps; return each step's output and, at the end, the experts' state."""
    layer.router.requires_grad_(False)  # its gradients are sums over ranks
    optimizer = torch.optim.SGD(layer.experts.parameters(), LEARNING_RATE)
    outs = []
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.cat([tokens()[part] for part in parts])
        out = layer(x)
        (out * out.detach().sin()).sum().backward()
        optimizer.step()
        outs.append(out.detach())
    return outs, {name: value for name, value in layer.state_dict().items() if name.startswith("experts")}


def test_training_does_not_need_more_memory_step_by_step(crew: Threads) -> None:
    def work(rank: int, ep: Any) -> list[int]:
        layer, slots = make_layer(ep), []
        for _ in range(25):
            x = tokens()[10 * rank : 10 * rank + 10].requires_grad_()
            layer(x + layer(x)).sum().backward()
            slots.append(ep.statistics().slot_nbytes)
        return slots

    with crew.experts(2, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        for slots in layer.run(work):
            assert slots[-1] == slots[10]


@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_weights_may_be_applied_at_either_end_and_experts_see_aligned_rows(crew: Threads, weights_at: str) -> None:
    expected = make_layer()(tokens()).detach()

    def work(rank: int, ep: Any) -> Tensor:
        layer = make_layer(ep, weights_at=weights_at, alignment=8)
        for expert in layer.experts.values():
            expert.register_forward_pre_hook(lambda _, args: _check_rows(args[0]))
        return layer(tokens()[10 * rank : 10 * rank + 10]).detach()

    with crew.experts(2, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        assert torch.allclose(torch.cat(layer.run(work)), expected, atol=1e-5)


def _check_rows(rows: Tensor) -> None:
    assert len(rows) % 8 == 0


def test_loads_count_pairs_by_physical_expert(crew: Threads) -> None:
    single = make_layer()
    single(tokens())
    assert sum(single.loads().values()) == 20 * TOPK

    def work(rank: int, ep: Any) -> tuple[dict[int, int], dict[int, int]]:
        layer = make_layer(ep)
        for _ in range(2):
            layer(tokens()[10 * rank : 10 * rank + 10])
        return layer.loads(), layer.last_loads()

    with crew.experts(2, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        results = layer.run(work)
    assert {name: load for _, last in results for name, load in last.items()} == single.loads()
    assert {name: load for total, _ in results for name, load in total.items()} == {
        name: 2 * load for name, load in single.loads().items()
    }


def test_an_expert_is_restored_from_what_another_rank_has_saved(crew: Threads) -> None:
    saved = make_layer()
    for parameter in saved.experts.parameters():
        parameter.data *= 2
    expected = saved(tokens()).detach()

    def work(rank: int, ep: Any) -> Tensor:
        layer = make_layer(ep)
        own = {name: value for name, value in saved.state_dict().items() if name in layer.state_dict()}
        layer.load_state_dict(own)
        return layer(tokens()[10 * rank : 10 * rank + 10]).detach()

    with crew.experts(2, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        assert torch.equal(torch.cat(layer.run(work)), expected)


def test_an_expert_moves_to_another_rank_between_two_steps(crew: Threads) -> None:
    expected = make_layer()(tokens()).detach()
    state = make_expert(0).state_dict()

    def work(rank: int, ep: Any) -> tuple[tuple[int, ...], Tensor, Tensor]:
        part = tokens()[10 * rank : 10 * rank + 10]
        layer = make_layer(ep)
        before = layer(part).detach()
        ep.place([1, 0, 1, 0, 1])
        modules = {name: make_expert(name + 100) for name in ep.local_experts}
        layer.hold(modules)
        for name, module in modules.items():
            module.load_state_dict(state if name == 0 else make_expert(name).state_dict())
        return tuple(layer.loads()), before, layer(part).detach()

    with crew.experts(2, **SIZES, max_tokens=20, dtype=torch.float32) as layer:
        results = layer.run(work)
    assert [names for names, _, _ in results] == [(1, 3), (0, 2, 4)]
    for outs in list(zip(*results, strict=True))[1:]:
        assert torch.equal(torch.cat(outs), expected)


def test_modules_of_other_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 0 has experts \[0, 1, 2, 3, 4\], given are \[0, 1\]"):
        MoELayer(Router(**SIZES), {name: make_expert(name) for name in range(2)})


def test_a_rank_without_tokens_gives_its_experts_all_zero_gradients_but_gradients(crew: Threads) -> None:
    def work(rank: int, ep: Any) -> tuple[bool, bool]:
        layer = make_layer(ep)
        out = layer(torch.zeros(0, HIDDEN))
        out.sum().backward()
        grads = [parameter.grad for parameter in layer.parameters()]
        return out.shape == (0, HIDDEN), all(grad is not None and not grad.any() for grad in grads)

    with crew.experts(**SIZES, max_tokens=20, dtype=torch.float32) as layer:
        assert layer.run(work) == [(True, True)] * 3

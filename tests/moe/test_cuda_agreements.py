"""Agreements on windows of GPUs that are made up, where one rank differs; what handles keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_cuda_crews import OPTIONS, TOKENS, GpuCrew, agree, gpu_crew, tokens

from raynixl.errors import BackendUnavailable, ConfigError, RangeError

WORLD = 3


@pytest.fixture
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(WORLD) as made:
        yield made


def test_a_rank_whose_first_call_is_wrong_makes_windows_as_large_as_the_others_need(crew: GpuCrew) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:
        beside = torch.ones(TOKENS, 900)

        def first(rank: int, ep: Any) -> None:
            x, ids, weights = tokens(rank)
            ep.dispatch(x, ids[:, :1] if rank == 1 else ids, weights, layout="tokens", extra=(beside,))

        assert [type(error) for error in layer.errors(first)] == [ConfigError] * WORLD
        assert all("put rows into the peers' memory" in ep.explain() for ep in layer.eps)
        assert len({ep._path._agreed.frame for ep in layer.eps}) == 1
        agree(layer)


@pytest.mark.parametrize(("call", "error"), [("window", BackendUnavailable), ("empty", RangeError)])
def test_where_one_rank_has_or_reaches_no_window_all_go_through_the_host(
    crew: GpuCrew, monkeypatch: pytest.MonkeyPatch, call: str, error: type[Exception]
) -> None:
    true = getattr(crew.agents[2], call)

    def fail(*arguments: Any, **options: Any) -> Any:
        if options.get("kind") == "vram" or options.get("device") is not None:
            raise error("there is none")
        return true(*arguments, **options)

    monkeypatch.setattr(crew.agents[2], call, fail)
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)
        said = [ep.explain() for ep in layer.eps]
        assert all("go through memory of the host" in one for one in said), said
        assert all("rank 2" in one for one in said[:2]), said


def test_weights_may_be_changed_in_place_once_the_dispatch_has_returned(crew: GpuCrew) -> None:
    with crew.experts(WORLD, **OPTIONS) as layer:

        def work(rank: int, ep: Any) -> bool:
            x, ids, weights = tokens(rank)
            r = ep.dispatch(x, ids, weights, layout="tokens", weights_at="source")
            weights.zero_()
            row, _ = (r.topk_idx >= 0).nonzero(as_tuple=True)
            return torch.equal(ep.combine(r.x[row], r.handle), x * 0.25 + x * 0.5)

        assert layer.run(work) == [True] * WORLD

"""Where kernels do not reach all peers, rows of a GPU go through the host, on all ranks alike, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moe_cuda_crews import OPTIONS, GpuCrew, agree, gpu_crew, tokens
from moe_programs import Cached, Combine, CombineWeights, Dispatch, Program, check, even, play

WAYS = [("tokens", 1, "holder"), ("experts", 4, "source"), ("slots", 1, "source")]


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    """The last rank's agent has no nvlink."""
    with gpu_crew(3) as made:
        made.agents[2].backends[:] = [one for one in made.agents[2].backends if one.name != "nvlink"]
        yield made


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_rows_go_through_the_host_with_the_same_bits(crew, way):
    steps = (
        Dispatch("a", (3, 0, 5), *way), Combine("a", biases=1), Cached("b", "a"), Combine("b", out="given"),
        *((CombineWeights("a"),) if way[0] != "slots" else ()),
    )  # fmt: skip
    program = Program(3, even(3, 7), 16, 3, steps)
    with crew.experts(3, **program.options()) as layer:
        played = layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank]))
        check(program, played)
        said = [ep.explain() for ep in layer.eps]
        assert all("go through memory of the host" in one for one in said)
        assert "no window" in said[2]
        assert all("rank 2" in one for one in said)
        assert "go through memory of the host" in repr(layer.eps[0])


def test_two_of_them_that_reach_each_other_need_no_host(crew):
    with crew.experts(2, **OPTIONS) as layer:
        agree(layer)
        assert all("put rows into the peers' memory" in ep.explain() for ep in layer.eps)


def test_tensors_of_the_host_go_their_own_way_beside(crew):
    with crew.experts(2, **OPTIONS) as layer:
        agree(layer)

        def on_host(rank, ep):
            with crew.gpus.on_host():
                r = ep.dispatch(*tokens(rank))
                return ep.combine(r.x, r.handle).shape

        assert layer.run(on_host) == [tokens(0)[0].shape] * 2
        agree(layer, 1)
        layer.run(lambda _, ep: ep.synchronise())
        agree(layer, 2)

"""What goes between two ranks in the common case: one write of rows and the line behind it, and a line of counts before
them in a dispatch, unless it is small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_tools import Threads

from raynixl import Agent
from raynixl.moe.rank import EAGER_NBYTES

WORLD, STEPS = 3, 5


@pytest.fixture(scope="module", params=["loopback", "ucx"])
def crew(request: pytest.FixtureRequest) -> Iterator[Threads]:
    """Three ranks whose memory is mapped to each other, or is not."""
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    with Threads(WORLD, backends=(request.param,)) as made:
        yield made


def counts(ep: Any) -> dict[int, Counter[str]]:
    """What has gone to each peer."""
    return {one.rank: Counter(lines=one.lines, puts=one.puts) for one in ep.statistics().peers}


def writes(agent: Agent) -> Counter[str]:
    """How many transfers the transport has carried to each peer."""
    return Counter({route.peer: route.transfers for route in agent.statistics().routes if route.backend == "ucx"})


@pytest.mark.parametrize(
    ("layout", "is_cached", "is_eager", "lines"),
    [
        ("tokens", False, False, 2), ("experts", False, False, 2), ("tokens", True, False, 1),
        ("slots", False, False, 1), ("tokens", False, True, 1), ("experts", False, True, 1), ("tokens", True, True, 1),
    ],
)  # fmt: skip
def test_a_dispatch_is_two_lines_and_a_write_one_line_if_places_are_known_and_a_combine_one_and_a_write(
    crew: Threads, layout: str, is_cached: bool, is_eager: bool, lines: int
) -> None:
    def work(rank: int, ep: Any) -> None:
        agent, ids = crew.agents[rank], torch.arange(WORLD).repeat(4, 1)  # each token to every rank
        x, weights = torch.ones(4, 16), torch.ones(4, WORLD)
        first = ep.dispatch(x, ids, weights, layout=layout)
        ep.combine(first.x, first.handle)
        before, carried = counts(ep), writes(agent)
        for _ in range(STEPS):
            if is_cached:
                r = ep.dispatch(x, handle=first.handle, layout=layout)
            else:
                r = ep.dispatch(x, ids, weights, layout=layout)
            ep.combine(r.x, r.handle)
        for peer, now in counts(ep).items():
            now.subtract(before[peer])
            assert now == Counter(lines=(lines + 1) * STEPS, puts=2 * STEPS)
        carried = writes(agent) - carried
        assert all(count == 2 * STEPS for count in carried.values())  # all fields of a put are one transfer
        assert len(carried) in (0, WORLD - 1)

    eager_nbytes = EAGER_NBYTES if is_eager else 0
    options = {"hidden": 16, "max_tokens": 8, "dtype": torch.float32, "eager_nbytes": eager_nbytes}
    with crew.experts(experts=WORLD, topk=WORLD, **options) as layer:
        layer.run(work)


def test_ranks_without_rows_for_each_other_exchange_lines_alone(crew: Threads) -> None:
    def work(rank: int, ep: Any) -> None:
        before = counts(ep)
        r = ep.dispatch(torch.ones(4, 16), torch.full((4, 1), rank))
        ep.combine(r.x, r.handle)
        for peer, now in counts(ep).items():
            now.subtract(before[peer])
            assert now == Counter(lines=3, puts=0)

    with crew.experts(experts=WORLD, hidden=16, topk=1, max_tokens=8, dtype=torch.float32) as layer:
        layer.run(work)

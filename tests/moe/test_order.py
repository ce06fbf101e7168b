"""Operations keep their order and their step: a rank that falls out of step says so, and comes back."""

from __future__ import annotations

import pytest
import torch

from raynixl import Group
from raynixl.errors import ConfigError, Masked, RangeError
from raynixl.moe import ExpertParallel

WORLD, HIDDEN = 3, 8
OPTIONS = {"experts": 3, "hidden": HIDDEN, "topk": 1, "max_tokens": 16, "dtype": torch.float32}


def rows_of(rank: int, step: int = 0) -> torch.Tensor:
    """Six tokens that tell where they come from."""
    return (100 * rank + 10 * step + torch.arange(6.0))[:, None].expand(6, HIDDEN).contiguous()


IDS = torch.arange(6)[:, None] % 3


def step_of(ep, rank, step=0, **options):
    """Dispatch and combine with experts that double."""
    made = ep.dispatch(rows_of(rank, step), IDS, **options)
    return made, ep.combine(2 * made.x, made.handle)


@pytest.fixture
def layer(crew):
    with crew.experts(WORLD, deadline=5.0, **OPTIONS) as made:
        yield made


def test_a_name_that_is_open_is_refused_and_its_layer_goes_on(crew, layer):
    name = layer.eps[0].name

    def work(rank, ep):
        with pytest.raises(ConfigError, match="name= of its own"):
            ExpertParallel(layer.groups[rank], name=name, **OPTIONS)
        return step_of(ep, rank)[1]

    for rank, out in enumerate(layer.run(work)):
        assert torch.equal(out, 2 * rows_of(rank))


def test_who_leaves_a_step_amid_its_exchanges_is_told_and_comes_back(layer):
    """Rank 1 has no memory for its next slot, behind the counts: the others lose it, nobody mixes two steps up."""

    def work(rank, ep):
        pool, x = ep._session.pool, rows_of(rank)
        if rank != 1:
            made = ep.dispatch(x, IDS, deadline=1.0)
            lost = made.lost
            while 1 not in ep.active:
                made = ep.dispatch(x, IDS, deadline=5.0)
            return lost, ep.combine(2 * made.x, made.handle)
        take = pool.take
        pool.take = lambda nbytes=0: (_ for _ in ()).throw(RangeError("no memory"))
        with pytest.raises(RangeError, match="no memory"):
            ep.dispatch(x, IDS, deadline=1.0)
        pool.take = take
        with pytest.raises(Masked, match="amid its exchanges"):
            ep.dispatch(x, IDS)
        ep.rejoin()
        made = ep.dispatch(x, IDS)
        return (), ep.combine(2 * made.x, made.handle)

    first, second, third = layer.run(work)
    assert first[0] == third[0] == (1,)
    for rank, (_, out) in enumerate((first, second, third)):
        assert torch.equal(out, 2 * rows_of(rank))


def test_placements_wait_for_operations_that_were_called_before(layer):
    turned = (1, 2, 0)

    def work(rank, ep):
        seen = []
        for step in range(20):
            ep.place((0, 1, 2))
            pending = [ep.dispatch(rows_of(rank, step), IDS, async_=True)]
            ep.place(turned)
            pending.append(ep.dispatch(rows_of(rank, step), IDS, async_=True))
            made = [each.wait(10.0) for each in pending]
            seen.append([each.x[:, 0].tolist() for each in made])
        return seen

    for rank, seen in enumerate(layer.run(work)):
        for step, both in enumerate(seen):
            for holders, rows in zip(((0, 1, 2), turned), both, strict=True):
                wanted = [
                    float(100 * r + 10 * step + t) for r in range(WORLD) for t in range(6) if holders[t % 3] == rank
                ]
                assert rows == wanted


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), -1.0, 0.0, "soon"])
def test_a_deadline_that_is_none_is_refused_on_all_ranks(layer, deadline):
    def work(rank, ep):
        with pytest.raises(ConfigError, match="deadline"):
            ep.dispatch(rows_of(rank), IDS, deadline=deadline if rank == 2 else 5.0)
        return step_of(ep, rank)[1]

    for rank, out in enumerate(layer.run(work)):
        assert torch.equal(out, 2 * rows_of(rank))


@pytest.mark.parametrize("deadline", [float("nan"), -1.0])
def test_a_layer_with_such_a_deadline_is_refused(crew, deadline):
    with Group(crew.agents[0], [crew.names[0]], name="alone") as group, pytest.raises(ConfigError, match="deadline"):
        ExpertParallel(group, deadline=deadline, name="alone", **OPTIONS)


def test_nothing_begins_behind_a_close(crew):
    with Group(crew.agents[0], [crew.names[0]], name="closed") as group:
        ep = ExpertParallel(group, name="closed", **OPTIONS)
        assert ep.dispatch(rows_of(0), IDS, async_=True).wait(5.0).x.shape == (6, HIDDEN)
        ep.close()
        with pytest.raises(ConfigError, match="closed"):
            ep.dispatch(rows_of(0), IDS, async_=True)

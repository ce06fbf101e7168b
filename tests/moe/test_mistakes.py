"""Calls that are wrong, or differ between ranks: a clear error of all ranks alike, and the next step works."""

from __future__ import annotations

import pytest
import torch
from moe_programs import even
from moe_tools import DEADLINE

from raynixl import Group
from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe import ExpertParallel

OPTIONS = {"experts": 6, "hidden": 8, "topk": 2, "max_tokens": 4}
X = torch.ones(3, 8, dtype=torch.bfloat16)
IDS = torch.tensor([[0, 5], [2, -1], [3, 3]])
WEIGHTS = torch.full((3, 2), 0.5)

BAD_TOKENS = {
    "one column too many": (torch.ones(3, 9, dtype=torch.bfloat16), IDS, WEIGHTS),
    "one dimension": (torch.ones(8, dtype=torch.bfloat16), IDS, WEIGHTS),
    "fewer ids than tokens": (X, IDS[:2], WEIGHTS[:2]),
    "fewer weights than ids": (X, IDS, WEIGHTS[:2]),
    "another topk": (X, IDS[:, :1], WEIGHTS[:, :1]),
    "ids that are no integers": (X, IDS.float(), WEIGHTS),
    "no ids": (X, None, WEIGHTS),
    "no tensor": (X.tolist(), IDS, WEIGHTS),
}
DIFFERENT = {
    "another dtype": lambda ep: ep.dispatch(X.float(), IDS, WEIGHTS),
    "no weights": lambda ep: ep.dispatch(X, IDS),
    "another layout": lambda ep: ep.dispatch(X, IDS, WEIGHTS, layout="experts"),
    "slots": lambda ep: ep.dispatch(X, IDS, WEIGHTS, layout="slots"),
    "weights at the source": lambda ep: ep.dispatch(X, IDS, WEIGHTS, weights_at="source"),
    "scales": lambda ep: ep.dispatch((X.to(torch.float8_e4m3fn), torch.ones(3, 1)), IDS, WEIGHTS),
}


@pytest.fixture
def trio(crew):
    with crew.experts(3, **OPTIONS) as layer:
        yield layer


def works(layer):
    """Whether a step gives what it must: experts that return their rows, whose weights sum up."""

    def step(rank, ep):
        made = ep.dispatch(X, IDS, WEIGHTS)
        return ep.combine(made.x * made.topk_weights.sum(1, keepdim=True).bfloat16(), made.handle)

    return all(torch.equal(out[:, 0], torch.tensor([1, 0.5, 1]).bfloat16()) for out in layer.run(step))


@pytest.mark.parametrize("guilty", [(0,), (0, 1, 2)], ids=str)
def test_a_deadline_that_is_none_is_refused_on_all_ranks_whatever_else_is_right(trio, guilty):
    def work(rank, ep):
        ep.dispatch(X, IDS, WEIGHTS, **({"deadline": 0.0} if rank in guilty else {}))

    assert [type(error) for error in trio.errors(work)] == [ConfigError] * 3
    assert works(trio)


@pytest.mark.parametrize("what", BAD_TOKENS)
@pytest.mark.parametrize("guilty", [(0,), (0, 1, 2)], ids=str)
def test_tokens_that_do_not_fit_are_refused_on_all_ranks(trio, what, guilty):
    def work(rank, ep):
        ep.dispatch(*(BAD_TOKENS[what] if rank in guilty else (X, IDS, WEIGHTS)))

    errors = trio.errors(work)
    assert [type(error) for error in errors] == [ConfigError] * 3, errors
    assert works(trio)


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_dispatch_in_other_ways_are_refused_on_all_ranks(trio, what):
    errors = trio.errors(lambda rank, ep: DIFFERENT[what](ep) if rank == 1 else ep.dispatch(X, IDS, WEIGHTS))
    assert [type(error) for error in errors] == [ConfigError] * 3, errors
    assert works(trio)


def test_a_rank_that_combines_while_others_dispatch_is_an_error_of_all(trio):
    made = trio.run(lambda rank, ep: ep.dispatch(X, IDS, WEIGHTS))

    def work(rank, ep):
        return ep.combine(made[1].x, made[1].handle) if rank == 1 else ep.dispatch(X, IDS, WEIGHTS)

    assert [type(error) for error in trio.errors(work)] == [ConfigError] * 3
    assert works(trio)


@pytest.mark.parametrize("option", [{"layout": "rows"}, {"weights_at": "home"}, {"alignment": 0}, {"alignment": 1.5}])
def test_options_that_there_are_not_are_refused(trio, option):
    errors = trio.errors(lambda rank, ep: ep.dispatch(X, IDS, WEIGHTS, **option))
    assert [type(error) for error in errors] == [ConfigError] * 3, errors
    assert works(trio)


def test_a_bias_or_a_result_of_another_shape_is_refused_on_all_ranks(trio):
    made = trio.run(lambda rank, ep: ep.dispatch(X, IDS, WEIGHTS))
    for more in ({"bias": X[:2]}, {"bias": (X, X, X)}, {"out": torch.empty(4, 8)}, {"out": torch.empty(3, 8).int()}):
        errors = trio.errors(
            lambda rank, ep, more=more: ep.combine(made[rank].x, made[rank].handle, **(more if rank == 2 else {}))
        )
        assert [type(error) for error in errors] == [ConfigError] * 3, (more, errors)
    assert works(trio)


def test_what_is_wrong_on_one_rank_is_named_on_the_others(trio):
    errors = trio.errors(lambda rank, ep: ep.dispatch(X, IDS.float() if rank == 2 else IDS, WEIGHTS))
    assert "topk_idx" in str(errors[2])
    assert all("rank 2" in str(error) and "topk_idx" in str(error) for error in errors[:2]), errors


def test_a_closed_layer_does_nothing_more(trio):
    trio.run(lambda rank, ep: ep.close())
    trio.run(lambda rank, ep: ep.close())
    errors = trio.errors(lambda rank, ep: ep.dispatch(X, IDS, WEIGHTS))
    assert all(isinstance(error, RaynixlError) for error in errors)
    assert all("closed" in str(error) for error in errors)


@pytest.mark.parametrize(
    "wrong",
    [{"experts": 0}, {"hidden": 0}, {"topk": 0}, {"max_tokens": -1}, {"placement": (0, 1)}, {"placement": (9,) * 6}],
    ids=str,
)
def test_layers_that_make_no_sense_are_refused_at_once(crew, wrong):
    with Group(crew.agents[0], crew.names[:2], name="wrong") as group, pytest.raises(ConfigError):
        ExpertParallel(group, **{**OPTIONS, **wrong})


def test_layers_that_are_made_differently_are_refused(crew):
    groups = [Group(agent, crew.names[:2], name="unlike") for agent in crew.agents[:2]]

    def make(rank):
        options = {**OPTIONS, "hidden": 8 + rank}
        with pytest.raises(RaynixlError) as found:
            ExpertParallel(groups[rank], name="unlike", deadline=DEADLINE / 10, **options)
        return found.value

    errors = crew.run([lambda rank=rank: make(rank) for rank in range(2)])
    assert any("hidden" in str(error) for error in errors), errors
    for group in groups:
        group.close()


def test_a_member_that_does_not_come_ends_the_wait(crew):
    with Group(crew.agents[0], crew.names[:2], name="late") as group, pytest.raises(RaynixlError):
        ExpertParallel(group, name="late", deadline=0.5, placement=even(2, 6), **OPTIONS)

"""Handles that are not those of the other ranks, of this layer, or of what has come: an error, never other rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from raynixl.errors import ConfigError, IntegrityError
from raynixl.moe import dispatching, functional
from raynixl.moe.grid import make_grid
from raynixl.moe.two_level import TwoLevel

HIDDEN = 8
OPTIONS = {"experts": 2, "hidden": HIDDEN, "topk": 1, "max_tokens": 16, "dtype": torch.float32}
FIRST, SECOND = torch.tensor([[0], [0], [0], [0], [1], [1]]), torch.tensor([[1], [1], [1], [1], [1], [0]])


def rows_of(rank: int, count: int = 6) -> torch.Tensor:
    """Tokens that tell where they come from."""
    return (100.0 * rank + torch.arange(1.0, count + 1))[:, None].repeat(1, HIDDEN)


@pytest.fixture
def pair(crew):
    with crew.experts(2, deadline=5.0, **OPTIONS) as made:
        yield made


def two_handles(layer, ids=(FIRST, SECOND), **options):
    """The handles of two dispatches, by rank."""
    return layer.run(lambda rank, ep: [ep.dispatch(rows_of(rank), one, **options).handle for one in ids])


def works(layer):
    def step(rank, ep):
        made = ep.dispatch(rows_of(rank), FIRST)
        return ep.combine(made.x, made.handle)

    return all(torch.equal(out, rows_of(rank)) for rank, out in enumerate(layer.run(step)))


ALIKE = {"other counts": (FIRST, SECOND), "the same counts": (FIRST, FIRST.flip(0))}


@pytest.mark.parametrize("ids", ALIKE)
@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_ranks_that_give_different_handles_raise_alike(pair, ids, layout):
    handles = two_handles(pair, ALIKE[ids], layout=layout)

    def again(rank, ep):
        ep.dispatch(rows_of(rank), handle=handles[rank][rank])

    def back(rank, ep):
        handle = handles[rank][rank]
        ep.combine(torch.ones(2, 16, HIDDEN) if layout == "slots" else torch.ones(handle.rows, HIDDEN), handle)

    for work in (again, back):
        errors = pair.errors(work)
        assert [type(error) for error in errors] == [ConfigError] * 2, errors
    assert works(pair)


def test_a_handle_is_used_beside_the_one_of_its_next_dispatch(pair):
    def step(rank, ep):
        first = ep.dispatch(rows_of(rank), FIRST)
        second = ep.dispatch(rows_of(rank), handle=first.handle)
        return ep.combine(second.x, (first, second)[rank].handle)

    assert all(torch.equal(out, rows_of(rank)) for rank, out in enumerate(pair.run(step)))


def test_handles_that_brought_other_weights_are_others(pair):
    def step(rank, ep):
        first = ep.dispatch(rows_of(rank), FIRST, torch.ones(6, 1), layout="experts")
        second = ep.dispatch(rows_of(rank), topk_weights=torch.zeros(6, 1), handle=first.handle)
        ep.combine(second.x, (first, second)[rank].handle)

    assert [type(error) for error in pair.errors(step)] == [ConfigError] * 2


def test_a_handle_of_another_layer_is_refused_on_all_ranks(crew, pair):
    with crew.experts(2, deadline=5.0, max_ranks=2, **OPTIONS) as other:
        foreign = other.run(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST).handle)
        own = pair.run(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST).handle)
        handles = [own[0], foreign[1]]
        for work in (
            lambda rank, ep: ep.dispatch(rows_of(rank), handle=handles[rank]),
            lambda rank, ep: ep.combine(torch.ones(handles[rank].rows, HIDDEN), handles[rank]),
        ):
            errors = pair.errors(work)
            assert [type(error) for error in errors] == [ConfigError] * 2, errors
            assert all("another layer" in str(error) for error in errors), errors
    assert works(pair)


def test_a_rank_that_has_rejoined_uses_no_handle_from_before(pair):
    handles = pair.run(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST).handle)

    def come_back(rank, ep):
        if rank == 1:
            ep.rejoin()
        ep.dispatch(rows_of(rank), FIRST)
        while len(ep.active) < 2:
            ep.dispatch(rows_of(rank), FIRST)

    pair.run(come_back)
    errors = pair.errors(lambda rank, ep: ep.dispatch(rows_of(rank), handle=handles[rank]))
    assert [type(error) for error in errors] == [ConfigError] * 2, errors
    assert works(pair)


def other_counts(handle):
    """The same handle, as if it knew of one row less from rank 1."""
    return replace(
        handle, counts=handle.counts - (np.arange(len(handle.counts)) == 1), row_ids=handle.row_ids[:-1],
        tokens=handle.tokens[:-1],
    )  # fmt: skip


def test_other_counts_than_those_of_the_handle_name_the_rank_that_sent_them(pair):
    handles = pair.run(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST).handle)
    handles[0] = other_counts(handles[0])
    errors = pair.errors(lambda rank, ep: ep.dispatch(rows_of(rank), handle=handles[rank]))
    assert isinstance(errors[0], IntegrityError), errors
    assert errors[0].peer == "rank1"
    assert "4 rows" in str(errors[0])
    assert "knows of 3" in str(errors[0])
    assert works(pair)


def test_other_counts_come_back_than_were_sent_out(pair):
    handles = pair.run(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST).handle)
    handles[0] = other_counts(handles[0])
    errors = pair.errors(lambda rank, ep: ep.combine(torch.ones(handles[rank].rows, HIDDEN), handles[rank]))
    assert isinstance(errors[1], IntegrityError), errors
    assert errors[1].peer == "rank0"
    assert works(pair)


def test_counts_above_max_tokens_name_the_rank_that_tells_them(crew, monkeypatch):
    with crew.experts(2, deadline=1.0, **OPTIONS) as layer:
        session = layer.eps[1]._session
        routed = dispatching.Dispatch._exchange_counts

        def much(dispatch, signature):
            if dispatch.session is session:
                dispatch.routing.counts[:] = 17
            return routed(dispatch, signature)

        monkeypatch.setattr(dispatching.Dispatch, "_exchange_counts", much)
        errors = layer.errors(lambda rank, ep: ep.dispatch(rows_of(rank), FIRST))
        assert isinstance(errors[0], IntegrityError), errors
        assert errors[0].peer == "rank1"


def test_a_handle_of_a_step_that_lost_a_rank_places_rows_of_any_width(crew):
    """Rank 1 leaves behind its counts, so that a hole is where its rows were to be; then rows outgrow the slot."""
    options = {"experts": 4, "hidden": 64, "topk": 1, "max_tokens": 16, "dtype": torch.bfloat16, "capacity": 20}
    with crew.experts(4, deadline=1.0, **options) as layer:

        def work(rank, ep):
            x, ids = (10.0 * rank + torch.arange(1.0, 6))[:, None].repeat(1, 64), torch.full((5, 1), 2)
            if rank == 1:
                gather = ep._session.gather

                def leave(*args, **options):
                    gather(*args, **options)
                    raise KeyboardInterrupt

                ep._session.gather = leave
                with pytest.raises(KeyboardInterrupt):
                    ep.dispatch(x.bfloat16(), ids)
                return None
            made = ep.dispatch(x.bfloat16(), ids)
            assert made.lost == (1,)
            again = ep.dispatch(x.double(), handle=made.handle)
            return made.x.double(), again.x, again.sources.tolist()

        for rank, result in enumerate(layer.run(work)):
            if result is not None:
                first, again, sources = result
                assert torch.equal(first, again)
                assert sources == ([0] * 5 + [2] * 5 + [3] * 5 if rank == 2 else [])


@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
@pytest.mark.parametrize("places", [("holder", "source"), ("source", "holder")], ids="-".join)
def test_weights_at_another_place_than_the_handles_are_those_of_combine(pair, layout, places):
    """A dispatch with a handle, and weights at the other place, leaves the handle that a fresh one would."""
    ids, weights = torch.tensor([[1], [0], [-1], [1]]), torch.tensor([[0.5], [2.0], [9.0], [3.0]])

    def expert_rows(made, at):
        if layout == "experts":
            return made.x
        if at == "source":
            return made.x[made.topk_idx[..., 0] >= 0]
        return torch.where(made.topk_idx >= 0, made.x * made.topk_weights, 0)

    def work(rank, ep):
        x = rows_of(rank, 4)
        first = ep.dispatch(x, ids, weights, layout=layout, weights_at=places[0])
        outs = []
        for options in ({"topk_weights": weights}, {}):
            made = ep.dispatch(x, handle=first.handle, weights_at=places[1], **options)
            assert (made.topk_weights is None) == (places[1] == "source")
            outs.append(ep.combine(expert_rows(made, places[1]), made.handle))
        return outs

    for rank, outs in enumerate(pair.run(work)):
        want = torch.where(ids >= 0, weights, 0) * rows_of(rank, 4)
        assert all(torch.equal(out, want) for out in outs)


def test_layout_and_alignment_are_those_of_the_handle_unless_told_otherwise(pair):
    def work(rank, ep):
        first = ep.dispatch(rows_of(rank), FIRST, layout="experts", alignment=16)
        return first, ep.dispatch(rows_of(rank), handle=first.handle)

    for first, again in pair.run(work):
        assert torch.equal(first.x, again.x)
        assert again.handle.alignment == 16


def test_in_two_stages_alignment_is_that_of_the_handle_too(crew):
    grid = make_grid(4, ["a", "a", "b", "b"])
    with crew.experts(4, kind=TwoLevel, grid=grid, **{**OPTIONS, "experts": 4}) as layer:

        def work(rank, ep):
            first = ep.dispatch(rows_of(rank), FIRST, layout="experts", alignment=16)
            return first.x, ep.dispatch(rows_of(rank), handle=first.handle).x

        assert all(torch.equal(first, again) for first, again in layer.run(work))


def test_with_gradients_alignment_is_that_of_the_handle_too(pair):
    def work(rank, ep):
        first = functional.dispatch(ep, rows_of(rank), FIRST, layout="experts", alignment=16)
        again = functional.dispatch(ep, rows_of(rank), handle=first.handle)
        return first.x.detach(), again.x.detach()

    assert all(torch.equal(first, again) for first, again in pair.run(work))


def test_weights_may_be_changed_once_dispatch_has_returned(pair):
    def work(rank, ep):
        weights = torch.full((6, 1), 2.0)
        made = ep.dispatch(rows_of(rank), FIRST, weights, weights_at="source")
        weights.zero_()
        return ep.combine(made.x, made.handle)

    assert all(torch.equal(out, 2 * rows_of(rank)) for rank, out in enumerate(pair.run(work)))

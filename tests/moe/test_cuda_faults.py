"""Ranks on GPUs that are made up: who does not come, who is masked, who comes back; nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import OPTIONS, GpuCrew, agree, gpu_crew, step, tokens, wanted

from raynixl import Masked
from raynixl.errors import ConfigError, RangeError

every_layout = pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(3) as made:
        yield made


def find_masked(ep, **more):
    """Rank 2 hears that it was masked: at the latest by the call after that in which its GPU has found it."""

    def two_steps():
        for number in range(2):
            step(2, ep, number, **more)

    with pytest.raises(Masked, match="rank 2"):
        two_steps()


@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_a_rank_that_does_not_come_is_masked_and_named(crew, layout):
    with crew.experts(3, **OPTIONS, deadline=0.4) as layer:
        agree(layer, layout=layout)

        def without(rank, ep):
            x, ids, weights = tokens(rank)
            r = ep.dispatch(x, ids, weights, layout=layout)
            assert r.lost == (2,)
            assert ep.combine(torch.where(r.topk_idx.max(-1, keepdim=True)[0] >= 0, r.x, 0), r.handle).shape == x.shape
            assert ep.active == (0, 1)

        layer.run(without, [0, 1])
        agree(layer, 1, [0, 1], layout=layout)
        find_masked(layer.eps[2], layout=layout)
        find_masked(layer.eps[2], layout=layout)
        agree(layer, 3, [0, 1], layout=layout)


@every_layout
def test_a_rank_that_is_masked_by_hand_is_not_waited_for(crew, layout):
    with crew.experts(3, **OPTIONS) as layer:
        agree(layer, layout=layout) if layout != "experts" else layer.run(lambda rank, ep: ep.synchronise())
        layer.run(lambda _, ep: ep.mask(1), [0, 2])
        began = time.monotonic()

        def without(rank, ep):
            x, ids, weights = tokens(rank)
            r = ep.dispatch(x, ids, weights, layout=layout)
            assert r.lost == ()
            return int(r.counts.sum())

        counts = layer.run(without, [0, 2])
        assert sum(counts) == 2 * int((layer.eps[0].placement.holders[tokens(0)[1].numpy()] != 1).sum())
        assert time.monotonic() - began < 10.0


def test_a_rank_whose_agent_has_ended_is_not_waited_for_until_the_deadline(nothing_left):
    with gpu_crew(3) as crew, crew.experts(3, **OPTIONS) as layer:
        agree(layer)
        layer.eps[2].close()
        layer.groups[2].close()
        crew.agents[2].close()
        began = time.monotonic()
        outs = layer.run(lambda rank, ep: step(rank, ep, 1), [0, 1])
        assert time.monotonic() - began < 10.0  # the deadline is 20 s
        for rank, out in enumerate(outs):
            assert torch.equal(out, wanted(rank, layer.eps[rank].placement, [0, 1], 1))
            assert layer.eps[rank].active == (0, 1)


def test_a_masked_rank_comes_back_where_the_others_synchronise(crew):
    with crew.experts(3, **OPTIONS, deadline=0.4) as layer:
        agree(layer)
        outs = layer.run(step, [0, 1])
        assert len(outs) == 2
        agree(layer, 1, [0, 1])
        find_masked(layer.eps[2])

        def back(rank, ep):
            if rank == 2:
                ep.rejoin(deadline=20.0)
            else:
                while ep.active != (0, 1, 2):
                    ep.synchronise(deadline=20.0)
            return step(rank, ep, 2, deadline=20.0)

        outs = layer.run(back)
        for rank, out in enumerate(outs):
            assert torch.equal(out, wanted(rank, layer.eps[rank].placement, [0, 1, 2], 2))
        agree(layer, 3, deadline=20.0)


def test_what_is_wrong_with_one_call_is_raised_on_all_ranks_of_a_dispatch_that_waits(crew):
    with crew.experts(3, **OPTIONS) as layer:
        agree(layer)
        x, ids, weights = tokens(0)
        for given, kind in (
            ((torch.cat([x, x]), ids.repeat(2, 1), weights.repeat(2, 1)), RangeError),
            ((x, ids + 100, weights), RangeError), ((x[:, :3], ids, weights), ConfigError),
            ((x, None, None), ConfigError),
        ):  # fmt: skip
            errors = layer.errors(
                lambda rank, ep, given=given: ep.dispatch(*(given if rank == 1 else (x, ids, weights)))
            )
            assert [type(error) for error in errors] == [kind] * 3, (kind, errors)
            assert all("rank 1" in str(error) for rank, error in enumerate(errors) if rank != 1)
        errors = layer.errors(lambda rank, ep: ep.dispatch(x if rank else x.double(), ids, weights, layout="tokens"))
        assert [type(error) for error in errors] == [ConfigError] * 3
        agree(layer, 1)


def test_what_is_wrong_with_a_call_of_fixed_slots_is_raised_by_the_others_at_their_next(crew):
    with crew.experts(3, **OPTIONS) as layer:
        agree(layer)
        x, ids, weights = tokens(0)

        def wrong(rank, ep):
            ep.dispatch(x, ids[:, :1] if rank == 1 else ids, weights, layout="slots")

        first, second = layer.errors(wrong), layer.errors(lambda rank, ep: step(rank, ep) if rank != 1 else None)
        assert [type(error) for error in first] == [type(None), ConfigError, type(None)]
        assert [type(error) for error in second] == [ConfigError, type(None), ConfigError]
        agree(layer, 1)


def test_a_call_on_another_gpu_is_refused(crew):
    with crew.experts(1, **OPTIONS) as layer:
        agree(layer)
        x, ids, weights = tokens(0)
        with crew.gpus.on_host(), pytest.raises(ConfigError, match="is no handle"):
            layer.eps[0].dispatch(x, handle=object())
        handle = layer.eps[0].dispatch(x, ids, weights).handle
        with crew.gpus.on_host(), pytest.raises(ConfigError, match="is no handle"):
            layer.eps[0].combine(x, handle)


def test_a_rank_can_take_part_with_nothing_but_an_error(crew):
    with crew.experts(3, **OPTIONS) as layer:
        agree(layer)

        def dispatch(rank, ep):
            if rank == 0:
                return ep.fail(RangeError("no tokens came"))
            return ep.dispatch(*tokens(rank), layout="tokens")

        assert [type(error) for error in layer.errors(dispatch)] == [type(None), RangeError, RangeError]
        agree(layer, 1, layout="tokens")
        handles = layer.run(lambda rank, ep: ep.dispatch(*tokens(rank), layout="tokens"))

        def combine(rank, ep):
            if rank == 0:
                return ep.fail(ConfigError("no rows"), is_combine=True)
            return ep.combine(handles[rank].x, handles[rank].handle)

        layer.run(combine)
        errors = layer.errors(lambda rank, ep: step(rank, ep) if rank else None)
        assert [type(error) for error in errors] == [type(None), ConfigError, ConfigError]
        agree(layer, 2)

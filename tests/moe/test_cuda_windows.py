"""Windows on GPUs that are made up: who has them, when they are made anew, and how long they stay mapped."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import OPTIONS, TOKENS, GpuCrew, agree, gpu_crew, step, tokens, wanted
from moe_tools import DEADLINE

from raynixl import Group
from raynixl.moe import ExpertParallel


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(4) as made:
        yield made


def windows(layer):
    return [ep._path._agreed.own.memory.address for ep in layer.eps]


def blocks(crew):
    return len(crew.gpus.fake.memory.blocks)


def test_they_are_kept_where_nothing_has_changed_and_made_anew_where_rows_are_longer(crew):
    with crew.experts(3, **OPTIONS) as layer:
        layer.run(lambda _, ep: ep.synchronise())
        first, count = windows(layer), blocks(crew)
        agree(layer)
        layer.run(lambda _, ep: ep.synchronise())
        agree(layer, 1)
        assert windows(layer) == first

        def longer(rank, ep):
            x, ids, weights = tokens(rank)
            beside = torch.arange(TOKENS * 700.0).reshape(TOKENS, 700) + rank
            r = ep.dispatch(x, ids, weights, layout="tokens", extra=(beside, beside.byte()))
            sources = r.sources.long()
            whole = torch.arange(TOKENS * 700.0).reshape(TOKENS, 700)
            assert torch.equal(r.extra[0], whole[r.tokens.long()] + sources[:, None])
            assert r.extra[1].dtype == torch.uint8

        layer.run(longer)
        assert windows(layer) != first
        assert blocks(crew) == count
        agree(layer, 2)

        def pairs(rank, ep):
            x, ids, weights = tokens(rank)
            r = ep.dispatch(x, ids, weights, layout="tokens", weights_at="source")
            row, _ = (r.topk_idx >= 0).nonzero(as_tuple=True)
            assert torch.equal(ep.combine(r.x[row], r.handle), x * 0.25 + x * 0.5)

        layer.run(pairs)
        assert blocks(crew) == count


def test_many_steps_leave_nothing_behind(crew):
    with crew.experts(2, **OPTIONS) as layer:
        agree(layer)
        count, events = blocks(crew), len(crew.gpus.fake.work.events.events)
        for number in range(30):
            agree(layer, number, layout=("slots", "tokens")[number % 2])
        assert blocks(crew) == count
        assert len(crew.gpus.fake.work.events.events) <= events + 8


def test_a_new_rank_is_let_in_where_the_others_synchronise(crew):
    more = {"max_ranks": 4, "placement": (0, 0, 0, 1, 1, 1)}
    with crew.experts(2, **OPTIONS, **more) as layer:
        agree(layer)
        before = layer.run(lambda rank, ep: ep.dispatch(*tokens(rank), layout="tokens"))
        group = Group(crew.agents[2], crew.names[:3], name=layer.eps[0].name, timeout=DEADLINE)

        def work(rank):
            if rank == 2:
                ep = ExpertParallel(group, name=layer.eps[0].name, deadline=DEADLINE, eager_nbytes=0, **OPTIONS, **more)
            else:
                ep = layer.eps[rank]
                ep.join(["rank2"])
                while ep.active != (0, 1, 2):
                    ep.synchronise()
            out = step(rank, ep, 1)
            r = before[rank] if rank < 2 else None  # of before the third one came; it has no rows of its own there
            if r is not None:
                assert r.handle.for_ranks(3).row_of.shape == (TOKENS, 3)
            return ep, out

        made = crew.run([lambda rank=rank: work(rank) for rank in range(3)])
        for rank, (ep, out) in enumerate(made):
            assert torch.equal(out, wanted(rank, ep.placement, [0, 1, 2], 1))
        made[2][0].close()
        group.close()


def test_gates_are_left_when_work_is_through_and_held_where_a_graph_has_it(crew):
    work = crew.gpus.fake.work
    with crew.experts(2, **OPTIONS) as layer:
        agree(layer)
        gates = [gate for ep in layer.eps for gate in ep._path._layer.presence._gates.values()]
        deadline = time.monotonic() + 5.0
        while any(gate.inflight for gate in gates) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert [gate.inflight for gate in gates] == [0, 0]

        def capture(rank, ep):
            stream = crew.gpus.stream()
            work.begin_capture(stream)
            r = ep.dispatch(*tokens(rank), layout="slots")
            ep.combine(r.x, r.handle)
            return work.end_capture(stream), r

        kept = layer.run(capture)
        agree(layer, 1)
        time.sleep(0.1)
        assert [gate.inflight for gate in gates] == [1, 1]
        del kept
    assert [gate.inflight for gate in gates] == [0, 0]


def test_a_layer_is_closed_at_once_while_others_are_idle(crew):
    with crew.experts(3, **OPTIONS) as layer:
        agree(layer)
        began = time.monotonic()
        layer.eps[2].close()
        assert time.monotonic() - began < 3.0
        outs = layer.run(lambda rank, ep: step(rank, ep, 1), [0, 1])
        for rank, out in enumerate(outs):
            assert torch.equal(out, wanted(rank, layer.eps[rank].placement, [0, 1], 1))

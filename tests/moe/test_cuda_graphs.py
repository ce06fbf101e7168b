"""Operations in CUDA graphs and on several streams of GPUs that are made up: in order, and without the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import OPTIONS, TOKENS, GpuCrew, agree, gpu_crew, tokens

from raynixl.errors import ConfigError
from raynixl.moe import cuda_device
from raynixl.moe.cuda_layer import GpuLayer

WORLD = 3


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(WORLD) as made:
        yield made


def holders_of(ep, ids):
    """By token: how many ranks hold its experts."""
    holders = torch.from_numpy(ep.placement.holders.copy())[ids]
    return torch.tensor([len(set(row.tolist())) for row in holders], dtype=torch.float32)[:, None]


@pytest.mark.parametrize("layout", ["slots", "tokens", "experts"])
def test_a_step_is_captured_once_and_replayed_with_other_rows(crew, layout):
    """In layouts whose size the rows decide it is one by a handle that is captured."""
    work = crew.gpus.fake.work
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)

        def run(rank, ep):
            x, ids, weights = tokens(rank)
            first = ep.dispatch(x, ids, weights, layout=layout)
            ep.combine(first.x, first.handle)
            stream, given = crew.gpus.stream(), {} if layout == "slots" else {"handle": first.handle}
            work.begin_capture(stream)
            r = ep.dispatch(x, *(() if given else (ids, weights)), layout=layout, **given)
            out = ep.combine(r.x, r.handle)
            graph = work.end_capture(stream)
            results = []
            for number in range(1, 6):
                x.copy_(tokens(rank, number)[0])
                graph.launch()
                crew.gpus.settle()
                results.append(out.clone())
            return results

        for rank, results in enumerate(layer.run(run)):
            ep = layer.eps[rank]
            for number, out in enumerate(results, 1):
                x, _, weights = tokens(rank, number)
                is_weighed = layout == "experts"  # by the holders, each pair
                factor = weights.sum(1, keepdim=True) if is_weighed else holders_of(ep, tokens(rank)[1])
                assert torch.equal(out, x * factor), (rank, number)
        agree(layer, 9)


def captured(crew, ep, x, ids, weights):
    """A graph of a step in fixed slots, what its dispatch returned, and the sums."""
    work, stream = crew.gpus.fake.work, crew.gpus.stream()
    work.begin_capture(stream)
    r = ep.dispatch(x, ids, weights, layout="slots")
    out = ep.combine(r.x, r.handle)
    return work.end_capture(stream), r, out


def test_an_agreement_is_on_the_stream_and_the_gpu_of_who_asks_for_it(crew, monkeypatch):
    """Also where another thread carries operations out, since one of them was asynchronous."""
    noted, used = [], []
    note = GpuLayer.note_replays
    monkeypatch.setattr(GpuLayer, "note_replays", lambda layer: noted.append(layer.gpu.stream()) or note(layer))
    monkeypatch.setattr(cuda_device, "used_gpu", lambda: used.append(threading.get_ident()) or 0)
    with crew.experts(WORLD, **OPTIONS) as layer:

        def run(rank, ep):
            ep.synchronise()
            x, ids, weights = tokens(rank)
            r = ep.dispatch(x, ids, weights, async_=True).wait()
            ep.combine(r.x, r.handle)
            ep.synchronise()
            return crew.gpus.stream(), threading.get_ident()

        streams, threads = zip(*layer.run(run), strict=True)
        assert set(noted) == set(streams)
        assert set(used) == set(threads)


def test_a_graph_lives_through_agreements_that_leave_windows_as_they_are(crew):
    with crew.experts(WORLD, **OPTIONS, deadline=2.0) as layer:
        agree(layer)

        def run(rank, ep):
            x, ids, weights = tokens(rank)
            graph, r, out = captured(crew, ep, x, ids, weights)
            ep.synchronise()
            graph.launch()
            crew.gpus.settle()
            assert torch.equal(out, x * holders_of(ep, ids))
            return graph, crew.gpus.stream(), out, x, ids, r

        kept = layer.run(run)
        agree(layer, 1)
        layer.run(lambda _, ep: ep.mask(2), [0, 1])
        layer.run(lambda _, ep: ep.synchronise(), [0, 1])

        def without(rank, ep):
            graph, stream, out, x, ids, r = kept[rank]
            graph.launch()
            with crew.gpus.on_stream(stream):
                crew.gpus.settle()
            holders = torch.from_numpy(ep.placement.holders.copy())[ids]
            count = torch.tensor([len(set(row.tolist()) - {2}) for row in holders], dtype=torch.float32)
            assert torch.equal(out, x * count[:, None])
            assert tuple(r.lost) == ()

        layer.run(without, [0, 1])


def test_a_graph_of_former_windows_harms_nobody_and_goes_on_among_its_like(crew):
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)

        def run(rank, ep):
            x, ids, weights = tokens(rank)
            graph, r, out = captured(crew, ep, x, ids, weights)
            longer = ep.dispatch(x, ids, weights, layout="tokens", extra=(torch.ones(TOKENS, 900),))
            assert longer.extra[0].shape[1] == 900
            for number in range(3):
                x.copy_(tokens(rank, number)[0])
                graph.launch()
                crew.gpus.settle()
                assert torch.equal(out, x * holders_of(ep, ids))
            again = ep.dispatch(x, ids, weights, layout="slots")
            assert torch.equal(ep.combine(again.x, again.handle), out)
            graph.launch()  # in flight when the layer is closed
            return r, out, x, ids, weights

        kept = layer.run(run)
        agree(layer, 1)
        assert len(kept) == WORLD


def test_pairs_that_come_back_as_they_are_cannot_be_captured(crew):
    work = crew.gpus.fake.work
    with crew.experts(1, **OPTIONS) as layer:
        ep = layer.eps[0]
        r = ep.dispatch(*tokens(0), layout="tokens", weights_at="source")
        row, _ = (r.topk_idx >= 0).nonzero(as_tuple=True)
        assert torch.equal(ep.combine(r.x[row], r.handle, summed=False), r.x[row])
        work.begin_capture(crew.gpus.stream())
        with pytest.raises(ConfigError, match="cannot be captured"):
            ep.combine(r.x[row], r.handle, summed=False)
        work.end_capture(crew.gpus.stream())
        assert torch.equal(ep.combine(r.x[row], r.handle, summed=False), r.x[row])


def test_a_replay_behind_a_new_agreement_tells_nothing_that_a_later_call_waits_for(crew):
    with crew.experts(WORLD, **OPTIONS) as layer:
        for number in range(3):
            agree(layer, number, layout="tokens")

        def run(rank, ep):
            graph, kept, out = captured(crew, ep, *tokens(rank))
            ep.synchronise()
            graph.launch()
            crew.gpus.settle()
            gpu = ep._path._layer
            return gpu.told.ticket, gpu.tickets, kept, out

        for told, tickets, _, _ in layer.run(run):
            assert 0 < told <= tickets, "the next one is taken for told already"
        agree(layer, 4, layout="tokens")


def test_what_the_host_must_hear_of_cannot_be_captured(crew):
    work = crew.gpus.fake.work
    with crew.experts(WORLD, **OPTIONS) as layer:
        agree(layer)

        def run(rank, ep):
            stream = crew.gpus.stream()
            work.begin_capture(stream)
            try:
                with pytest.raises(ConfigError, match="capture layout 'slots'"):
                    ep.dispatch(*tokens(rank), layout="tokens")
                with pytest.raises(ConfigError, match="run it once before"):
                    ep.dispatch(*tokens(rank), layout="slots", extra=(torch.zeros(TOKENS, 4096),))
            finally:
                work.end_capture(stream)

        layer.run(run)
        agree(layer, 1)


def test_operations_on_several_streams_are_in_one_order(nothing_left):
    """Nobody waits for kernels here but the streams."""
    with gpu_crew(2, is_patient=False) as crew, crew.experts(2, **OPTIONS) as layer:
        work = crew.gpus.fake.work

        def run(rank, ep):
            streams = [crew.gpus.stream(), work.stream(crew.gpus.fake.devices.retain(0))]
            outs, x = [], tokens(rank)[0]
            for number in range(8):
                with crew.gpus.on_stream(streams[number % 2]):
                    r = ep.dispatch(x, *tokens(rank)[1:], layout="slots")
                with crew.gpus.on_stream(streams[number // 2 % 2]):
                    outs.append((r, ep.combine(r.x, r.handle)))
            for stream in streams:
                with crew.gpus.on_stream(stream):
                    crew.gpus.settle()
            return [(out, tuple(r.lost)) for r, out in outs]

        for rank, outs in enumerate(layer.run(run)):
            x, ids, _ = tokens(rank)
            for out, lost in outs:
                assert lost == ()
                assert torch.equal(out, x * holders_of(layer.eps[rank], ids))


def test_asynchronous_calls_stay_on_the_stream_of_their_caller(crew):
    with crew.experts(2, **OPTIONS) as layer:

        def run(rank, ep):
            before = len(crew.gpus.fake.work.streams)
            pending = ep.dispatch(*tokens(rank), layout="slots", async_=True)
            out = ep.combine(pending.wait().x, pending.wait().handle, async_=True).wait()
            return out, len(crew.gpus.fake.work.streams) - before

        for rank, (out, streams) in enumerate(layer.run(run)):
            assert torch.equal(out, tokens(rank)[0] * holders_of(layer.eps[rank], tokens(rank)[1]))
            assert streams <= 2

"""Two stages on tensors of GPUs that are made up: by way of the host, with the bits of the reference, whoever goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import OPTIONS, TOKENS, GpuCrew, gpu_crew, step, tokens, wanted
from moe_programs import WAYS, Cached, Combine, CombineWeights, Dispatch, Place, Program, check, even, play

from raynixl import Masked
from raynixl.errors import ConfigError, RangeError
from raynixl.moe import ExpertParallel, TwoLevel
from raynixl.moe.grid import Grid, make_grid

EVEN, UNEVEN = make_grid(4, ["a", "a", "b", "b"]), Grid(((0, 3), (1,), (2, 4)))
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
every_grid = pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "uneven"])


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(5) as made:
        yield made


def staged(crew, grid=EVEN, **more):
    return crew.experts(grid.world, **{**OPTIONS, "eager_nbytes": 0, "kind": TwoLevel, "grid": grid, **more})


@every_way
@every_grid
def test_the_bits_are_those_of_the_reference(crew, grid, way):
    counts = tuple((3 + 5 * rank) % 8 for rank in range(grid.world))
    steps = (
        Dispatch("a", counts, *way, missing=0.2, has_duplicates=True), Combine("a", biases=2), CombineWeights("a"),
        Cached("b", "a", "bits"), Combine("b", out="float32"), Dispatch("c", (0,) * grid.world, *way), Combine("c"),
        Place(even(grid.world, 7)[::-1]), Dispatch("d", counts, *way, x_kind="strided", is_async=True),
        Combine("d", out="given", is_async=True, is_strided=True), Combine("a"),
    )  # fmt: skip
    program = Program(grid.world, even(grid.world, 7), 16, 3, steps, grid=grid)
    with crew.experts(grid.world, kind=TwoLevel, grid=grid, **program.options()) as layer:
        assert all("no tensors on a GPU so far" in ep.explain() for ep in layer.eps)
        check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))
        assert all("those on GPU 0 through memory of the host" in ep.explain() for ep in layer.eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_rows_of_other_dtypes_and_their_scales(crew, dtype):
    steps = (Dispatch("a", (3, 5, 0, 2), *WAYS[3]), Combine("a", biases=1), Dispatch("b", (2,) * 4), Combine("b"))
    program = Program(4, even(4, 8), 256, 2, steps, dtype=dtype, grid=EVEN)
    with crew.experts(4, kind=TwoLevel, grid=EVEN, **program.options()) as layer:
        check(program, layer.run(lambda rank, ep: play(program, rank, ep)))


@pytest.mark.parametrize("kind", ["two-level", "flat"])
@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_all_that_comes_back_lies_on_the_gpu(crew, layout, kind):
    """Also where flat rows go through the host."""

    def run(rank, ep):
        x, ids, weights = tokens(rank)
        counts, waited, seconds = torch.ones(len(ep.local_experts), dtype=torch.int64), *torch.zeros(2, 4).double()
        beside = torch.arange(TOKENS)[:, None] + 100 * rank
        r = ep.dispatch(
            (x, x[:, :1]), ids, weights, layout=layout, extra=(beside,), stats=counts, waited=waited
        )  # fmt: skip
        assert torch.equal(counts, 1 + r.counts)
        given = [getattr(r, one.name) for one in dataclasses.fields(r)]
        found = [*given, *r.extra, r.sources]
        out, back = torch.empty(TOKENS, 16), None
        if layout == "tokens":
            sums, back = ep.combine_weights(r.x, torch.ones(r.topk_idx.shape), r.handle, out=out)
            assert sums is out
        else:
            assert ep.combine(r.x, r.handle, out=out, stats=seconds) is out
        found += [back, ep.combine(r.x, r.handle)]
        tensors = [one for one in found if isinstance(one, torch.Tensor)]
        assert len(tensors) >= 9
        is_brought = [one.data_ptr() in crew.gpus.brought or not one.numel() for one in tensors]
        assert all(is_brought), is_brought
        handle = r.handle
        assert (handle.layout, handle.weights_at, handle.lost) == (layout, "holder", ())
        assert (handle.rows, sum(handle.counts)) == (len(r.sources), len(r.sources))
        assert handle.placement == ep.placement.digest
        assert len(handle.sources) == len(r.sources)
        return waited, seconds

    sizes = {**OPTIONS, "eager_nbytes": 0}
    more = {"kind": TwoLevel, "grid": EVEN} if kind == "two-level" else {}
    lacks = crew.agents[3].backends
    kept = list(lacks)
    lacks[:] = [one for one in lacks if one.name != "nvlink" or kind == "two-level"]
    try:
        with crew.experts(4, **sizes, **more) as layer:
            for waited, seconds in layer.run(run):
                assert (waited >= 0).all()
                assert (seconds >= 0).all()
    finally:
        lacks[:] = kept


def test_what_one_rank_gives_wrong_all_ranks_raise_and_go_on(crew):
    x, ids, weights = tokens(0)
    elsewhere = ids.clone()
    crew.gpus.at_host.append(elsewhere)

    def dispatch(rank, ep, **wrong):
        given = {"x": x, "topk_idx": ids, "topk_weights": weights, **(wrong if rank == 2 else {})}
        return ep.dispatch(**given)

    def combine(rank, ep, **wrong):
        r = ep.dispatch(x, ids, weights)
        given = {"y": r.x, "handle": r.handle, **(wrong if rank == 2 else {})}
        return ep.combine(**given)

    with staged(crew) as layer:
        for wrong, kind in (
            ({"topk_idx": elsewhere}, ConfigError), ({"topk_idx": ids + 99}, RangeError), ({"x": "x"}, ConfigError),
            ({"x": x.to_sparse()}, ConfigError), ({"stats": torch.zeros(9)}, ConfigError),
            ({"waited": torch.zeros(3).double()}, ConfigError), ({"handle": object()}, ConfigError),
        ):  # fmt: skip
            errors = layer.errors(lambda rank, ep, wrong=wrong: dispatch(rank, ep, **wrong))
            assert [type(error) for error in errors] == [kind] * 4, (wrong, errors)
            (name,) = wrong
            assert name not in ("stats", "waited") or all(f"{name} has" in str(error) for error in errors[2:3]), errors
        for wrong in (
            {"y": x[:, :3]}, {"bias": elsewhere}, {"out": elsewhere}, {"out": torch.zeros(1, 16).expand(TOKENS, 16)},
            {"out": x.to_sparse()}, {"stats": torch.zeros(4, dtype=torch.int64)}, {"handle": None},
        ):  # fmt: skip
            errors = layer.errors(lambda rank, ep, wrong=wrong: combine(rank, ep, **wrong))
            assert [type(error) for error in errors] == [ConfigError] * 4, (wrong, errors)
        assert all(out.shape == x.shape for out in layer.run(combine))
    crew.gpus.at_host.clear()


@pytest.mark.parametrize("kind", [TwoLevel, ExpertParallel], ids=lambda kind: kind.__name__)
def test_what_goes_through_the_host_is_not_captured(crew, kind):
    work = crew.gpus.fake.work
    kept = list(crew.agents[1].backends)
    crew.agents[1].backends[:] = [one for one in kept if one.name != "nvlink"]
    more = {"grid": make_grid(2)} if kind is TwoLevel else {}
    try:
        with crew.experts(2, **OPTIONS, kind=kind, **more) as layer:

            def run(rank, ep):
                r = ep.dispatch(*tokens(rank))
                stream = crew.gpus.stream()
                work.begin_capture(stream)
                try:
                    with pytest.raises(ConfigError, match="cannot be captured"):
                        ep.dispatch(*tokens(rank))
                    with pytest.raises(ConfigError, match="cannot be captured"):
                        ep.combine(r.x, r.handle)
                finally:
                    work.end_capture(stream)
                return ep.combine(r.x, r.handle).shape

            assert layer.run(run) == [tokens(0)[0].shape] * 2
    finally:
        crew.agents[1].backends[:] = kept


def test_handles_serve_tensors_of_the_host_and_of_a_gpu(crew):
    def run(rank, ep):
        x, ids, weights = tokens(rank)
        r = ep.dispatch(x, ids, weights)
        factors = torch.where(r.topk_idx >= 0, r.topk_weights, 0).sum(-1, keepdim=True)
        with crew.gpus.on_host():
            again = ep.dispatch(x, handle=r.handle)
            first = ep.combine(again.x * factors, r.handle)
        return first, ep.combine(r.x * factors, again.handle), torch.equal(r.x, again.x)

    with staged(crew) as layer:
        for rank, (first, second, is_same) in enumerate(layer.run(run)):
            assert is_same
            assert torch.equal(first, wanted(rank, layer.eps[rank].placement, range(4)))
            assert torch.equal(second, first)


def goes_on(layer, ranks, number=0, **more):
    """Fail unless a step of these ranks returns what it must."""
    outs = layer.run(lambda rank, ep: step(rank, ep, number, **more), ranks)
    for rank, out in zip(ranks, outs, strict=True):
        assert torch.equal(out, wanted(rank, layer.eps[rank].placement, ranks, number)), rank


@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_who_does_not_come_is_lost_and_comes_back(crew, layout):
    with staged(crew, deadline=0.8) as layer:
        goes_on(layer, [0, 1, 2, 3], layout=layout)
        first = layer.run(lambda rank, ep: ep.dispatch(*tokens(rank), layout=layout))
        lost = layer.run(lambda rank, ep: ep.dispatch(*tokens(rank), layout=layout).lost, [0, 1, 3])
        assert lost == [(2,)] * 3
        goes_on(layer, [0, 1, 3], 1, layout=layout)
        outs = layer.run(lambda rank, ep: ep.combine(first[rank].x, first[rank].handle), [0, 1, 3])
        assert all(out.shape == tokens(0)[0].shape for out in outs)
        with pytest.raises(Masked):
            step(2, layer.eps[2])

        def back(rank, ep):
            if rank == 2:
                ep.rejoin(deadline=20.0)
                return step(rank, ep, 2, layout=layout, deadline=20.0)
            out = step(rank, ep, 2, layout=layout, deadline=20.0)
            while ep.active != (0, 1, 2, 3):
                out = step(rank, ep, 2, layout=layout, deadline=20.0)
            return out

        for rank, out in enumerate(layer.run(back)):
            assert torch.equal(out, wanted(rank, layer.eps[rank].placement, range(4), 2))
        goes_on(layer, [0, 1, 2, 3], 3, layout=layout, deadline=20.0)

"""Expert parallelism in two stages: on grids of all forms the reference's bits, and flat's where the source weighs."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_programs import (
    FLOATS,
    Cached,
    Combine,
    CombineWeights,
    Dispatch,
    Drop,
    Place,
    Program,
    check,
    differences,
    even,
    expected,
    play,
)

from raynixl.errors import ConfigError, RangeError, RaynixlError
from raynixl.moe.grid import Grid, make_grid
from raynixl.moe.two_level import TwoLevel

GRIDS = {
    "2x2": make_grid(4, ["a", "a", "b", "b"]),
    "3x2, interleaved": make_grid(6, ["a", "b", "c", "a", "b", "c"]),
    "2x4": make_grid(8, ["a"] * 4 + ["b"] * 4),
    "4x2": make_grid(8, ["a", "a", "b", "b", "c", "c", "d", "d"]),
    "5, uneven": make_grid(5),
    "7, uneven": make_grid(7),
    "very uneven": Grid(((0, 3, 5), (1,), (2, 4))),
    "one group": Grid(((0, 1, 2),)),
    "one column": Grid(((0,), (1,), (2,))),
    "one rank": Grid(((0,),)),
}
WAYS = [(layout, at) for layout in ("tokens", "experts", "slots") for at in ("holder", "source")]
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
every_way = pytest.mark.parametrize("way", WAYS, ids="-".join)
EVEN, UNEVEN = GRIDS["2x2"], GRIDS["5, uneven"]


@pytest.fixture
def plays(crew, layers):
    """Play a program in two stages, hold it against the reference, and return what ranks got."""

    def run(program):
        made = crew.experts if any(isinstance(step, Place) for step in program.steps) else layers.of
        with made(program.world, kind=TwoLevel, grid=program.grid, **program.options()) as layer:
            played = layer.run(lambda rank, ep: play(program, rank, ep))
        check(program, played)
        return played

    return run


def program(grid, *steps, **more):
    options = {"holders": even(grid.world, 11), "hidden": 24, "topk": 4, **more}
    return Program(world=grid.world, steps=steps, grid=grid, **options)


def fresh(grid, key="a", way=("tokens", "holder"), **more):
    counts = more.pop("counts", tuple((3 + 5 * rank) % 8 for rank in range(grid.world)))
    return Dispatch(key, counts, way[0], 2, way[1], **more)


@every_grid
@every_way
def test_dispatch_and_combine_are_those_of_the_reference(plays, grid, way):
    first = fresh(grid, way=way, missing=0.2, has_duplicates=True)
    plays(program(grid, first, Combine("a", biases=1), CombineWeights("a"), Combine("a", out="float32")))


@every_grid
@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_with_the_weights_at_the_source_sums_have_the_bits_of_flat(plays, grid, layout):
    staged = program(grid, fresh(grid, way=(layout, "source")), Combine("a"))
    flat = replace(staged, grid=None)
    for mine, theirs in zip(plays(staged), expected(flat), strict=True):
        assert not differences(replace(flat, steps=flat.steps[1:]), mine[1:], theirs[1:])


@pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "5, uneven"])
@every_way
def test_a_layout_is_used_again_for_other_rows(plays, grid, way):
    plays(
        program(
            grid,
            fresh(grid, way=way, missing=0.2),
            Cached("b", "a"),
            Combine("a"),
            Cached("c", "b", "bits"),
            Drop("b"),
            Combine("c"),
        )
    )


@pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "5, uneven"])
def test_no_tokens_on_one_rank_and_on_all(plays, grid):
    some = tuple(4 * (rank != 1) for rank in range(grid.world))
    none = (0,) * grid.world
    for way in WAYS:
        steps = (fresh(grid, "a", way, counts=some), Combine("a"), fresh(grid, "b", way, counts=none), Combine("b"))
        plays(program(grid, *steps))


@pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "5, uneven"])
@pytest.mark.parametrize(
    "more",
    [{"only": (3,)}, {"only": ()}, {"silent": (0, 2)}, {"is_weighted": False}, {"ids_dtype": torch.int32},
     {"x_kind": "strided"}, {"is_async": True}],
    ids=str,
)  # fmt: skip
def test_tokens_of_every_kind(plays, grid, more):
    plays(program(grid, fresh(grid, **more), Combine("a", is_async=more.get("is_async", False))))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_rows_of_every_dtype(plays, dtype):
    for grid in (EVEN, UNEVEN):
        plays(program(grid, fresh(grid), Cached("b", "a"), Combine("b"), dtype=dtype, hidden=256))


@pytest.mark.parametrize("holders", [(2, 2, 0), (0, 0, 0, 0, -1, 3), (3,) * 9], ids=str)
def test_ranks_and_groups_without_experts(plays, holders):
    for way in WAYS:
        plays(program(EVEN, fresh(EVEN, way=way), Combine("a"), holders=holders, topk=3))


def test_a_new_placement_moves_experts_between_groups(plays):
    first, second = even(4, 8), (3, 3, 3, 0, 1, 2, 0, 0)
    steps = fresh(EVEN), Combine("a"), Place(second), fresh(EVEN, "b"), Combine("a"), Combine("b")
    plays(program(EVEN, *steps, holders=first))


def test_more_rows_than_slots_hold(plays):
    plays(program(UNEVEN, fresh(UNEVEN, counts=(8,) * 5), Combine("a"), capacity=1, topk=11))


def test_what_travels_beside_comes_with_its_row(crew):
    def work(rank, ep):
        tokens = 5 + rank
        beside = torch.arange(tokens)[:, None] + 100 * rank, torch.rand(tokens, 2, 3)
        ids = (torch.arange(tokens * 3).reshape(tokens, 3) * 5) % 8
        r = ep.dispatch(torch.rand(tokens, 16), ids, extra=beside)
        return r, beside

    with crew.experts(5, kind=TwoLevel, grid=UNEVEN, experts=8, hidden=16, topk=3, max_tokens=16) as layer:
        results = layer.run(work)
        for r, _ in results:
            one, two = r.extra
            assert len(one) == len(r.sources)
            for row in range(len(r.sources)):
                source, token = int(r.sources[row]), int(r.tokens[row])
                assert int(one[row]) == 100 * source + token
                assert torch.equal(two[row], results[source][1][1][token])
        del results, r, one, two


def mistakes(layer, work):
    return [type(error) for error in layer.errors(work)]


@pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "5, uneven"])
@pytest.mark.parametrize("culprit", [0, 3])
def test_what_one_rank_does_wrong_all_ranks_raise_and_go_on(crew, grid, culprit):
    def ids(rank, last):
        return torch.tensor([[0, 1], [last if rank == culprit else 2, 3]])

    def work(rank, ep):
        r = ep.dispatch(torch.ones(2, 8), ids(rank, 9))
        return ep.combine(r.x.float(), r.handle)

    with crew.experts(grid.world, kind=TwoLevel, grid=grid, experts=10, hidden=8, topk=2, max_tokens=4) as layer:

        def wrong_ids(rank, ep):
            ep.dispatch(torch.ones(2, 8), ids(rank, 10))

        def wrong_x(rank, ep):
            ep.dispatch("x" if rank == culprit else torch.ones(2, 8), ids(rank, 9))

        def wrong_y(rank, ep):
            r = ep.dispatch(torch.ones(2, 8), ids(rank, 9))
            ep.combine(r.x[:, :3] if rank == culprit else r.x, r.handle)

        def wrong_out(rank, ep):
            r = ep.dispatch(torch.ones(2, 8), ids(rank, 9))
            ep.combine(r.x, r.handle, out=torch.ones(1) if rank == culprit else None)

        def wrong_handle(rank, ep):
            r = ep.dispatch(torch.ones(2, 8), ids(rank, 9))
            ep.combine(r.x, None if rank == culprit else r.handle)

        assert mistakes(layer, wrong_ids) == [RangeError] * grid.world
        for wrong in (wrong_x, wrong_y, wrong_out, wrong_handle):
            assert mistakes(layer, wrong) == [ConfigError] * grid.world, wrong.__name__
        assert all(out.shape == (2, 8) for out in layer.run(work))


@pytest.mark.parametrize("grid", [EVEN, UNEVEN], ids=["2x2", "5, uneven"])
def test_what_one_rank_wants_otherwise_of_the_other_stage_all_ranks_raise(crew, grid):
    culprit, x, ids = 2, torch.ones(2, 8), torch.tensor([[0, 9], [2, 3]])

    def dispatch(rank, ep, **wrong):
        return ep.dispatch(x, ids, torch.ones(2, 2), weights_at="source", **(wrong if rank == culprit else {}))

    def combine(rank, ep, **wrong):
        r = dispatch(rank, ep)
        row, _ = (r.topk_idx >= 0).nonzero(as_tuple=True)
        return ep.combine(r.x[row], r.handle, **(wrong if rank == culprit else {}))

    with crew.experts(grid.world, kind=TwoLevel, grid=grid, experts=10, hidden=8, topk=2, max_tokens=4) as layer:
        for wrong in ({"layout": "experts"}, {"alignment": 4}, {"layout": "none"}, {"stats": torch.zeros(99)},
                      {"waited": torch.zeros(99)}, {"alignment": 0}):  # fmt: skip
            assert (
                mistakes(layer, lambda rank, ep, wrong=wrong: dispatch(rank, ep, **wrong)) == [ConfigError] * grid.world
            ), wrong
        for wrong in ({"summed": False}, {"stats": torch.zeros(99)}, {"stats": torch.zeros(grid.world).long()}):
            assert (
                mistakes(layer, lambda rank, ep, wrong=wrong: combine(rank, ep, **wrong)) == [ConfigError] * grid.world
            ), wrong
        assert all(torch.equal(out, torch.full((2, 8), 2.0)) for out in layer.run(combine))


def test_handles_of_another_placement_are_refused(crew):
    def work(rank, ep):
        x, ids = torch.ones(2, 8), torch.zeros((2, 1), dtype=torch.int64)
        r = ep.dispatch(x, ids)
        ep.place((3, 2, 1, 0))
        with pytest.raises(ConfigError, match="placement"):
            ep.dispatch(x, handle=r.handle)

    with crew.experts(4, kind=TwoLevel, grid=EVEN, experts=4, hidden=8, topk=1, max_tokens=4) as layer:
        layer.run(work)


def test_a_grid_of_other_ranks_is_refused(crew):
    with pytest.raises(RaynixlError):
        crew.experts(4, kind=TwoLevel, grid=UNEVEN, experts=4, hidden=8, topk=1, max_tokens=4).__enter__()


def test_who_is_masked_is_missing_and_another_one_forwards_in_its_place(crew):
    grid = EVEN  # groups (0, 1) and (2, 3); columns (0, 2) and (1, 3)

    def work(rank, ep):
        if rank == 3:
            return None
        ep.mask(3)
        r = ep.dispatch(torch.full((1, 8), 1.0 + rank), torch.tensor([[0, 1, 2, 3]]))
        out = ep.combine(r.x, r.handle)
        return out[0, 0].item(), ep.active, sorted(r.sources.tolist()), r.lost

    with crew.experts(4, kind=TwoLevel, grid=grid, experts=4, hidden=8, topk=4, max_tokens=4) as layer:
        made = layer.run(work)
    # Each token has an expert at each rank: all but that of rank 3 are in the sums.
    for rank in range(3):
        assert made[rank] == (3.0 * (1 + rank), (0, 1, 2), [0, 1, 2], (3,))


def test_members_are_asked_for_their_hosts(crew):
    def work(rank, ep):
        r = ep.dispatch(torch.ones(2, 8), torch.tensor([[0, 3], [1, 2]]))
        assert torch.equal(ep.combine(r.x, r.handle), torch.full((2, 8), 2.0))
        return ep.grid

    with crew.experts(4, kind=TwoLevel, experts=4, hidden=8, topk=2, max_tokens=4) as layer:
        assert layer.run(work) == [make_grid(4)] * 4  # all are on one host: a square


@pytest.mark.parametrize(("grid", "silent"), [(EVEN, 3), (UNEVEN, 0), (UNEVEN, 3)], ids=str)
def test_who_does_not_come_is_lost_and_nobody_else(crew, grid, silent):
    seconds = 1.5

    def work(rank, ep):
        if rank == silent:
            return None
        ids = torch.arange(grid.world)[None]
        begin = time.monotonic()
        r = ep.dispatch(torch.ones(1, 8), ids)
        first = time.monotonic() - begin
        ep.combine(r.x, r.handle)
        again = ep.dispatch(torch.ones(1, 8), ids)  # here those meet again that have waited for different times
        begin = time.monotonic()
        ep.combine(again.x, again.handle)
        return r.lost, ep.active, again.lost, first, time.monotonic() - begin

    options = {"experts": grid.world, "hidden": 8, "topk": grid.world, "max_tokens": 4, "deadline": seconds}
    with crew.experts(grid.world, kind=TwoLevel, grid=grid, **options) as layer:
        results = layer.run(work)
    others = tuple(rank for rank in range(grid.world) if rank != silent)
    for rank in others:
        lost, active, again, first, second = results[rank]
        assert (lost, active, again) == ((silent,), others, ())
        assert first < seconds + 1
        assert second < seconds / 2, "nobody waits for it a second time"


def random_program(seed):
    rng = np.random.default_rng(seed)
    world = int(rng.integers(1, 9))
    order, cuts = rng.permutation(world), np.sort(rng.choice(np.arange(1, max(2, world)), rng.integers(0, world), True))
    groups = tuple(tuple(sorted(part.tolist())) for part in np.split(order, np.unique(cuts)) if len(part))
    grid = Grid(groups) if rng.random() < 0.7 else make_grid(world)
    layout, at = WAYS[rng.integers(len(WAYS))]
    counts = tuple(rng.integers(0, 9, world).tolist())
    topk, experts = int(rng.integers(1, 7)), int(rng.integers(6, 17))
    first = Dispatch(
        "a", counts, layout, int(rng.integers(1, 5)), at, is_weighted=bool(rng.random() < 0.8),
        missing=float(rng.choice([0, 0.3])), has_duplicates=bool(rng.random() < 0.3),
    )  # fmt: skip
    steps = [first, Combine("a", biases=int(rng.integers(3))), Cached("b", "a"), Combine("b"), CombineWeights("a")]
    return Program(
        world=world, holders=tuple(rng.integers(0, world, experts).tolist()), hidden=int(rng.choice([1, 40, 264])),
        topk=topk, steps=tuple(steps[: rng.integers(2, 6)]), seed=seed, grid=grid,
        dtype=FLOATS[rng.integers(len(FLOATS))], capacity=None if rng.random() < 0.7 else 2,
    )  # fmt: skip


def test_random_grids_and_calls(plays):
    for seed in range(24):
        plays(random_program(seed))

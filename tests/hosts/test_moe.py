"""Expert parallelism between hosts: shared memory inside of each and UCX between them, the bits of one host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hosts_tools import Bed
from moe_faults import OPTIONS, Report
from moe_hosts import Spread
from moe_programs import Cached, Combine, Dispatch, Mask, Program, check, even
from moe_random import draw
from moe_tools import DEADLINE

from raynixl.moe.grid import make_grid
from raynixl.moe.two_level import TwoLevel

pytest.importorskip("ucxx", reason="hosts reach each other by the ucx backend")

SEEDS = range(9000, 9012)


PAIRS, SINGLES = (pytest.param((2, 2), id="2 hosts of 2 ranks"), pytest.param((3, 1), id="3 hosts of 1 rank"))
on_pairs = pytest.mark.parametrize("crew", [PAIRS], indirect=True)
REST, AWAY = [0, 1], [2, 3]
"""The ranks of the first host, and of the other, in pairs."""

SOON = 8.0
"""Seconds within which what is heard of ends a wait of 20."""


@pytest.fixture(scope="module", params=[PAIRS, SINGLES])
def crew(request: pytest.FixtureRequest, _hosts_allowed: None) -> Iterator[Spread]:
    """Ranks on a bed that lives as long as they."""
    hosts, ranks = request.param
    with Bed(hosts) as bed, Spread(bed, ranks) as made:
        yield made


def run(crew: Spread, program: Program, **options: Any) -> None:
    """Play a program on the first ranks of a crew."""
    ranks = range(program.world)
    name = f"layer{program.seed}"
    crew.make(name, ranks=ranks, **program.options(), **options)
    try:
        check(program, crew.call("moe_far:play_layer", program, name, ranks=ranks))
    finally:
        crew.drop(name, ranks)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_give_the_bits_of_the_reference(crew: Spread, seed: int) -> None:
    world = len(crew.children)
    program = draw(seed, (world, world, world - 1))
    try:
        run(crew, program)
    except BaseException as error:
        error.add_note(f"draw({seed}, {(world, world, world - 1)}): {program}")
        raise


def test_rows_as_wide_as_those_of_models(crew: Spread) -> None:
    world, steps = len(crew.children), []
    for number, (layout, weights_at) in enumerate([("tokens", "holder"), ("experts", "source"), ("slots", "holder")]):
        key = str(number)
        steps += [Dispatch(key, (64, 3, 0, 50)[:world], layout, 8, weights_at), Combine(key, 1), Cached(key + "c", key)]
    steps += [Combine("0c"), Combine("2c"), Mask(1), Dispatch("z", (9, 9, 9, 9)[:world]), Combine("z")]
    run(crew, Program(world, even(world, 32), 2048, 6, tuple(steps), max_tokens=64))


@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_two_stages_go_by_the_hosts_that_there_are(crew: Spread, weights_at: str) -> None:
    world = len(crew.children)
    grid = make_grid(world, [host.name for host in crew.homes])
    assert world == 3 or grid.groups == ((0, 1), (2, 3))
    steps = (
        Dispatch("a", (8, 3, 0, 5)[:world], "experts", 4, weights_at, missing=0.1), Combine("a", 1), Cached("b", "a"),
        Dispatch("c", (0, 7, 8, 1)[:world], weights_at=weights_at), Combine("b"), Combine("c"),
    )  # fmt: skip
    program = Program(world, even(world, 12), 512, 4, steps, grid=grid)
    run(crew, program, kind=TwoLevel)  # it asks the members for their hosts


def check_steps(found: Sequence[Sequence[Report]], lost: Sequence[int] = (), gone: Sequence[int] = ()) -> None:
    """Fail unless steps were whole, but for the ranks that were lost in them and those that were gone before."""
    for reports in found:
        for report in reports:
            assert report.lost == tuple(lost)
            assert set(report.unheard) == set(report.missing) == {*lost, *gone}


@pytest.fixture
def layer(crew: Spread) -> Iterator[Spread]:
    """Ranks with a layer, which they have used."""
    crew.make("layer", **OPTIONS)
    check_steps(crew.call("moe_faults:steps", "layer", 3))
    yield crew
    crew.call("moe_faults:drop", "layer")


@on_pairs
def test_a_cut_cable_masks_the_other_side_by_the_deadline_and_healed_it_comes_back(layer: Spread) -> None:
    host = layer.homes[AWAY[0]]
    layer.bed.cut(host)
    try:
        found = layer.call("moe_faults:steps", "layer", 1, deadline=1.0)
        for side, others in ((REST, AWAY), (AWAY, REST)):
            reports = [found[rank] for rank in side]
            check_steps(reports, lost=others)
            assert all(report.active == tuple(side) and report.seconds < SOON for (report,) in reports)
            check_steps(layer.call("moe_faults:steps", "layer", 3, ranks=side), gone=others)
    finally:
        layer.bed.heal(host)
    come_back(layer, "rejoin")


@on_pairs
def test_survivors_of_a_rank_killed_on_another_host_go_on_at_once_and_let_its_successor_in(layer: Spread) -> None:
    victim, rest = 3, [0, 1, 2]
    layer.kill(victim)
    found = layer.call("moe_faults:steps", "layer", 1, deadline=DEADLINE, ranks=rest)
    check_steps(found, lost=[victim])
    assert all(report.active == tuple(rest) and report.seconds < SOON for (report,) in found)
    check_steps(layer.call("moe_faults:steps", "layer", 3, ranks=rest), gone=[victim])
    layer.restart(victim)
    come_back(layer, "make", ranks=[victim])


def come_back(crew: Spread, how: str, ranks: Sequence[int] = AWAY) -> None:
    """Have ranks join those that run, which take steps until all are active."""
    everybody = tuple(range(len(crew.children)))
    for rank in everybody:
        function = f"moe_far:{how}_then_steps" if rank in ranks else "moe_faults:steps_until"
        crew.tell(rank, function, "layer", everybody)
    for rank in everybody:
        crew.hear(rank)
    check_steps(crew.call("moe_faults:steps", "layer", 3))

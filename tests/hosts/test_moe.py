"""Expert parallelism between hosts: shared memory inside of each and UCX between them, the bits of one host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts_tools import Bed
from moe_hosts import Spread
from moe_programs import Cached, Combine, Dispatch, Mask, Program, check, even
from moe_random import draw

pytest.importorskip("ucxx", reason="hosts reach each other by the ucx backend")

SEEDS = range(9000, 9012)


@pytest.fixture(scope="module", params=[(2, 2), (3, 1)], ids=["2 hosts of 2 ranks", "3 hosts of 1 rank"])
def crew(request: pytest.FixtureRequest, _hosts_allowed: None) -> Iterator[Spread]:
    """Ranks on a bed that lives as long as they."""
    hosts, ranks = request.param
    with Bed(hosts) as bed, Spread(bed, ranks) as made:
        yield made


def run(crew: Spread, program: Program) -> None:
    """Play a program on the first ranks of a crew."""
    ranks = range(program.world)
    name = f"layer{program.seed}"
    crew.make(name, ranks=ranks, **program.options())
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
    run(crew, Program(world, even(world, 32), 7168, 6, tuple(steps), max_tokens=64))

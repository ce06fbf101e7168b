"""The same programs in processes of their own: over shared memory, and over UCX."""

from __future__ import annotations

import pytest
from moe_programs import Cached, Combine, Dispatch, Mask, Program, check, even
from moe_random import draw
from moe_tools import Processes

SEEDS = range(5000, 5012)


@pytest.fixture(scope="module", params=["shm", "ucx"])
def crew(request, nursery):
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    with Processes(4, backends=(request.param,), lent=nursery) as made:
        yield made


def run(crew, program):
    """Play a program on the first ranks of a crew."""
    ranks = range(program.world)
    name = f"layer{program.seed}"  # another each time: those of one name are counted, and not all ranks make all
    crew.make(name, ranks=ranks, **program.options())
    try:
        check(program, crew.call("moe_far:play_layer", program, name, ranks=ranks))
    finally:
        crew.drop(name, ranks)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_between_processes(crew, seed):
    program = draw(seed, (2, 3, 4))
    try:
        run(crew, program)
    except BaseException as error:
        error.add_note(f"draw({seed}, (2, 3, 4)): {program}")
        raise


def test_rows_as_wide_as_those_of_models_between_processes(crew):
    steps = []
    for number, (layout, weights_at) in enumerate([("tokens", "holder"), ("experts", "source"), ("slots", "holder")]):
        key = str(number)
        steps += [Dispatch(key, (16, 3, 0, 12), layout, 8, weights_at), Combine(key, 1), Cached(key + "c", key)]
    steps += [Combine("0c"), Combine("2c"), Mask(1), Dispatch("z", (9, 9, 9, 9)), Combine("z")]
    run(crew, Program(4, even(4, 32), 2048, 6, tuple(steps), max_tokens=16))

"""A thousand random programs with all ranks in one process: each returns the bits of the reference.

A program that fails is printed with its seed, by which it is drawn again. The twin plays the first of each batch.
"""

from __future__ import annotations

import pytest
from moe_programs import check, play
from moe_random import draw

BATCHES, PROGRAMS, OF_TWIN = 20, 50, 12


def run(crew, seed):
    program = draw(seed)
    try:
        with crew.experts(program.world, **program.options()) as layer:
            check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))
    except BaseException as error:
        error.add_note(f"program {seed}, again by draw({seed}): {program}")
        raise


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs(crew, batch):
    programs = PROGRAMS if crew.agents[0].native_name == "native" else OF_TWIN
    for number in range(programs):
        run(crew, batch * PROGRAMS + number)

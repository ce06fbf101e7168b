"""A thousand random programs with all ranks in one process: each returns the bits of the reference.

A program that fails is printed with its seed, by which it is drawn again.
"""

from __future__ import annotations

import pytest
from moe_programs import check, play
from moe_random import draw

BATCHES, PROGRAMS = 20, 50


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
    for seed in range(batch * PROGRAMS, (batch + 1) * PROGRAMS):
        run(crew, seed)

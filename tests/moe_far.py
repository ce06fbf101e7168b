"""What ranks in processes of their own are told to do, by name; see `moe_tools.Processes.call`."""

from __future__ import annotations

from typing import Any

from moe_faults import OPTIONS, step, steps_until
from moe_programs import Program, check, play
from moe_random import draw
from moe_tools import Threads, make_experts


def play_layer(member: Any, program: Program, layer: str) -> list[Any]:
    """Do this rank's part of a program on a layer."""
    return play(program, member.rank, member.eps[layer], member.groups[layer])


def play_random(member: Any, first: int, count: int, of_twin: int, players: int) -> int:
    """Play our share of so many random programs, fewer with the twin, with all ranks in this process; return how many.

    What they return is held against the reference.
    """
    total = count if member.agent.native_name == "native" else of_twin
    seeds = range(first + member.rank, first + total, players)
    with Threads(8) as crew:
        for seed in seeds:
            _play_drawn(crew, seed)
    return len(seeds)


def _play_drawn(crew: Threads, seed: int) -> None:
    program = draw(seed)
    try:
        with crew.experts(program.world, **program.options()) as layer:
            check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))
    except BaseException as error:
        error.add_note(f"program {seed}, again by draw({seed}): {program}")
        raise


def make_then_steps(member: Any, layer: str, active: tuple[int, ...]) -> None:
    """Make the layer of a rank that is new in its process, and take steps until these are active."""
    make_experts(member, [f"rank{rank}" for rank in active], {"name": layer, "deadline": 20.0, **OPTIONS})
    _steps_of_one_let_in(member, layer, active)


def rejoin_then_steps(member: Any, layer: str, active: tuple[int, ...]) -> None:
    """Come back, and take steps until these are active."""
    member.eps[layer].rejoin(deadline=20.0)
    _steps_of_one_let_in(member, layer, active)


def _steps_of_one_let_in(member: Any, layer: str, active: tuple[int, ...]) -> None:
    step(member, layer)  # the others take it with us
    steps_until(member, layer, active)

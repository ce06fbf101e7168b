"""Ranks in processes of their own, on GPUs that are made up: memory is opened by CUDA IPC; who dies harms nobody."""

from __future__ import annotations

import pytest
from moe_cuda_crews import OPTIONS
from moe_kernels_host import library
from moe_programs import Cached, Combine, Dispatch, Place, Program, check, even
from moe_tools import DEADLINE, Processes

WORLD = 3


@pytest.fixture
def crew(nursery):
    library()
    with Processes(WORLD, backends=("shm", "nvlink"), lent=nursery) as made:
        made.call("moe_cuda_far:begin")
        yield made


def test_rows_go_into_memory_of_other_processes(crew):
    ways = [("tokens", 1, "holder"), ("experts", 4, "source"), ("slots", 1, "source")]
    steps = [
        one for number, way in enumerate(ways)
        for one in (
            Dispatch(f"{number}", (3, 0, 5), *way), Combine(f"{number}", biases=1), Cached(f"{number}b", f"{number}"),
            Combine(f"{number}b"),
        )
    ]  # fmt: skip
    steps += [Place((2, 2, 1, 0, 0, 0, 1)), Dispatch("z", (2, 2, 2)), Combine("z")]
    program = Program(WORLD, even(WORLD, 7), 16, 3, tuple(steps))
    crew.make("layer", **program.options())
    played = crew.call("moe_cuda_far:play_layer", program, "layer")
    check(program, [one for one, _ in played])
    assert all("put rows into the peers' memory" in said for _, said in played)
    crew.call("moe_cuda_far:end")


def test_a_process_that_is_killed_is_not_waited_for(crew):
    crew.make("layer", **OPTIONS)
    everyone, rest = [0, 1, 2], [0, 1]
    assert crew.call("moe_cuda_far:take_step", "layer", 0, everyone) == [(True, (0, 1, 2))] * 3
    crew.kill(2)
    crew.call("moe_cuda_far:take_step", "layer", 1, rest, ranks=rest)
    assert crew.call("moe_cuda_far:take_step", "layer", 2, rest, ranks=rest) == [(True, (0, 1))] * 2
    crew.call("moe_cuda_far:end", ranks=rest)


def test_a_graph_of_former_windows_waits_for_no_process_that_was_killed(crew):
    crew.make("layer", **OPTIONS)
    everyone, rest = [0, 1, 2], [0, 1]
    crew.call("moe_cuda_far:take_step", "layer", 0, everyone)
    for rank in everyone:
        crew.tell(rank, "moe_cuda_far:keep_graph", "layer", rank)
    for rank in everyone:
        crew.hear(rank)
    assert max(crew.call("moe_cuda_far:replay")) < DEADLINE / 2
    crew.kill(2)
    assert max(crew.call("moe_cuda_far:replay", ranks=rest)) < DEADLINE / 2
    assert max(crew.call("moe_cuda_far:replay", ranks=rest)) < DEADLINE / 2
    crew.call("moe_cuda_far:take_step", "layer", 1, rest, ranks=rest)
    assert crew.call("moe_cuda_far:take_step", "layer", 2, rest, ranks=rest) == [(True, (0, 1))] * 2
    crew.call("moe_cuda_far:end", ranks=rest)

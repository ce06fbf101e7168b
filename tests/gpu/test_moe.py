"""Expert parallelism of processes that share one GPU: the bits of the reference, graphs, and ranks that end or freeze.

Processes on one GPU take turns unless MPS runs: a kernel that waits for another rank holds its turn. So steps are slow
here, and no time is asserted but that of deadlines.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_moe import OPTIONS, Crew, crew_of
from moe_programs import WAYS, Cached, Combine, CombineWeights, Dispatch, Place, Program, even

from raynixl.moe.grid import Grid

pytestmark = [
    pytest.mark.gpu, pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch with CUDA"),
]  # fmt: skip

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with crew_of(4) as made:
        yield made


@every_way
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_bits_are_those_of_the_reference(crew: Crew, way, world: int) -> None:
    counts = (30, 0, 64, 17)[:world]
    steps = (
        Dispatch("a", counts, *way, missing=0.2), Combine("a", biases=1), Cached("b", "a", "bits"), Combine("b"),
        Dispatch("c", counts[::-1], *way, has_duplicates=True, ids_dtype=torch.int32), Combine("c", out="given"),
        *((CombineWeights("c"),) if way[0] != "slots" else ()), Place(even(world, 16)[::-1]),
        Dispatch("d", (64,) * world, *way, x_kind="strided"), Combine("d", out="float32"),
    )  # fmt: skip
    crew.play(Program(world, even(world, 16), 1032, 6, steps, max_tokens=64), f"bits-{world}-{'-'.join(map(str, way))}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8])
def test_rows_of_any_dtype(crew: Crew, dtype) -> None:
    steps = (Dispatch("a", (30, 5), *WAYS[2]), Combine("a", biases=2), Dispatch("b", (8, 8), *WAYS[5]), Combine("b"))
    crew.play(Program(2, even(2, 8), 256, 3, steps, max_tokens=32, dtype=dtype), f"dtype-{dtype}")


@every_way
def test_so_they_are_in_two_stages_by_way_of_the_host(crew: Crew, way) -> None:
    counts, grid = (30, 0, 64, 17), Grid(((0, 1), (2, 3)))
    steps = (
        Dispatch("a", counts, *way, missing=0.2), Combine("a", biases=1), Cached("b", "a", "bits"),
        Combine("b", out="given"), *((CombineWeights("a"),) if way[0] != "slots" else ()),
    )  # fmt: skip
    program = Program(4, even(4, 16), 1032, 6, steps, max_tokens=64, grid=grid)
    crew.play(program, f"staged-{'-'.join(map(str, way))}")


def test_seconds_that_a_rank_was_waited_for_are_added_on_the_gpu(crew: Crew) -> None:
    crew.make("wait", deadline=60.0, **OPTIONS)
    crew.all("do_step", name="wait", number=0, active=[0, 1, 2, 3])
    for rank, found in enumerate(crew.all("do_wait", name="wait", late=1, seconds=1.0)):
        for waited in found:
            assert waited[rank] == 0
            assert rank == 1 or 0.2 < waited[1] < 30
    crew.all("drop", name="wait")


def test_a_step_is_captured_in_a_graph_and_replayed(crew: Crew) -> None:
    crew.make("graph", deadline=60.0, **OPTIONS)
    assert crew.all("do_graph", name="graph", replays=20) == [[True] * 20] * crew.world
    crew.all("drop", name="graph")


@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_a_rank_that_is_killed_is_not_waited_for(layout: str) -> None:
    with crew_of(3) as crew:
        crew.make("kill", deadline=60.0, **OPTIONS)
        first = crew.all("do_step", name="kill", number=0, active=[0, 1, 2], layout=layout)
        assert all(right for right, _, _ in first)
        crew.fars[2].kill()
        for number in (1, 2, 3):
            told = crew.all("do_step", [0, 1], name="kill", number=number, active=[0, 1], layout=layout)
            assert all(seconds < 30.0 for _, seconds, _ in told)
        assert all(right and active == (0, 1) for right, _, active in told)


@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_a_rank_that_is_frozen_is_masked_by_the_deadline(layout: str) -> None:
    with crew_of(3) as crew:
        crew.make("freeze", deadline=60.0, **OPTIONS)
        one = {"name": "freeze", "layout": layout}
        first = crew.all("do_step", number=0, active=[0, 1, 2], **one)  # starts CUDA, and may compile kernels
        assert all(right for right, _, _ in first)
        crew.fars[2].stop()
        crew.all("do_step", [0, 1], number=1, active=[0, 1], deadline=3.0, **one)
        told = crew.all("do_step", [0, 1], number=2, active=[0, 1], deadline=3.0, **one)
        assert all(right and active == (0, 1) for right, _, active in told)
        crew.fars[2].go_on()

"""Rows on GPUs that are made up: whatever tokens and routers come up with, the bits are those of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_cuda_crews import GpuCrew, gpu_crew
from moe_programs import WAYS, Cached, Combine, CombineWeights, Dispatch, Drop, Place, Program, even

from raynixl.moe.cuda_layer import GpuLayer

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))


@pytest.fixture(scope="module")
def crew() -> Iterator[GpuCrew]:
    with gpu_crew(5) as made:
        yield made


def fresh(key, way, counts, **more):
    return Dispatch(key, counts, *way, **more)


@every_way
def test_tokens_of_any_kind_and_number(crew, way):
    steps = (
        fresh("a", way, (3, 0, 5, 2)), Combine("a"), fresh("b", way, (0, 0, 7, 0)), Combine("b", biases=1),
        fresh("c", way, (0, 0, 0, 0)), Combine("c"), fresh("d", way, (6, 6, 6, 6), missing=0.9),
        Combine("d", biases=2), fresh("e", way, (8, 1, 8, 1), only=(2, 3)), Combine("e", out="float32"),
        fresh("f", way, (3, 4, 2, 1), silent=(0, 2), ids_dtype=torch.int32), Combine("f", out="given", is_strided=True),
        fresh("g", way, (4, 0, 6, 2), has_duplicates=True, x_kind="bits"), Combine("g"),
        fresh("h", way, (3, 5, 2, 4), is_weighted=False, x_kind="strided"), Combine("h", is_strided=True),
    )  # fmt: skip
    crew.play(Program(4, even(4, 8), 24, 3, steps))


@every_way
@pytest.mark.parametrize(("world", "experts", "topk"), [(5, 3, 3), (1, 6, 4), (3, 100, 22)])
def test_ranks_need_not_divide_experts_nor_have_any(crew, way, world, experts, topk):
    steps = (fresh("a", way, (4, 2, 1, 0, 3)[:world]), Combine("a"))
    crew.play(Program(world, even(world, experts), 16, topk, steps))


@pytest.mark.parametrize("way", [WAYS[1], WAYS[2], WAYS[4]], ids=lambda way: "-".join(map(str, way)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8])
def test_rows_of_any_dtype(crew, way, dtype):
    steps = (fresh("a", way, (3, 5)), Combine("a", biases=1), fresh("b", way, (2, 1)), Combine("b"))
    crew.play(Program(2, even(2, 4), 256, 2, steps, dtype=dtype))


@every_way
@pytest.mark.parametrize("hidden", [1, 135])
def test_rows_of_any_width(crew, way, hidden):
    steps = (fresh("a", way, (3, 5)), Combine("a"), fresh("b", way, (2, 1)), Combine("b", is_strided=True))
    crew.play(Program(2, even(2, 4), hidden, 2, steps))


@every_way
def test_handles_are_used_again_in_any_order(crew, way):
    other = ("experts", 2, "holder") if way[0] != "experts" else ("tokens", 1, "source")
    steps = (
        fresh("a", way, (3, 0, 5), missing=0.2), Cached("b", "a"), fresh("c", other, (5, 2, 1)), Combine("b"),
        Cached("d", "b", "bits"), Combine("c"), Combine("a"), Drop("a"), Combine("d"), Cached("e", "c"), Combine("e"),
    )  # fmt: skip
    crew.play(Program(3, even(3, 7), 16, 3, steps))


@every_way
def test_experts_move_between_two_steps(crew, way):
    steps = (
        fresh("a", way, (3, 4, 5)), Place((2, 2, 0, 0, 0, 0)), fresh("b", way, (3, 4, 5)), Combine("b"), Combine("a"),
        Place((1, -1, 1, 0, 2, 2)), fresh("c", way, (3, 4, 5)), Combine("c"),
    )  # fmt: skip
    crew.play(Program(3, even(3, 6), 16, 2, steps))


@pytest.mark.parametrize("way", WAYS[:4], ids=lambda way: "-".join(map(str, way)))
def test_weights_that_come_back(crew, way):
    steps = (fresh("a", way, (3, 0, 4, 5), missing=0.3, has_duplicates=True), CombineWeights("a"))
    crew.play(Program(4, even(4, 8), 16, 3, steps))


@every_way
def test_steps_that_are_waited_for_later(crew, way):
    steps = (
        fresh("a", way, (3, 0, 4), is_async=True), Combine("a", is_async=True), Cached("b", "a", is_async=True),
        Combine("b"),
    )  # fmt: skip
    crew.play(Program(3, even(3, 6), 16, 2, steps))


@every_way
def test_kernels_that_wait_for_others_themselves(crew, way, monkeypatch):
    """As they do where each rank has a GPU of its own, and steps are small."""
    monkeypatch.setattr(GpuLayer, "waits_apart", lambda _layer, _nbytes: False)
    steps = (fresh("a", way, (3, 0, 5), missing=0.2), Combine("a", biases=1), Cached("b", "a"), Combine("b"))
    crew.play(Program(3, even(3, 7), 16, 3, steps))

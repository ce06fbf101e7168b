"""The kernels of expert parallelism, run by the host: the bits of the reference in every layout."""

from __future__ import annotations

import pytest
import torch
from moe_kernel_steps import draw, play, within_wider
from moe_programs import even

from raynixl.moe.reference import Setting, Tokens

pytestmark = pytest.mark.pure

WAYS = [
    ("tokens", 1, "holder"), ("tokens", 1, "source"), ("experts", 1, "holder"), ("experts", 8, "holder"),
    ("experts", 4, "source"), ("slots", 1, "holder"), ("slots", 1, "source"),
]  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))


def setting_of(way, world, experts, max_tokens=8, **more):
    layout, alignment, weights_at = way
    holders = even(world, experts) if isinstance(experts, int) else experts
    return Setting(world, holders, max_tokens, layout, alignment, weights_at, **more)


@every_way
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 5, 2), (0, 0, 0), (8,), (1, 1, 8, 0)], ids=str)
def test_any_number_of_tokens_on_each_rank(way, counts, fused):
    setting = setting_of(way, len(counts), 8)
    play(setting, draw(setting, counts, 16, 3), fused=fused)


@every_way
def test_more_tokens_than_a_cta_has_threads(way):
    setting = setting_of(way, 2, 6, max_tokens=300)
    play(setting, draw(setting, (300, 130), 24, 4, missing=0.1), threads=32, grid=5, fused=True)


def test_more_rows_than_a_cta_can_note():
    setting = setting_of(("tokens", 1, "holder"), 1, 2, max_tokens=2500)
    play(setting, draw(setting, (2500,), 8, 1), threads=64, grid=1)


@every_way
@pytest.mark.parametrize(("grid", "threads"), [(1, 64), (3, 32), (17, 96)])
def test_any_number_of_ctas_and_threads(way, grid, threads):
    setting = setting_of(way, 4, 8)
    play(setting, draw(setting, (3, 8, 0, 5), 520, 3), grid=grid, threads=threads, fused=True)


@every_way
def test_ctas_at_the_same_time(way):
    setting = setting_of(way, 3, 8, max_tokens=40)
    play(setting, draw(setting, (40, 33, 0), 48, 3), grid=12, threads=32, at_once=4, fused=True, rounds=4)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_that_are_summed(way, dtype):
    setting = setting_of(way, 3, 8)
    play(setting, draw(setting, (6, 0, 5), 37, 4, dtype=dtype, missing=0.2), y_dtype=dtype)


@every_way
def test_rows_of_any_width_and_bits(way):
    setting = setting_of(way, 3, 6)
    for hidden in (1, 3, 8, 130):
        play(setting, draw(setting, (6, 2, 5), hidden, 3, kind="bits"), fused=True)


@every_way
def test_float8_and_its_scales(way):
    setting = setting_of(way, 3, 6)
    play(setting, draw(setting, (6, 2, 5), 256, 3, dtype=torch.float8_e4m3fn), fused=True)


@every_way
def test_y_and_tokens_within_wider_tensors(way):
    setting = setting_of(way, 3, 6)
    tokens = [Tokens(within_wider(one.x), one.topk_idx, one.topk_weights) for one in draw(setting, (6, 2, 5), 24, 3)]
    play(setting, tokens, strided=True)


@every_way
@pytest.mark.parametrize(("topk", "experts"), [(1, 8), (22, 64), (8, 8), (5, 3), (64, 64), (3, 300)])
def test_one_or_many_or_all_experts_for_a_token(way, topk, experts):
    setting = setting_of(way, 4, experts)
    play(setting, draw(setting, (3, 5, 2, 4), 16, topk), fused=True)


@every_way
def test_the_same_expert_several_times_in_a_token_and_none_in_others(way):
    setting = setting_of(way, 3, 6)
    play(setting, draw(setting, (6, 8, 5), 16, 5, duplicates=True, missing=0.4), fused=True)
    play(setting, draw(setting, (6, 8, 5), 16, 5, missing=1.0), fused=True)


@every_way
def test_ids_of_32_bits_and_no_weights(way):
    setting = setting_of(way, 3, 6)
    play(setting, draw(setting, (6, 8, 5), 16, 3, ids_dtype=torch.int32, weighted=False, missing=0.1))


@every_way
def test_ranks_without_experts_and_experts_of_nobody(way):
    setting = setting_of(way, 4, (0, -1, 2, 2, -1, 0, 0))
    play(setting, draw(setting, (6, 8, 5, 3), 16, 3), fused=True)


@every_way
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_biases_and_another_dtype_of_the_result(way, count, dtype):
    setting = setting_of(way, 3, 6)
    tokens = draw(setting, (6, 0, 5), 24, 3, missing=0.5)
    gen = torch.Generator().manual_seed(3)
    biases = [[torch.randn(len(one.x), 24, generator=gen).to(dtype), torch.randn(24, generator=gen).to(dtype)][:count]
              for one in tokens]  # fmt: skip
    play(setting, tokens, biases=biases, out_dtype=dtype, y_dtype=torch.bfloat16)


@every_way
def test_steps_one_after_another_reuse_the_sides(way):
    setting = setting_of(way, 4, 8)
    crew = None
    for seed, counts in enumerate([(3, 8, 0, 5), (8, 8, 8, 8), (0, 0, 1, 0), (2, 3, 4, 5), (8, 0, 0, 8)]):
        crew = play(setting, draw(setting, counts, 40, 3, seed=seed), crew=crew, fused=True, rounds=3)
    for gpu in crew.gpus:
        assert list(gpu.page.turns) == [15, 15]
        assert gpu.page.operation == gpu.layer.operation == (1 << 32) + 30
        assert (gpu.page.lost, gpu.page.masked, gpu.page.refused) == (0, 0, 0)

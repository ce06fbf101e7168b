"""The kernels of expert parallelism, run by the host: the bits of the reference in every layout."""

from __future__ import annotations

import pytest
import torch
from moe_kernel_steps import draw, play
from moe_programs import even

from raynixl.moe.reference import Setting

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

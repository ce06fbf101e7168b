"""However many ranks there are, the bits are the same where experts work row by row and weights apply at the source."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from moe_programs import Program, even
from moe_rows import draw_ids, draw_rows

from raynixl.moe import reference
from raynixl.moe.reference import Setting, Tokens

TOKENS, EXPERTS, HIDDEN, TOPK = 40, 16, 48, 5


def all_tokens(dtype):
    rng = np.random.default_rng(7)
    x, _ = draw_rows(rng, TOKENS, HIDDEN, dtype, "plain")
    ids = draw_ids(rng, (TOKENS, TOPK), range(EXPERTS), True)
    ids[rng.random(ids.shape) < 0.1] = -1
    return x, torch.from_numpy(ids), torch.from_numpy(rng.random(ids.shape, dtype=np.float32))


def shares(world):
    """Cut the tokens for so many ranks: unequal where there are several."""
    cuts = [0, *sorted((7 * rank + 3) % TOKENS for rank in range(1, world)), TOKENS]
    return list(itertools.pairwise(cuts))


def outputs(crew, world, dtype, layout, holders=None):
    given = all_tokens(dtype)
    program = Program(world, even(world, EXPERTS) if holders is None else holders, HIDDEN, TOPK, (), TOKENS, dtype)
    setting = Setting(world, program.holders, TOKENS, layout, 4, "source")

    def work(rank, ep):
        begin, end = shares(world)[rank]
        made = ep.dispatch(
            *(each[begin:end] for each in given), layout=layout, alignment=setting.alignment, weights_at="source"
        )
        return ep.combine(reference.run_experts(setting, rank, made, program.expert, dtype), made.handle)

    with crew.experts(world, **program.options()) as layer:
        return torch.cat(layer.run(work))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["tokens", "experts", "slots"])
def test_the_same_bits_for_1_2_4_and_8_ranks(crew, dtype, layout):
    alone = outputs(crew, 1, dtype, layout)
    program = Program(1, (0,) * EXPERTS, HIDDEN, TOPK, ())
    exact = reference.dense(Setting(1, (0,) * EXPERTS, TOKENS), Tokens(*all_tokens(dtype)), program.expert)
    torch.testing.assert_close(alone.double(), exact, rtol=0.05, atol=0.05)
    for world in (2, 3, 4, 8):
        assert torch.equal(outputs(crew, world, dtype, layout), alone), f"{world} ranks"


def test_the_same_bits_for_any_placement(crew):
    alone = outputs(crew, 1, torch.bfloat16, "experts")
    for seed in range(3):
        holders = tuple(np.random.default_rng(seed).integers(0, 4, EXPERTS).tolist())
        assert torch.equal(outputs(crew, 4, torch.bfloat16, "experts", holders), alone)


def test_the_same_bits_again_and_again(crew):
    first = outputs(crew, 4, torch.bfloat16, "tokens")
    assert all(torch.equal(outputs(crew, 4, torch.bfloat16, "tokens"), first) for _ in range(5))

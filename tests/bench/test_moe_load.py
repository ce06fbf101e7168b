"""The MoE benchmark's own check: it agrees with the reference, and finds whatever is wrong."""

import threading
from dataclasses import replace

import pytest
import torch

from raynixl.bench.moe_load import (
    Load,
    Received,
    expected_result,
    is_received,
    is_result,
    make_tokens,
    run_experts,
)
from raynixl.bench.step_barrier import StepBarrier
from raynixl.errors import TransferTimeout
from raynixl.moe import reference

LOAD = Load(ranks=3, tokens=7, hidden=16, topk=2, experts=8)
SEED = 5

pytestmark = pytest.mark.pure


def factor(expert):
    return 0.5 + torch.tensor(expert, dtype=torch.float32) / LOAD.experts


def dispatched(load, rank):
    """What a dispatch must give a rank, by the reference."""
    setting = reference.Setting(load.ranks, load.holders().tolist(), load.tokens)
    every = [make_tokens(load, source, SEED) for source in range(load.ranks)]
    given = [reference.Tokens(one.x, one.ids, one.weights) for one in every]
    found = reference.dispatch(setting, given)[rank]
    return Received(found.x, found.topk_idx, found.topk_weights, found.counts)


@pytest.mark.parametrize("layout", ["tokens", "experts"])
def test_what_must_come_out_is_what_the_reference_says(layout):
    load = replace(LOAD, layout=layout)
    setting = reference.Setting(load.ranks, load.holders().tolist(), load.tokens, layout=layout)
    given = [make_tokens(load, source, SEED) for source in range(load.ranks)]
    tokens = [reference.Tokens(one.x, one.ids, one.weights) for one in given]
    ys = []
    for rank, each in enumerate(reference.dispatch(setting, tokens)):
        if layout == "tokens":
            ys.append(torch.empty_like(each.x))
            run_experts(load, rank, Received(each.x, each.topk_idx, each.topk_weights, each.counts), ys[-1])
        else:
            expert = lambda name, rows: (rows.float() * factor(name)).to(rows.dtype)  # noqa: E731
            ys.append(reference.run_experts(setting, rank, each, expert, torch.bfloat16))
    for found, one in zip(reference.combine(setting, tokens, ys), given, strict=True):
        assert torch.equal(found, expected_result(load, one))


def change(tensor, row):
    changed = tensor.clone()
    changed[row] += 1
    return changed


@pytest.mark.parametrize("rank", range(3))
def test_rows_that_are_wrong_are_found(rank):
    right = dispatched(LOAD, rank)
    assert is_received(LOAD, rank, right, SEED)
    swapped = right.x[[1, 0, *range(2, len(right.x))]]
    wrong = [
        replace(right, x=swapped),
        replace(right, x=change(right.x, -1)),
        replace(right, ids=change(right.ids, 0)),
        replace(right, weights=change(right.weights, 0)),
        replace(right, counts=change(right.counts, 0)),
        replace(right, x=right.x[:-1], ids=right.ids[:-1], weights=right.weights[:-1]),
        replace(right, x=torch.cat([right.x, right.x[:1]])),
    ]
    assert [is_received(LOAD, rank, one, SEED) for one in wrong] == [False] * len(wrong)
    assert not is_received(LOAD, rank, right, SEED + 1)


def test_sums_that_are_wrong_are_found():
    tokens = make_tokens(LOAD, 1, SEED)
    right = expected_result(LOAD, tokens)
    nearly = right.clone()
    nearly[0, 0] *= 1.01
    assert is_result(LOAD, right.clone(), tokens, is_exact=True)
    assert not is_result(LOAD, nearly, tokens, is_exact=True)
    assert is_result(LOAD, nearly, tokens, is_exact=False)
    for is_exact in (True, False):
        assert not is_result(LOAD, change(right, 3), tokens, is_exact=is_exact)
        assert not is_result(LOAD, right[:-1], tokens, is_exact=is_exact)


def test_a_barrier_holds_everybody_until_the_last_has_come(tmp_path):
    rounds, log = 20, []

    def take_part(rank):
        barrier = StepBarrier(tmp_path / "barrier", rank, 3)
        for number in range(rounds):
            log.append(number)
            barrier.wait()

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert log == sorted(log)
    assert len(log) == 3 * rounds


def test_a_barrier_names_a_rank_that_does_not_come(tmp_path):
    barrier = StepBarrier(tmp_path / "barrier", 0, 2, seconds=0.05)
    with pytest.raises(TransferTimeout, match="rank 1 did not begin"):
        barrier.wait()

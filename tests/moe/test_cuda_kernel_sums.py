"""Sums of the kernels: the bits of the core's, NaNs among them; weights that come back; what is missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from moe_kernel_crew import Crew, Gpu, add_up, give, send, take
from moe_kernel_steps import draw, frame_for, same, same_sums
from moe_programs import even

from raynixl.moe import reference
from raynixl.moe.calls import CODES
from raynixl.moe.reference import Setting
from raynixl.native import load

pytestmark = pytest.mark.pure
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["tokens", "experts", "slots"]


def any_bits(rng, rows, hidden, dtype):
    """Rows of whatever bits, NaNs among them, and of denormals."""
    raw = rng.integers(0, 256, (rows, hidden * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype) if rows else torch.empty((0, hidden), dtype=dtype)


def core_sums(rows, items, weights, out_dtype, biases):
    """What the core's twin makes of rows: by token, the numbers of those that are added, and their weights."""
    hidden = rows.shape[1]
    out = torch.zeros((len(items), hidden), dtype=out_dtype)
    starts = np.concatenate([[0], np.cumsum([len(one) for one in items])]).astype(np.int64)
    flat = np.array([item for one in items for item in one], np.uint64)
    addresses = np.uint64(rows.data_ptr()) + flat * np.uint64(hidden * rows.element_size())
    factors = None if weights is None else np.array([w for one in weights for w in one], np.float32)
    stride, code = (biases[0].stride(0) * biases[0].element_size(), CODES[biases[0].dtype]) if biases else (0, 0)
    with np.errstate(invalid="ignore"):
        load(native=False).reduce_rows(
            out.data_ptr(), hidden * out.element_size(), CODES[out.dtype], starts, addresses, CODES[rows.dtype],
            factors, hidden, np.array([bias.data_ptr() for bias in biases], np.uint64), stride, code, [], None,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("hidden", [1, 8, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_any_bits_are_those_of_the_core(dtype, hidden):
    tokens, topk, rng = 8, 3, np.random.default_rng(hidden)
    setting = Setting(1, [0] * 4, tokens, "tokens", 1, "source")
    given = draw(setting, (tokens,), 8, topk, missing=0.4)[0]
    gpu = Crew(frame_for(setting, max(8, hidden), topk)).gpus[0]
    held = send(gpu, setting, given)
    take(gpu, setting, given, held)
    pairs = (given.topk_idx >= 0).numpy()
    y = any_bits(rng, int(pairs.sum()), hidden, dtype)
    numbers = np.where(pairs, pairs.ravel().cumsum().reshape(pairs.shape) - 1, -1)
    items = [[item for item in row if item >= 0] for row in numbers.tolist()]
    is_wide = dtype == torch.float64
    outs = [one for one in DTYPES if (one == torch.float64) == is_wide]
    for weighted, out, bias in itertools.product((True, False), outs, (None, *(DTYPES if is_wide else outs))):
        biases = [] if bias is None else [any_bits(rng, tokens, hidden, bias) for _ in range(2)]
        held.weights = given.topk_weights if weighted else None
        weights = [given.topk_weights[t][torch.from_numpy(pairs[t])].tolist() for t in range(tokens)]
        give(gpu, y, held)
        found, _ = add_up(gpu, y, held, biases=biases, out=torch.zeros((tokens, hidden), dtype=out))
        same(found, core_sums(y, items, weights if weighted else None, out, biases), f"{out} with {bias}, {weighted}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_at", ["holder", "source"])
@pytest.mark.parametrize("topk", [3, 40])
def test_weights_come_back_beside_y(layout, weights_at, topk):
    setting = Setting(3, even(3, 48), 8, layout, 4, weights_at)
    tokens = draw(setting, (5, 0, 7), 16, topk, missing=0.3)
    plain = [reference.dispatch(Setting(3, setting.holders, 8, "tokens", 1, weights_at), tokens)[r] for r in range(3)]
    rng = np.random.default_rng(1)
    beside = [torch.from_numpy(rng.random(tuple(one.topk_idx.shape), dtype=np.float32)) for one in plain]
    wanted = reference.combine_weights(setting, tokens, [torch.where(a.topk_idx >= 0, b, 0) for a, b in
                                                         zip(plain, beside, strict=True)])  # fmt: skip

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)
        mine = beside[gpu.me]
        if layout == "slots":
            mine = torch.zeros(held.row_ids.shape)
            mine[held.tokens >= 0] = beside[gpu.me]
        y = torch.ones((*held.x.shape[:-1], 16), dtype=torch.bfloat16)
        if weights_at == "source" and layout != "experts":
            y = torch.ones((int((held.row_ids >= 0).sum()), 16), dtype=torch.bfloat16)
        give(gpu, y, held, beside=mine)
        return add_up(gpu, y, held, beside=True)[1]

    for found, want in zip(Crew(frame_for(setting, 16, topk)).each(work), wanted, strict=True):
        same(found, want, "weights")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_come_back_apart(layout):
    setting = Setting(2, even(2, 6), 8, layout, 2, "source")
    tokens = draw(setting, (5, 7), 16, 3, missing=0.3)

    def work(gpu: Gpu):
        given = tokens[gpu.me]
        held = send(gpu, setting, given)
        take(gpu, setting, given, held)
        y = reference.run_experts(setting, gpu.me, held, lambda name, rows: rows + name, torch.bfloat16)
        give(gpu, y, held)
        return add_up(gpu, y, held, apart=True)[0]

    for given, found in zip(tokens, Crew(frame_for(setting, 16, 3)).each(work), strict=True):
        names = given.topk_idx.reshape(-1, 1)
        want = torch.where(names >= 0, given.x.repeat_interleave(3, 0) + names.to(torch.bfloat16), 0)
        same(found, want.to(torch.bfloat16), "pairs")


@pytest.mark.parametrize("is_zero", [False, True])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
@pytest.mark.parametrize("topk", [2, 7, 8, 9, 16, 33])
def test_what_is_missing_is_made_up_for_as_the_core_path_does(weights_at, topk, is_zero):
    """Rank 1 is masked between dispatch and combine: the scale is a quotient of sums made as numpy makes them."""
    experts = 48
    setting = Setting(3, even(3, experts), 8, "tokens", 1, weights_at, renormalise=True)
    tokens = draw(setting, (8, 8, 8), 16, topk, missing=0.2)
    for one in tokens if is_zero else ():
        one.topk_weights[:] = torch.where(torch.arange(topk) % 2 == 0, 0.5, -0.5)
    arrived = reference.dispatch(setting, tokens)
    ys = [reference.run_experts(setting, r, one, lambda n, rows: rows + n, torch.float32)
          for r, one in enumerate(arrived)]  # fmt: skip

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)
        if gpu.me == 1:
            return None
        gpu.mask(1 << 1)
        give(gpu, ys[gpu.me], held)
        return add_up(gpu, ys[gpu.me], held, renormalises=True)[0]

    found = Crew(frame_for(setting, 16, topk)).each(work)
    for rank in (0, 2):
        same_sums(found[rank], _renormalised(setting, tokens, rank, ys), f"rank {rank}")


def _renormalised(setting, tokens, rank, ys):
    """Sums of what ranks 0 and 2 hold, times the quotient of weights as summing.lost_scale works it out."""
    plain = Setting(3, setting.holders, 8, "tokens", 1, setting.weights_at)
    given = tokens[rank]
    ids, weights = given.topk_idx.numpy(), given.topk_weights.numpy()
    holders = np.where(ids >= 0, np.array(setting.holders)[ids], -1)
    whole = np.where(ids >= 0, weights, np.float32(0)).sum(axis=1, dtype=np.float32)
    rest = np.where((holders >= 0) & (holders != 1), weights, np.float32(0)).sum(axis=1, dtype=np.float32)
    scale = np.divide(whole, rest, out=np.ones_like(whole), where=rest != 0)
    zeros = [y if r != 1 else torch.zeros_like(y) for r, y in enumerate(ys)]
    return reference.combine(plain, tokens, zeros)[rank] * torch.from_numpy(scale)[:, None]

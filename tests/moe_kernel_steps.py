"""Whole steps on ranks whose kernels run on the host, held against the reference, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from moe_kernel_crew import Crew, Gpu, add_up, give, send, take
from moe_rows import draw_ids, draw_rows
from torch import Tensor

from raynixl.moe import reference
from raynixl.moe.cuda_frame import Frame, fields_at
from raynixl.moe.reference import Setting, Tokens


def expert(name: int, rows: Tensor) -> Tensor:
    """What an expert makes of its rows."""
    return rows * (name % 5 + 1) + 0.25 * name


def frame_for(setting: Setting, hidden: int, topk: int, itemsize: int = 8) -> Frame:
    """A frame for rows of any dtype, and for pairs."""
    most = max(Counter(holder for holder in setting.holders if holder >= 0).values(), default=1)
    width = hidden * itemsize
    row_nbytes = fields_at([width, width, 64, 4 * topk, 4 * topk, 4])[1]
    item_nbytes = fields_at([width, 4 * topk])[1]
    return Frame(setting.world, setting.max_tokens, row_nbytes, item_nbytes, setting.max_tokens * topk, most)


def draw(setting: Setting, counts: Sequence[int], hidden: int, topk: int, *, dtype: torch.dtype = torch.bfloat16,
         seed: int = 0, kind: str = "plain", missing: float = 0.0, weighted: bool = True, duplicates: bool = False,
         only: Sequence[int] | None = None, ids_dtype: torch.dtype = torch.int64) -> list[Tokens]:  # fmt: skip
    """What each rank gives."""
    given = []
    for rank, count in enumerate(counts):
        rng = np.random.default_rng([seed, rank])
        x, scales = draw_rows(rng, count, hidden, dtype, kind)
        ids = draw_ids(rng, (count, topk), range(len(setting.holders)) if only is None else only, duplicates)
        ids[rng.random(ids.shape) < missing] = -1
        weights = torch.from_numpy(rng.random(ids.shape, dtype=np.float32)) if weighted else None
        given.append(Tokens(x, torch.from_numpy(ids).to(ids_dtype), weights, scales))
    return given


def within_wider(rows: Tensor) -> Tensor:
    """The same rows, with something between them."""
    return torch.cat([rows, rows[:, :3]], 1)[:, : rows.shape[1]]


def bits(tensor: Tensor) -> Any:
    """The bytes of a tensor."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return flat.reshape(-1).view(torch.uint8) if flat.numel() else torch.zeros(0, dtype=torch.uint8)


def same(mine: Any, theirs: Any, what: str) -> None:
    """Hold one tensor against another."""
    assert (mine is None) == (theirs is None), what
    if mine is not None:
        assert mine.dtype == theirs.dtype, what
        assert mine.shape == theirs.shape, f"{what}: {list(mine.shape)} is not {list(theirs.shape)}"
        assert torch.equal(bits(mine), bits(theirs)), f"{what}:\n{mine}\n{theirs}"


def same_sums(mine: Tensor, theirs: Tensor, what: str) -> None:
    """Likewise, but NaNs may have other bits: torch's are as they come."""
    is_nan = torch.isnan(theirs)
    assert torch.equal(torch.isnan(mine), is_nan), what
    same(torch.where(is_nan, 0, mine), torch.where(is_nan, 0, theirs), what)


def check_arrived(setting: Setting, gpu: Gpu, held: Any, wanted: Any) -> None:
    """Hold what a rank took against what should have come."""
    rank, held_count = gpu.me, len(wanted.counts)
    same(held.counts[:held_count], wanted.counts, f"counts of {rank}")
    assert not held.counts[held_count:].any()
    if setting.layout == "slots":
        for source in range(setting.world):
            n = int(held.rows_by_source[source])
            same(held.x[source, :n], wanted.x[source, :n], f"x of {source} at {rank}")
            if wanted.scales is not None:
                mine = held.scales.view(setting.world, setting.max_tokens, -1)
                same(mine[source, :n], wanted.scales[source, :n], f"scales of {source} at {rank}")
        same(held.sources, wanted.sources, f"sources at {rank}")
        same(held.tokens[held.tokens >= 0], wanted.tokens, f"tokens at {rank}")
    else:
        for name in ("x", "scales", "sources", "tokens"):
            same(getattr(held, name), getattr(wanted, name), f"{name} at {rank}")
    if setting.layout == "experts":
        same(held.offsets[: held_count + 1], wanted.offsets, f"offsets at {rank}")
    same(held.topk_idx, wanted.topk_idx, f"topk_idx at {rank}")
    same(held.topk_weights, wanted.topk_weights, f"topk_weights at {rank}")


def play(setting: Setting, tokens: Sequence[Tokens], *, crew: Crew | None = None, fused: bool = False,
         y_dtype: torch.dtype = torch.bfloat16, biases: Sequence[Sequence[Tensor]] | None = None,
         out_dtype: torch.dtype | None = None, strided: bool = False, rounds: int = 1,
         ranks: Sequence[int] | None = None, **options: Any) -> Crew:  # fmt: skip
    """A dispatch and its combine, held against the reference. `fused`: kernels wait themselves."""
    hidden, topk = tokens[0].x.shape[1], tokens[0].topk_idx.shape[1]
    crew = Crew(frame_for(setting, hidden, topk), **options) if crew is None else crew
    arrived = reference.dispatch(setting, tokens)
    ys = [reference.run_experts(setting, r, each, expert, y_dtype) for r, each in enumerate(arrived)]
    outs = reference.combine(setting, tokens, ys, biases=biases, dtype=out_dtype)

    def work(gpu: Gpu) -> None:
        rank = gpu.me
        for _ in range(rounds):
            held = send(gpu, setting, tokens[rank])
            take(gpu, setting, tokens[rank], held, waits=fused and setting.layout == "slots")
            check_arrived(setting, gpu, held, arrived[rank])
            y = reference.run_experts(setting, rank, held, expert, y_dtype)
            y = within_wider(y.reshape(-1, hidden)) if strided else y
            give(gpu, y, held)
            out = None if out_dtype is None else torch.zeros((held.tokens_count, hidden), dtype=out_dtype)
            found, _ = add_up(gpu, y, held, biases=[] if biases is None else biases[rank], out=out, waits=fused)
            same_sums(found, outs[rank], f"out of {rank}")

    crew.each(work, ranks)
    return crew

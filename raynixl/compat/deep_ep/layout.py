"""Layouts: which ranks and experts each token of a rank goes to, and the handles that DeepEP's V1 makes of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import NODE_RANKS
from raynixl.errors import ConfigError, RangeError


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What `Buffer.get_dispatch_layout` returns, without its event."""

    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


def local_experts(experts: int, world: int) -> int:
    """Return how many experts each rank has.

    Raises:
        ConfigError: they do not divide.
    """
    if experts <= 0 or experts % world:
        raise ConfigError(
            f"{experts} experts do not divide among {world} ranks",
            hint="DeepEP needs that; raynixl.ExpertParallel takes any placement",
        )
    return experts // world


def lay_out(topk_idx: Tensor, experts: int, world: int) -> Layout:
    """Count the tokens that go to each rank and the pairs that go to each expert.

    Raises:
        RangeError: an id is no expert, and not -1.
        ConfigError: experts do not divide among ranks.
    """
    each = local_experts(experts, world)
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}", hint="give int64 [tokens, topk]")
    ids = topk_idx.detach().long()
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < experts:
        raise RangeError(
            f"topk_idx lies in {int(ids.min())}..{int(ids.max())}", hint=f"experts are 0..{experts - 1}, and -1 is none"
        )
    is_there = ids >= 0
    per_expert = torch.bincount(ids[is_there], minlength=experts).int()
    in_rank = torch.zeros((len(ids), world + 1), dtype=torch.bool)
    in_rank.scatter_(1, torch.where(is_there, ids // each, world), True)
    in_rank = in_rank[:, :world].contiguous()
    return Layout(in_rank.sum(0, dtype=torch.int32), per_node(in_rank), per_expert, in_rank)


def per_node(in_rank: Tensor) -> Tensor | None:
    """Return how many tokens go to each node of 8 ranks, or None where DeepEP has but one."""
    world = in_rank.shape[1]
    if world <= NODE_RANKS:
        return None
    return torch.stack([part.any(1).sum(dtype=torch.int32) for part in torch.split(in_rank, NODE_RANKS, 1)])


class Handle(tuple[Any, ...]):
    """A V1 handle: the tuple that DeepEP's users know, and with it what our combine needs.

    Up to 8 ranks the tuple has DeepEP's intranode form, beyond them its internode form, each as for a single channel.
    """

    inner: Any
    parallel: Any
    rows: int
    """How many rows came."""
    padded: int
    """How many rows the caller has, with those of num_worst_tokens."""


def make_handle(dispatched: Any, parallel: Any, *, in_rank: Tensor, padded: int) -> Handle:
    """Return the handle of a dispatch.

    Of the prefix sums of rows by (source, destination) a rank knows those that end at itself; the others are -1.
    """
    world, rank = parallel.world, parallel.rank
    ends = torch.bincount(dispatched.sources, minlength=world).cumsum(0).int()
    sent = in_rank.sum(0, dtype=torch.int32).view(world, 1)
    starts = torch.zeros((world, 1), dtype=torch.int32)
    heads = torch.where(in_rank, in_rank.cumsum(0) - 1, -1).int()
    tokens = pad(dispatched.tokens, padded, -1)
    if world <= NODE_RANKS:
        prefix = torch.full((world, world), -1, dtype=torch.int32)
        prefix[:, rank] = ends
        handle = Handle((prefix, sent, starts, tokens, in_rank, heads))
    else:
        nodes = per_node(in_rank)
        assert nodes is not None
        last = (torch.arange(len(nodes)) * NODE_RANKS + NODE_RANKS - 1).clamp(max=world - 1)
        sources = torch.stack([dispatched.sources, dispatched.tokens], 1).view(torch.uint8)
        handle = Handle((
            in_rank, nodes.view(-1, 1), sent, starts[: len(nodes)], ends[last], starts, ends, sources, heads, heads,
        ))  # fmt: skip
    handle.inner, handle.parallel = dispatched.handle, parallel
    handle.rows, handle.padded = len(dispatched.tokens), padded
    return handle


def pad(rows: Tensor, count: int, value: float = 0) -> Tensor:
    """Return rows followed by others of one value, `count` in all.

    Raises:
        RangeError: there are more already.
    """
    if len(rows) > count:
        raise RangeError(
            f"{len(rows)} rows came where {count} are allowed for", hint="allow for more: num_worst_tokens"
        )
    if len(rows) == count:
        return rows
    out = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype)
    out[: len(rows)] = rows
    out[len(rows) :] = torch.tensor(value).to(rows.dtype)
    return out

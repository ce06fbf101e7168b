"""`EPHandle`: what a V2 dispatch leaves for its combine and for a cached dispatch, with the fields DeepEP documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import align
from raynixl.compat.deep_ep.layout import pad
from raynixl.moe.local import expert_places


@dataclass(slots=True, eq=False)
class EPHandle:
    """The layout of one dispatch. Where no CPU sync was asked for, rows are padded to the worst case, as DeepEP's are.

    topk_idx: the ids of our tokens.
    psum_num_recv_tokens_per_scaleup_rank: int32 [ranks], rows by source, added up.
    psum_num_recv_tokens_per_expert: int32 [local experts]: plain, the aligned counts added up; expanded, where each
        expert's rows end.
    num_recv_tokens_per_expert_list: aligned counts; empty without CPU sync.
    recv_src_metadata: int32 [rows, topk + 2]: rank * max tokens + token of its source, rank * topk + its first k here,
        and where the row's pairs lie among expanded rows, or -1.
    dst_buffer_slot_idx: int32 [tokens, topk]: rank * max tokens + our row at the id's rank; -1 for all but
        a rank's first.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    token_metadata_at_forward: Tensor | None
    channel_linked_list: Tensor | None
    inner: Any
    parallel: Any
    recv_ids: Tensor
    """The local ids of the rows that came."""
    places: Tensor
    """int64 [rows, topk], where pairs lie among expanded rows; -1 elsewhere."""
    rows: int
    expanded: int
    """How many rows came, and how many they are expanded, without padding to the worst case."""

    @property
    def allocated(self) -> int:
        """How many rows the tensors of a dispatch have."""
        return self.num_expanded_tokens if self.do_expand else self.num_recv_tokens


@dataclass(frozen=True, slots=True)
class Request:
    """What a dispatch was asked for."""

    experts: int
    alignment: int
    tokens: int
    num_sms: int
    is_expanded: bool
    is_synchronous: bool


def make_ephandle(request: Request, arrived: Any, parallel: Any, topk_idx: Tensor) -> EPHandle:
    """Return the handle of a dispatch that was not cached."""
    world, rank, topk = parallel.world, parallel.rank, topk_idx.shape[1]
    each, most, step = request.experts // world, request.tokens, request.alignment
    counts = arrived.counts
    aligned = -(-counts // step) * step
    offsets = torch.zeros(each + 1, dtype=torch.int64)
    offsets[1:] = aligned.cumsum(0)
    rows, expanded = len(arrived.tokens), int(offsets[-1])
    recv_ids = arrived.topk_idx
    places = torch.full(recv_ids.shape, -1, dtype=torch.int64)
    places[recv_ids >= 0] = expert_places(recv_ids, offsets)
    if request.is_synchronous:
        padded, padded_expanded, listed = rows, expanded, aligned.tolist()
    else:
        padded, listed = most * world, []
        padded_expanded = align(world * most * min(topk, each) + (step - 1) * each, step)
    return EPHandle(
        request.is_expanded, request.experts, step, most, request.num_sms, topk_idx, padded, padded_expanded, listed,
        torch.bincount(arrived.sources, minlength=world).cumsum(0).int(),
        (offsets[:-1] + counts if request.is_expanded else offsets[1:]).int(), counts.int(),
        pad(_metadata(arrived, places, most), padded, -1), _slots(topk_idx, each, rank * most), None, None,
        arrived.handle, parallel, recv_ids, places, rows, expanded,
    )  # fmt: skip


def _metadata(arrived: Any, places: Tensor, most: int) -> Tensor:
    topk = places.shape[1]
    first = (arrived.topk_idx >= 0).int().argmax(1) if len(places) else torch.zeros(0, dtype=torch.int64)
    head = torch.stack([arrived.sources * most + arrived.tokens, arrived.sources * topk + first.int()], 1)
    return torch.cat([head.int(), places.int()], 1)


def _slots(topk_idx: Tensor, each: int, base: int) -> Tensor:
    ranks = torch.where(topk_idx >= 0, topk_idx.long() // each, -1)
    is_first = ranks >= 0
    for k in range(1, ranks.shape[1]):
        is_first[:, k] &= (ranks[:, :k] != ranks[:, k : k + 1]).all(1)
    slots = torch.full(ranks.shape, -1, dtype=torch.int32)
    for rank in range(int(ranks.max()) + 1 if ranks.numel() else 0):
        here = is_first & (ranks == rank)
        slots[here] = torch.arange(base, base + int(here.sum()), dtype=torch.int32)
    return slots

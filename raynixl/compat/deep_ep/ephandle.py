"""`EPHandle`: what a V2 dispatch leaves for its combine and for a cached dispatch, with the fields DeepEP documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import align
from raynixl.compat.deep_ep.layout import counts_of, pad, rows_by_source, sources_of
from raynixl.compat.deep_ep.worst import ByExpert, SideBySide, pair_places
from raynixl.moe import cuda_device

if TYPE_CHECKING:
    from raynixl.moe.result import Dispatched


@dataclass(eq=False)
class EPHandle:
    """The layout of one dispatch. Where no CPU sync was asked for, rows are padded to the worst case, as DeepEP's are.

    Its tensors are where the rows are.

    topk_idx: the ids of our tokens.
    psum_num_recv_tokens_per_scaleup_rank: int32 [ranks], rows by source, added up.
    psum_num_recv_tokens_per_expert: int32 [local experts]: plain, the aligned counts added up; expanded, where each
        expert's rows end.
    num_recv_tokens_per_expert_list: aligned counts; empty without CPU sync.
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
    token_metadata_at_forward: Tensor | None
    channel_linked_list: Tensor | None
    inner: Any
    """What combine wants."""
    parallel: Any
    recv_ids: Tensor
    """The local ids of the rows that came."""
    recv_tokens: Tensor
    """The tokens of the rows that came, at their sources."""
    gpu: int | None
    """The GPU that it is of."""
    offsets: Tensor
    """int64 [local experts + 1], where the rows of each expert begin if they are expanded."""
    fixed: SideBySide | ByExpert | None
    """Where rows lie that came in fixed places, if no host has heard how many came."""
    sent: Any
    """What a cached dispatch wants."""
    rows: int
    expanded: int
    """How many rows came, and how many they are expanded, without padding to the worst case."""

    @property
    def allocated(self) -> int:
        """How many rows the tensors of a dispatch have."""
        return self.num_expanded_tokens if self.do_expand else self.num_recv_tokens

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that is on a GPU, if that is where it was made."""
        return tuple(vars(self).values())

    @cached_property
    def places(self) -> Tensor:
        """int64 [rows, topk], where pairs lie among expanded rows; -1 elsewhere."""
        return pair_places(self.recv_ids, self.offsets)

    @cached_property
    def recv_src_metadata(self) -> Tensor:
        """Made when it is asked for, int32 [rows, topk + 2].

        rank * max tokens + token of the row's source, rank * topk + its first k here, and where the row's pairs lie
        among expanded rows, or -1.
        """
        topk, most = self.recv_ids.shape[1], self.num_max_tokens_per_rank
        counts = self.psum_num_recv_tokens_per_scaleup_rank.diff(prepend=self.offsets[:1].int())
        sources = sources_of(counts, len(self.recv_ids))
        is_there = sources < len(counts)
        first = torch.argmax((self.recv_ids >= 0).int(), 1)
        head = torch.stack([sources * most + self.recv_tokens, sources * topk + first], 1)
        found = torch.cat([torch.where(is_there[:, None], head, -1), self.places], 1)
        return pad(found.int(), self.num_recv_tokens, -1)

    @cached_property
    def dst_buffer_slot_idx(self) -> Tensor:
        """Made when it is asked for, int32 [tokens, topk].

        rank * max tokens + our row at the id's rank; -1 for all but a rank's first.
        """
        parallel = self.parallel
        ranks = torch.where(self.topk_idx >= 0, self.topk_idx.long() // (self.num_experts // parallel.world), -1)
        before = (ranks[:, :, None] == ranks[:, None, :]).tril(-1).any(2)
        goes = torch.zeros((len(ranks), parallel.world + 1), dtype=torch.int64, device=ranks.device)
        goes.scatter_(1, torch.where(ranks >= 0, ranks, parallel.world), 1)
        rows = (goes.cumsum(0) - 1).gather(1, ranks.clamp(min=0))
        slots = parallel.rank * self.num_max_tokens_per_rank + rows
        return torch.where((ranks >= 0) & ~before, slots, -1).int()


@dataclass(frozen=True, slots=True)
class Request:
    """What a dispatch was asked for."""

    experts: int
    alignment: int
    tokens: int
    num_sms: int
    is_expanded: bool
    is_synchronous: bool


def make_ephandle(
    request: Request, arrived: Dispatched, parallel: Any, topk_idx: Tensor, *, is_fixed: bool
) -> tuple[EPHandle, Dispatched]:
    """Return the handle of a dispatch that was not cached, and the rows as they shall lie.

    is_fixed: they came in fixed places, on a GPU.
    """
    world, topk = parallel.world, topk_idx.shape[1]
    each, most, step = request.experts // world, request.tokens, request.alignment
    counts = arrived.counts
    aligned = torch.div(counts + step - 1, step, rounding_mode="floor") * step
    offsets = torch.nn.functional.pad(aligned.cumsum(0), (1, 0))
    ids, tokens, sent = arrived.topk_idx, arrived.tokens, arrived.handle
    fixed: SideBySide | ByExpert | None = None
    listed: list[int] = []
    padded, padded_expanded = most * world, align(world * most * min(topk, each) + (step - 1) * each, step)
    if is_fixed:
        fixed = side = SideBySide.of(arrived, padded)
        ids, tokens = side.numbers(ids), side.numbers(tokens)
        if request.is_expanded:
            fixed = ByExpert.of(side, pair_places(ids, offsets), padded_expanded)
        arrived, rows, expanded = fixed.taken(arrived), padded, padded_expanded
    else:
        listed = [align(one, step) for one in counts_of(arrived)]
        rows, expanded = len(tokens), sum(listed)
        if request.is_synchronous:
            padded, padded_expanded = rows, expanded
    handle = EPHandle(
        request.is_expanded, request.experts, step, most, request.num_sms, topk_idx, padded, padded_expanded,
        listed if request.is_synchronous else [], rows_by_source(arrived, world).cumsum(0).int(),
        (offsets[:-1] + counts if request.is_expanded else offsets[1:]).int(), counts.int(), None, None,
        arrived.handle, parallel, ids, tokens, cuda_device.gpu_of(arrived.x), offsets, fixed, sent, rows, expanded,
    )  # fmt: skip
    if request.is_expanded:
        _ = handle.places  # now, since what is made amid a capture of a CUDA graph is there at a replay alone
    return handle, arrived

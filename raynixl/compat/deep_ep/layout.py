"""Layouts: which ranks and experts each token of a rank goes to, and the handles that DeepEP's V1 makes of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raynixl.compat.deep_ep.config import NODE_RANKS
from raynixl.errors import ConfigError, RangeError
from raynixl.moe import cuda_device

if TYPE_CHECKING:
    from raynixl.compat.deep_ep.instances import Instances
    from raynixl.compat.deep_ep.worst import SideBySide


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What `Buffer.get_dispatch_layout` returns, without its event."""

    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class GivenLayout:
    """The layout that a dispatch is given: what `get_dispatch_layout` has returned.

    Raises:
        ConfigError: some of it is missing.
    """

    def __init__(self, per_rank: Tensor | None, in_rank: Tensor | None, per_expert: Tensor | None) -> None:
        if per_rank is None or in_rank is None or per_expert is None:
            raise ConfigError(
                "a dispatch without a handle needs its layout", hint="give what get_dispatch_layout returned"
            )
        self.in_rank, self.per_expert = in_rank, per_expert

    @property
    def experts(self) -> int:
        """How many experts there are on all ranks."""
        return len(self.per_expert)

    def check_on(self, number: int) -> None:
        """Refuse a layout that is not on the GPU of the rows.

        Raises:
            ConfigError: as said.
        """
        for one in (self.in_rank, self.per_expert):
            if cuda_device.gpu_of(one) != number:
                raise ConfigError(
                    f"the layout is on {one.device}", hint=f"give get_dispatch_layout topk_idx on cuda:{number}"
                )


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
    """Count the tokens that go to each rank and the pairs that go to each expert; on a GPU nobody waits for that.

    Raises:
        RangeError: an id is no expert, and not -1. On a GPU such ids count for nobody here, and dispatch refuses them.
        ConfigError: experts do not divide among ranks.
    """
    each = local_experts(experts, world)
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}", hint="give int64 [tokens, topk]")
    ids = topk_idx.detach().long()
    is_on_host = cuda_device.gpu_of(ids) is None
    if is_on_host and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < experts:
        raise RangeError(
            f"topk_idx lies in {int(ids.min())}..{int(ids.max())}", hint=f"experts are 0..{experts - 1}, and -1 is none"
        )
    is_there = (ids >= 0) & (ids < experts)
    per_expert = counted(torch.where(is_there, ids, -1).flatten(), experts).int()
    in_rank = torch.zeros((len(ids), world + 1), dtype=torch.bool, device=ids.device)
    in_rank.scatter_(1, torch.where(is_there, ids // each, world), True)
    in_rank = in_rank[:, :world].contiguous()
    return Layout(in_rank.sum(0, dtype=torch.int32), per_node(in_rank), per_expert, in_rank)


def per_node(in_rank: Tensor) -> Tensor | None:
    """Return how many tokens go to each node of 8 ranks, or None where DeepEP has but one."""
    world = in_rank.shape[1]
    if world <= NODE_RANKS:
        return None
    return torch.stack([part.any(1).sum(dtype=torch.int32) for part in torch.split(in_rank, NODE_RANKS, 1)])


def counted(ids: Tensor, most: int) -> Tensor:
    """Return how often each number below `most` comes, int64 [most]; -1 does not count. Nobody waits for a GPU."""
    counts = torch.zeros(most + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, torch.where(ids >= 0, ids, most).long(), torch.ones_like(ids, dtype=torch.int64))
    return counts[:most]


def counts_of(dispatched: Any) -> list[int]:
    """Return how many pairs each local expert has: what the host has heard of a GPU, if it has, else what it asks."""
    loads = getattr(dispatched.handle, "loads", None)
    return list(loads) if loads is not None else dispatched.counts.tolist()


def rows_by_source(dispatched: Any, world: int) -> Tensor:
    """Return how many rows came from each source, int64 [world], where the rows are."""
    counts = dispatched.handle.counts
    if not isinstance(counts, Tensor):
        number = cuda_device.gpu_of(dispatched.x)
        counts = torch.from_numpy(counts.copy()) if number is None else cuda_device.gpu(number).put(counts)
    return counts[:world].long()


def sources_of(counts: Tensor, rows: int) -> Tensor:
    """Return the source of each of so many rows, int64; the number of sources for those beyond all counts."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(rows, device=counts.device), right=True)


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
    gpu: int | None
    """The GPU that it is of."""
    fixed: SideBySide | None
    """Where rows lay before they were put side by side, if no host has heard how many came."""

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that is on a GPU, if that is where it was made."""
        return (*self[:], *(() if self.fixed is None else self.fixed.tensors))


def make_handle(
    dispatched: Any, parallel: Any, *, in_rank: Tensor, padded: int, fixed: SideBySide | None = None
) -> Handle:
    """Return the handle of a dispatch.

    Of the prefix sums of rows by (source, destination) a rank knows those that end at itself; the others are -1.
    """
    world, rank, device = parallel.world, parallel.rank, in_rank.device
    counts = rows_by_source(dispatched, world)
    ends = counts.cumsum(0).int()
    sent = in_rank.sum(0, dtype=torch.int32).view(world, 1)
    starts = torch.zeros((world, 1), dtype=torch.int32, device=device)
    heads = torch.where(in_rank, in_rank.cumsum(0) - 1, -1).int()
    tokens = pad(dispatched.tokens, padded, -1)
    if world <= NODE_RANKS:
        prefix = torch.full((world, world), -1, dtype=torch.int32, device=device)
        prefix[:, rank] = ends
        handle = Handle((prefix, sent, starts, tokens, in_rank, heads))
    else:
        nodes = per_node(in_rank)
        assert nodes is not None
        last = (torch.arange(len(nodes), device=device) * NODE_RANKS + NODE_RANKS - 1).clamp(max=world - 1)
        rows = sources_of(counts, len(dispatched.tokens))
        sources = torch.stack([rows.int(), dispatched.tokens], 1).view(torch.uint8)
        handle = Handle((
            in_rank, nodes.view(-1, 1), sent, starts[: len(nodes)], ends[last], starts, ends, sources, heads, heads,
        ))  # fmt: skip
    handle.inner, handle.parallel, handle.gpu = dispatched.handle, parallel, cuda_device.gpu_of(dispatched.x)
    handle.rows, handle.padded, handle.fixed = len(dispatched.tokens), padded, fixed
    return handle


def check_own(handle: Any, kind: type, instances: Instances, gpu: int | None) -> None:
    """Refuse what is no handle of a buffer with these instances, or of rows that are elsewhere than these.

    Raises:
        ConfigError: as said.
    """
    if not isinstance(handle, kind):
        raise ConfigError("this is no handle of dispatch", hint="give what dispatch returned, as it is")
    known: Any = handle
    if not instances.owns(known.parallel):
        raise ConfigError("the handle is of another buffer", hint="give it to the buffer whose dispatch returned it")
    if known.gpu != gpu:
        there, here = ("memory of the host" if one is None else f"GPU {one}" for one in (known.gpu, gpu))
        raise ConfigError(f"the handle is of rows in {there}, these are in {here}", hint=f"bring the rows to {there}")


def gpu_of_rows(rows: Tensor | tuple[Tensor, Tensor]) -> int | None:
    """Return the GPU that rows, or rows and their scales, are on; None in memory of the host."""
    return cuda_device.gpu_of(rows[0] if isinstance(rows, tuple) else rows)


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
    out = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    out[: len(rows)] = rows
    rest = out[len(rows) :]
    rest.view(torch.uint8).zero_() if value == 0 else rest.fill_(value)  # eight-bit floats are not filled everywhere
    return out

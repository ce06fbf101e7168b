"""What ranks in processes of their own do with buffers of DeepEP's kind; called by `moe_tools.Processes`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deep_ep_tools import Case
from moe_tools import DEADLINE

from raynixl import Group
from raynixl.compat.deep_ep import Buffer, ElasticBuffer

MOST = 24


def make(member: Any, names: list[str], options: dict[str, Any]) -> None:
    """Make a buffer."""
    member.groups["far"] = Group(member.agent, names, name=options.pop("name"), timeout=DEADLINE)
    member.kept["far"] = Buffer(member.groups["far"], low_latency_mode=True, deadline=DEADLINE, **options)


def drop(member: Any) -> None:
    """Close it."""
    member.kept.pop("step", None)
    member.kept.pop("far").destroy()
    member.groups.pop("far").close()


def dispatch(member: Any, case: Case) -> list[int]:
    """Dispatch with low latency; return how many rows each expert got."""
    buffer = member.kept["far"]
    packed, counts, handle, event, _ = buffer.low_latency_dispatch(
        case.x(member.rank), case.topk_idx(member.rank), MOST, case.experts, use_fp8=False, async_finish=True
    )
    event.current_stream_wait()
    member.kept["step"] = packed, handle
    return counts.tolist()


def combine(member: Any, case: Case) -> torch.Tensor:
    """Combine the rows as they came; return the sums."""
    packed, handle = member.kept["step"]
    out, _, _ = member.kept["far"].low_latency_combine(
        packed, case.topk_idx(member.rank), case.topk_weights(member.rank), handle
    )
    return out


def masked(member: Any) -> list[int]:
    """Return the ranks that are masked."""
    status = torch.full((member.kept["far"].group_size,), -1, dtype=torch.int32)
    member.kept["far"].low_latency_query_mask_buffer(status)
    return status.nonzero().squeeze(1).tolist()


def normal(member: Any, case: Case) -> torch.Tensor:
    """Dispatch and combine as in training; return the sums."""
    buffer, rank = member.kept["far"], member.rank
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        case.x(rank), topk_idx=case.topk_idx(rank), topk_weights=case.topk_weights(rank), **case.layout(buffer, rank)
    )
    return buffer.combine(recv_x, handle)[0]


def over_gloo(member: Any, store: str, case: Case) -> list[list[int]]:
    """Make buffers of both kinds over a group of torch.distributed; return the counts that each gives."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=member.rank, world_size=case.world)
    try:
        buffer = Buffer(dist.group.WORLD, deadline=DEADLINE)
        x, ids, weights = case.x(member.rank), case.topk_idx(member.rank), case.topk_weights(member.rank)
        _, _, _, first, handle, _ = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, **case.layout(buffer, member.rank)
        )
        assert buffer.group is dist.group.WORLD
        assert handle[0].shape == (case.world, case.world)
        elastic = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=MOST, hidden=case.hidden)
        *_, again, _ = elastic.dispatch(x, ids, weights, num_experts=case.experts)
        elastic.barrier()
        buffer.destroy()
        elastic.destroy()
    finally:
        dist.destroy_process_group()
    return [first, again.num_recv_tokens_per_expert_list]

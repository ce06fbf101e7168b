"""DeepEP's interface on a GPU, in far processes of the GPU tests: what ranks are asked to do, and who asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from deep_ep_calls import MOST, WORLD, alike, elastic, normal, steps, train
from deep_ep_tools import Case
from gpu_moe import PATIENCE, Crew, _packed, _unpacked, captured_step
from torch import Tensor

from raynixl import Group
from raynixl.compat.deep_ep import Buffer, ElasticBuffer
from raynixl.errors import RaynixlError

KINDS: dict[str, Any] = {"Buffer": Buffer, "ElasticBuffer": ElasticBuffer}


class OnGpu(Case):
    """The same tokens on the GPU."""

    @classmethod
    def of(cls, case: Case) -> OnGpu:
        """Return those of a case."""
        return cls(**asdict(case))

    def x(self, rank: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return super().x(rank, dtype).cuda()

    def topk_idx(self, rank: int) -> Tensor:
        return super().topk_idx(rank).cuda()

    def topk_weights(self, rank: int) -> Tensor:
        return super().topk_weights(rank).cuda()


class DeepEpCrew(Crew):
    """Ranks in far processes on one GPU, with buffers of DeepEP's kind."""

    def call(self, do: str, ranks: Sequence[int] | None = None, **fields: Any) -> list[Any]:
        """Have ranks do something at the same time."""
        chosen = range(self.world) if ranks is None else ranks
        packed = {name: _packed(value) for name, value in fields.items()}
        for rank in chosen:
            self.fars[rank].tell(f"gpu_deep_ep:{do}", rank=rank, **packed)
        return [_unpacked(self.fars[rank].hear(PATIENCE)) for rank in chosen]

    def buffers(self, kind: str, **options: Any) -> None:
        """Make two buffers on each rank: one for tensors on the GPU, one for those of the host."""
        names = [f"rank-{rank}" for rank in range(self.world)]
        self.call("make", names=names, kind=kind, options=options)


@contextlib.contextmanager
def deep_ep_crew() -> Iterator[DeepEpCrew]:
    """A crew, for a while."""
    with ExitStack() as stack:
        yield DeepEpCrew(stack, WORLD)


# In the far process


def make(world: Any, rank: int, names: str, kind: str, options: str) -> str:
    """Make the buffers; those of before are closed."""
    members, chosen, settings = _unpacked(names), _unpacked(kind), _unpacked(options)
    for buffer in world.kept.pop("buffers", ()):
        buffer.destroy()
    for group in world.kept.pop("groups", ()):
        group.close()
    number = world.kept["made"] = world.kept.get("made", 0) + 1
    groups = [Group(world.agent, members, name=f"deep-{number}-{way}", timeout=PATIENCE) for way in ("gpu", "host")]
    world.kept["groups"], world.kept["buffers"] = groups, [KINDS[chosen](group, **settings) for group in groups]
    return _packed(None)


def do_normal(world: Any, rank: int, case: str, form: str, worst: str, is_async: str) -> str:
    """Make the calls of the normal mode on the GPU and in memory of the host; hold one's bits against the other's."""
    given, more = _unpacked(case), {"is_async": _unpacked(is_async)}
    there, here = world.kept["buffers"]
    found = normal(OnGpu.of(given), rank, there, _unpacked(form), _unpacked(worst), **more)
    alike(_fetched(found), normal(given, rank, here, _unpacked(form), _unpacked(worst), **more))
    assert _is_direct(there)
    return _packed(None)


def do_elastic(world: Any, rank: int, case: str, form: str, expands: str, waits: str) -> str:
    """Do the same with the calls of V2."""
    given, more = _unpacked(case), {"expands": _unpacked(expands), "waits": _unpacked(waits)}
    there, here = world.kept["buffers"]
    found = elastic(OnGpu.of(given), rank, there, _unpacked(form), **more)
    alike(_fetched(found), elastic(given, rank, here, _unpacked(form), **more))
    assert _is_direct(there)
    return _packed(None)


def do_train(world: Any, rank: int, case: str, worst: str) -> str:
    """Hold gradients on the GPU against those of the host; torch adds up in other orders."""
    given = _unpacked(case)
    there, here = world.kept["buffers"]
    found, wanted = train(OnGpu.of(given), rank, there, _unpacked(worst)), train(given, rank, here, _unpacked(worst))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0.02, atol=0.5)
    return _packed(None)


def do_late(world: Any, rank: int, case: str, worst: str) -> str:
    """Dispatch rows that are there late, asynchronously; whether they came, and the sums, as events order it."""
    given, buffer = OnGpu.of(_unpacked(case)), world.kept["buffers"][0]
    x, rows = given.x(rank), torch.zeros_like(given.x(rank))
    layout, ids, weights = given.layout(buffer, rank), given.topk_idx(rank), given.topk_weights(rank)
    for number in range(1, 4):
        torch.cuda._sleep(20_000_000)
        rows.copy_(x * number)
        came, _, ws, _, handle, event = buffer.dispatch(
            rows, topk_idx=ids, topk_weights=weights, num_worst_tokens=_unpacked(worst), async_finish=True,
            previous_event=buffer.capture(), allocate_on_comm_stream=True, **layout,
        )  # fmt: skip
        event.current_stream_wait()
        torch.cuda._sleep(20_000_000)
        y = came + 0
        del came
        out, back, event = buffer.combine(y, handle, topk_weights=ws, async_finish=True)
        del y
        event.current_stream_wait()
        times = layout["is_token_in_rank"].sum(1, keepdim=True)
        assert torch.equal(out, (x * number).float().mul(times).bfloat16())
        assert torch.equal(back, weights.masked_fill(ids < 0, 0))
    return _packed(None)


def do_graph(world: Any, rank: int, case: str, kind: str, replays: str) -> str:
    """Capture a step, and replay it with other rows each time; whether every result is that of a step outside."""
    given, buffer, how = OnGpu.of(_unpacked(case)), world.kept["buffers"][0], _unpacked(kind)
    x, ids, weights = given.x(rank), given.topk_idx(rank), given.topk_weights(rank)
    layout = given.layout(buffer, rank) if isinstance(buffer, Buffer) else {}
    kept: list[Any] = []

    def step() -> tuple[Tensor, Tensor]:
        if how == "normal":
            rows, *_, handle, _ = buffer.dispatch(
                x, topk_idx=ids, topk_weights=weights, num_worst_tokens=WORLD * given.tokens, **layout
            )
        elif how == "cached":
            if not kept:
                kept.append(buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout)[4])
            rows, handle = buffer.dispatch(x, handle=kept[0])[0], kept[0]
        else:
            rows, _, _, handle, _ = buffer.dispatch(
                x, ids, weights, num_experts=given.experts, do_cpu_sync=False, do_expand=how == "expanded"
            )
        return rows, buffer.combine(rows, handle)[0]

    graph, captured = captured_step(step)
    found = []
    for number in range(1, _unpacked(replays) + 1):
        x.copy_(given.x(rank) * number)
        graph.replay()
        found.append(tuple(one.cpu() for one in captured))
    outside = []
    for number in range(1, _unpacked(replays) + 1):
        x.copy_(given.x(rank) * number)
        outside.append(tuple(one.cpu() for one in step()))
    alike(found, outside)
    return _packed(None)


def do_lost(world: Any, rank: int, case: str, worst: str) -> str:
    """Take steps until one names a rank that is lost; what it says."""
    given, buffer = OnGpu.of(_unpacked(case)), world.kept["buffers"][0]
    for _ in range(3):
        try:
            steps(given, rank, buffer, worst=_unpacked(worst))
        except RaynixlError as exc:
            return _packed(f"{type(exc).__name__}: {exc}")
    return _packed("nothing")


def _fetched(value: Any) -> Any:
    """Results in memory of the host; what there is of tensors is on the GPU."""
    if isinstance(value, Tensor):
        assert value.is_cuda, "a result is not on the GPU"
        return value.cpu()
    if isinstance(value, tuple | list):
        return type(value)(_fetched(one) for one in value)
    return value


def _is_direct(buffer: Any) -> bool:
    return all(made.is_direct for made in buffer._instances._made.values())


__all__ = ["MOST", "DeepEpCrew", "deep_ep_crew"]

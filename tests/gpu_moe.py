"""Expert parallelism on a GPU, in far processes of the GPU tests: what ranks are asked to do, and who asks."""

from __future__ import annotations

import base64
import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from gpu_tools import Far
from moe_cuda_crews import OPTIONS, step, tokens, wanted
from moe_programs import Program, check, play

from raynixl import Group
from raynixl.moe import ExpertParallel, TwoLevel, cuda_device

BACKENDS = ["nvlink", "shm"]
PATIENCE = 120.0
T = TypeVar("T")


class OnGpu:
    """An `ExpertParallel` that is given tensors of the host, and works on their copies on the GPU."""

    def __init__(self, ep: ExpertParallel) -> None:
        self.ep = ep

    def dispatch(
        self, x: Any, topk_idx: Any = None, topk_weights: Any = None, *, handle: Any = None, **more: Any
    ) -> Any:
        """Dispatch on the GPU; the result's tensors are brought back."""
        r = self.ep.dispatch(_put(x), _put(topk_idx), _put(topk_weights), handle=handle, **more)
        names = [one.name for one in fields(r) if one.name not in ("handle", "extra", "lost")]
        return replace(r, **{name: _fetched(getattr(r, name)) for name in names}, lost=tuple(r.lost))

    def combine(self, y: Any, handle: Any, *, bias: Any = None, out: Any = None, **more: Any) -> Any:
        """Combine on the GPU."""
        made = self.ep.combine(_put(y), handle, bias=_put(bias), out=_put(out), **more)
        return _fetched(made) if out is None else out.copy_(_fetched(made))

    def combine_weights(self, y: Any, weights: Any, handle: Any) -> Any:
        """Combine, and bring weights back."""
        return tuple(_fetched(one) for one in self.ep.combine_weights(_put(y), _put(weights), handle))

    def place(self, placement: Any) -> None:
        """Use another placement."""
        self.ep.place(placement)


def _put(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(_put(one) for one in given)
    return cuda_device.gpu(0).bring(given) if isinstance(given, torch.Tensor) else given


def _fetched(given: Any) -> Any:
    return cuda_device.gpu(0).fetch(given) if isinstance(given, torch.Tensor) else given


class Crew:
    """Ranks in far processes on one GPU."""

    def __init__(self, stack: ExitStack, world: int) -> None:
        self.world = world
        self.fars = [stack.enter_context(Far(backends=BACKENDS, name=f"rank-{rank}")) for rank in range(world)]
        for one in self.fars:
            for other in self.fars:
                if one is not other:
                    one.ask("meet", record=base64.b64encode(other.record).decode())

    def all(self, do: str, ranks: Sequence[int] | None = None, **fields: Any) -> list[Any]:
        """Have ranks do something at the same time."""
        chosen = range(self.world) if ranks is None else ranks
        for rank in chosen:
            self.fars[rank].tell(f"gpu_moe:{do}", rank=rank, **fields)
        return [_unpacked(self.fars[rank].hear(PATIENCE)) for rank in chosen]

    def make(self, name: str, world: int | None = None, **options: Any) -> None:
        """Make an `ExpertParallel` on each rank."""
        names = [f"rank-{rank}" for rank in range(self.world if world is None else world)]
        self.all("make", range(len(names)), name=name, names=names, options=_packed(options))

    def play(self, program: Program, name: str) -> None:
        """Play a program, in two stages if it has a grid, and hold what it returns against the reference."""
        more = {} if program.grid is None else {"kind": TwoLevel, "grid": program.grid}
        way = "put rows into the peers' memory" if program.grid is None else "through memory of the host"
        self.make(name, program.world, deadline=60.0, **program.options(), **more)
        played = self.all("do_play", range(program.world), name=name, program=_packed(program), way=way)
        check(program, played)
        self.all("drop", range(program.world), name=name)


@contextlib.contextmanager
def crew_of(world: int) -> Iterator[Crew]:
    """A crew, for a while."""
    with ExitStack() as stack:
        yield Crew(stack, world)


def _packed(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpacked(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


# In the far process


def make(world: Any, rank: int, name: str, names: list[str], options: str) -> str:
    """Make an `ExpertParallel`."""
    group = Group(world.agent, names, name=name, timeout=PATIENCE)
    settings = _unpacked(options)
    world.kept[name] = (group, settings.pop("kind", ExpertParallel)(group, name=name, **settings))
    return _packed(None)


def drop(world: Any, rank: int, name: str) -> str:
    """Close it."""
    group, ep = world.kept.pop(name)
    ep.close()
    group.close()
    return _packed(None)


def do_play(world: Any, rank: int, name: str, program: str, way: str) -> str:
    """Do this rank's part of a program."""
    group, ep = world.kept[name]
    played = play(_unpacked(program), rank, OnGpu(ep), group)
    assert way in ep.explain(), ep.explain()
    return _packed(played)


def do_step(
    world: Any, rank: int, name: str, number: int, active: list[int], layout: str = "slots", deadline: float = 60.0
) -> str:
    """Take one step with these ranks; how long it took, and who takes part afterwards."""
    _, ep = world.kept[name]
    began = time.monotonic()
    out = step(rank, OnGpu(ep), number, layout=layout, deadline=deadline)
    is_right = torch.equal(out, wanted(rank, ep.placement, active, number))
    return _packed((is_right, time.monotonic() - began, ep.active))


def do_wait(world: Any, rank: int, name: str, late: int, seconds: float) -> str:
    """Take a step to which a rank comes late; the seconds that were waited for each rank in both operations."""
    _, ep = world.kept[name]
    given = [one.cuda() for one in tokens(rank)]
    found = [torch.zeros(ep.world, dtype=torch.float64, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    time.sleep(seconds * (rank == late))
    r = ep.dispatch(*given, layout="slots", waited=found[0])
    torch.cuda.synchronize()
    time.sleep(seconds * (rank == late))
    ep.combine(r.x, r.handle, stats=found[1])
    return _packed([one.tolist() for one in found])


def captured_step(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture a step into a graph, after three outside on a stream beside the current one; what it returned there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = step()
    return graph, returned


def do_graph(world: Any, rank: int, name: str, replays: int) -> str:
    """Capture a step, and replay it with other rows each time; whether every result was right."""
    _, ep = world.kept[name]
    x, ids, weights = (one.cuda() for one in tokens(rank))

    def run() -> torch.Tensor:
        r = ep.dispatch(x, ids, weights, layout="slots")
        factors = torch.where(r.topk_idx >= 0, r.topk_weights, 0).sum(-1, keepdim=True)
        out: torch.Tensor = ep.combine(torch.where(factors > 0, r.x, 0) * factors, r.handle)
        return out

    graph, out = captured_step(run)
    found = []
    for number in range(1, replays + 1):
        x.copy_(tokens(rank, number)[0])
        graph.replay()
        got = out.cpu()
        expected = wanted(rank, ep.placement, range(ep.world), 0) + 7 * number * weights.cpu().sum(1, keepdim=True)
        found.append(bool(torch.equal(got, expected)))
    return _packed(found)


__all__ = ["OPTIONS", "Crew", "crew_of"]

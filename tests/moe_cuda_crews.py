"""Crews of ranks on GPUs that are made up, and what tests ask of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from moe_cuda import MadeUp, made_up
from moe_programs import Program, check, play
from moe_tools import SECONDS, Layer, Threads

BACKENDS = ("loopback", "shm", "nvlink")
EXPERTS, HIDDEN, TOPK, TOKENS = 6, 16, 2, 8
OPTIONS = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": TOKENS, "dtype": torch.float32}


class GpuCrew(Threads):
    """Ranks in threads of this process, whose tensors are on a GPU that is made up."""

    def __init__(self, gpus: MadeUp, world: int, **settings: Any) -> None:
        self.gpus = gpus
        super().__init__(world, **{"backends": BACKENDS, **settings})

    def run(self, works: Sequence[Callable[[], Any]], timeout: float = SECONDS) -> list[Any]:
        """Run one function on each rank, with a stream of its own."""

        def on_gpu(work: Callable[[], Any]) -> Any:
            with self.gpus.on_stream(self.gpus.stream()):
                return work()

        return super().run([lambda work=work: on_gpu(work) for work in works], timeout)

    def play(self, program: Program) -> None:
        """Play a program, and hold what it returns against the reference."""
        with self.experts(program.world, **program.options()) as layer:
            played = layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank]))
            assert all("put rows into the peers' memory" in ep.explain() for ep in layer.eps)
            check(program, played)


@contextlib.contextmanager
def gpu_crew(world: int, *, is_patient: bool = True, is_everywhere: bool = True, **settings: Any) -> Iterator[GpuCrew]:
    """A crew, and the GPUs that it works on."""
    with (
        made_up(is_patient=is_patient, is_everywhere=is_everywhere) as gpus,
        GpuCrew(gpus, world, **settings) as crew,
    ):
        yield crew


def tokens(rank: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids and weights of a rank; each token has experts of two ranks, so that a missing one shows."""
    x = torch.arange(TOKENS * HIDDEN, dtype=torch.float32).reshape(TOKENS, HIDDEN) + 1000 * rank + 7 * step
    ids = torch.stack([torch.arange(TOKENS) % EXPERTS, (torch.arange(TOKENS) + 3 + step) % EXPERTS], 1)
    return x, ids, torch.tensor([0.25, 0.5]).repeat(TOKENS, 1)


def step(rank: int, ep: Any, number: int = 0, *, layout: str = "slots", **more: Any) -> torch.Tensor:
    """One step whose experts do nothing: the result is x times the weights of the experts that ranks hold."""
    x, ids, weights = tokens(rank, number)
    r = ep.dispatch(x, ids, weights, layout=layout, **more)
    factors = torch.where(r.topk_idx >= 0, r.topk_weights, 0).sum(-1, keepdim=True)
    out: torch.Tensor = ep.combine(torch.where(factors > 0, r.x, 0) * factors, r.handle, **more)
    return out


def wanted(rank: int, placement: Any, active: Any, number: int = 0) -> torch.Tensor:
    """What `step` returns where only these ranks take part."""
    x, ids, weights = tokens(rank, number)
    there = torch.isin(torch.from_numpy(placement.holders.copy())[ids], torch.tensor(active))
    total = torch.zeros(TOKENS, HIDDEN)
    for holder in sorted(active):
        here = torch.from_numpy(placement.holders.copy())[ids] == holder
        total = total + x * torch.where(here & there, weights, 0).sum(1, keepdim=True)
    return total


def agree(layer: Layer, number: int = 0, active: Any = None, **more: Any) -> None:
    """Fail unless a step of these ranks returns what it must."""
    ranks = range(layer.world) if active is None else active
    outs = layer.run(lambda rank, ep: step(rank, ep, number, **more), ranks)
    for rank, out in zip(ranks, outs, strict=True):
        assert torch.equal(out, wanted(rank, layer.eps[rank].placement, list(ranks), number)), rank

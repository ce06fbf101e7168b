"""What ranks in processes of their own are told to do on GPUs that are made up; see `moe_tools.Processes.call`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from moe_cuda import made_up
from moe_cuda_crews import step, tokens, wanted
from moe_programs import Program, play


def begin(member: Any) -> None:
    """Put a made-up driver in the place of CUDA's."""
    stack = member.kept["gpus"] = ExitStack()
    member.kept["made"] = stack.enter_context(made_up())


def end(member: Any) -> None:
    """Close all, and take the driver out: it says what was not given back."""
    for each in [*member.eps.values(), *member.groups.values(), member.agent]:
        each.close()
    member.kept.pop("graph", None)
    member.kept.pop("gpus").close()


def play_layer(member: Any, program: Program, layer: str) -> tuple[list[Any], str]:
    """Do this rank's part of a program on a layer; say which way rows went."""
    ep = member.eps[layer]
    return play(program, member.rank, ep, member.groups[layer]), ep.explain()


def keep_graph(member: Any, layer: str, rank: int) -> None:
    """Capture a step, then take one that needs larger windows: the graph is one of a former agreement."""
    ep, gpus = member.eps[layer], member.kept["made"]
    x, ids, weights = tokens(rank)
    stream = gpus.stream()
    gpus.fake.work.begin_capture(stream)
    r = ep.dispatch(x, ids, weights, layout="slots")
    out = ep.combine(r.x, r.handle)
    graph = gpus.fake.work.end_capture(stream)
    ep.dispatch(x, ids, weights, layout="tokens", extra=(torch.ones(len(x), 900),))
    member.kept["graph"] = graph, (r, out, x, ids, weights)


def replay(member: Any) -> float:
    """Replay it; return the seconds that it took."""
    began = time.monotonic()
    member.kept["graph"][0].launch()
    member.kept["made"].settle()
    return time.monotonic() - began


def take_step(member: Any, layer: str, number: int, active: list[int]) -> tuple[bool, tuple[int, ...]]:
    """Take a step with these ranks: whether it was right, and who takes part afterwards."""
    ep = member.eps[layer]
    out = step(member.rank, ep, number)
    return torch.equal(out, wanted(member.rank, ep.placement, active, number)), ep.active

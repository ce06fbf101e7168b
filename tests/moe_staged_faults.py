"""What ranks of two stages do in the tests of faults: steps whose every number is checked, as in `moe_faults`.

A rank draws what it gives from its number and that of the operation. Numbers are small and whole, so that sums are
exact whatever the grid: what comes must be what flat expert parallelism brings.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch
from moe_faults import EXPERTS, HIDDEN, Given, Harm, Report, Where, given, run_experts, terms
from moe_tools import make_experts

from raynixl.moe.two_level import TwoLevel


class StagedHarm(Harm):
    """Harm at a place of the columns and the group together."""

    def is_time(self, ep: Any, operation: str) -> bool:
        """Whether the next operation is the one."""
        is_joined = bool(ep._council.applicants) or len(ep.active) > self.beside
        return operation == self.where.operation and bool(is_joined or not self.waits)

    def arm(self, ep: Any) -> None:
        """Have the ways to all peers look out for the place."""
        for part, _ in ep._stages.parts():
            for channel in part._session.channels.values():
                self._arm(channel)


def make(member: Any, names: list[str], options: dict[str, Any]) -> None:
    """Make a `TwoLevel`."""
    make_experts(member, names, {"kind": TwoLevel, **options})


def step(
    member: Any, layer: str, deadline: float = 20.0, keep: bool = False, moves: bool = False, **options: Any
) -> Report:
    """Dispatch and combine once; everything that comes is as it must be, but for what the report says."""
    ep = member.eps[layer]
    look_out(member, ep, "dispatch")
    phase, began = ep._council.position, time.monotonic()
    one = given(ep.rank, phase)
    made = ep.dispatch(one.x, one.ids, one.weights, deadline=deadline, **options)
    seconds = time.monotonic() - began
    unheard = check_rows(ep, made, phase)
    look_out(member, ep, "combine")
    began = time.monotonic()
    out = ep.combine(run_experts(ep, made), made.handle, deadline=deadline)
    seconds = max(seconds, time.monotonic() - began)
    missing = explain(out, one, ep)
    if keep:
        held = [each for each in (made.x, made.topk_idx, made.topk_weights, out) if each is not None]
        member.kept.setdefault("held", []).extend((each, each.clone()) for each in held)
    if moves and member.kept.get("placed") != ep.active:
        member.kept["placed"] = ep.active
        ep.place([ep.active[expert % len(ep.active)] for expert in range(EXPERTS)])
    return Report(seconds, phase, made.lost, ep.active, unheard, missing)


def look_out(member: Any, ep: Any, operation: str) -> None:
    """Come to harm in the next operation, if it is the one."""
    harm = member.kept.get("harm")
    if harm is not None and harm.is_time(ep, operation):
        del member.kept["harm"]
        harm.arm(ep)


def check_rows(ep: Any, made: Any, phase: int) -> tuple[int, ...]:
    """Fail unless every row is that of its token, and a source's rows are all there or none; return whose are not."""
    mine = np.flatnonzero(np.array(ep.placement.holders) == ep.rank)
    x = made.x[(made.topk_idx >= 0).any(-1)] if made.handle.layout == "slots" else made.x
    sources, tokens = made.sources.numpy(), made.tokens.numpy()
    unheard = []
    for source in range(ep.world):
        theirs, here = given(source, phase), sources == source
        wanted = np.flatnonzero(np.isin(theirs.ids.numpy(), mine).any(1))
        if len(wanted) and not here.any():
            unheard.append(source)
            continue
        assert tokens[here].tolist() == wanted.tolist(), f"rank {ep.rank}: tokens of {source} in {phase}"
        if made.handle.layout != "experts":
            assert torch.equal(x[torch.from_numpy(here)], theirs.x[wanted]), f"rank {ep.rank}: rows of {source}"
    if made.handle.layout == "slots":
        assert np.all(np.diff(sources) >= 0)
    return tuple(unheard)


def explain(out: torch.Tensor, one: Given, ep: Any) -> tuple[int, ...]:
    """Return the fewest holders without whose terms the sums are these, to the bit."""
    by_holder = terms(one, ep.placement.holders)
    for count in range(len(by_holder) + 1):
        for gone in itertools.combinations(sorted(by_holder), count):
            rest = [term for rank, term in by_holder.items() if rank not in gone]
            if torch.equal(out, sum(rest, torch.zeros_like(one.x))):
                return gone
    raise AssertionError(f"rank {ep.rank} of {ep.active}: no holders' terms add up to {out}")


def steps(member: Any, layer: str, count: int, **options: Any) -> list[Report]:
    """Take so many steps."""
    return [step(member, layer, **options) for _ in range(count)]


def steps_until(member: Any, layer: str, active: tuple[int, ...], most: int = 4000, **options: Any) -> list[Report]:
    """Take steps until these ranks, and no others, are active; all ranks find it so behind the same step."""
    reports: list[Report] = []
    while member.eps[layer].active != active:
        reports.append(step(member, layer, **options))
        assert len(reports) < most, f"{member.eps[layer].active} are active, not {active}"
    return reports


def one_round(member: Any, layer: str, every: int, joiner: int = -1, most: int = 4000) -> list[Report]:
    """Take steps until the number of operations is a multiple, and until one has joined: all stop alike."""
    ep, reports = member.eps[layer], []
    while not reports or ep._council.position % every or (joiner >= 0 and joiner not in ep.active):
        reports.append(step(member, layer))
        assert len(reports) < most, f"{ep.active} are active, not {joiner}"
    return reports


def join_round(member: Any, names: list[str], options: dict[str, Any], every: int) -> list[Report]:
    """Make a layer beside others that run, and take the rest of the steps of their round."""
    make(member, names, options)
    return one_round(member, options["name"], every)


def join(
    member: Any, names: list[str], options: dict[str, Any], active: tuple[int, ...], moves: bool = True
) -> list[Report]:
    """Make a layer beside others that run, and take steps until these ranks are active."""
    make(member, names, options)
    ep = member.eps[options["name"]]
    assert ep.rank in ep.active
    layer = options["name"]
    return [step(member, layer, moves=moves), *steps_until(member, layer, active, moves=moves)]


def harm(member: Any, where: Where, number: int, waits: bool = False) -> None:
    """Come to harm in the next step, or in the first beside one that joins."""
    beside = len(next(iter(member.eps.values())).active)
    member.kept["harm"] = StagedHarm(where, number, waits, beside)


def rejoin(member: Any, layer: str, **options: Any) -> tuple[float, Report]:
    """Come back and take a step; return the seconds that coming back took, and what came of the step."""
    member.kept.pop("placed", None)
    began = time.monotonic()
    member.eps[layer].rejoin(deadline=20.0)
    return time.monotonic() - began, step(member, layer, **options)


def first_handle(member: Any, layer: str, layout: str) -> None:
    """Dispatch, and keep the handle."""
    ep = member.eps[layer]
    phase = ep._council.position
    one = given(ep.rank, phase)
    made = ep.dispatch(one.x, one.ids, one.weights, layout=layout)
    member.kept["cached"] = (phase, made.handle, made.sources, made.tokens)


def step_again(member: Any, layer: str, lost: tuple[int, ...]) -> Report:
    """Dispatch other rows by that handle, and combine: rows of those that were lost since are zero."""
    ep = member.eps[layer]
    phase, handle, sources, tokens = member.kept["cached"]
    began, one = time.monotonic(), given(ep.rank, phase)
    made = ep.dispatch(one.x + 1, handle=handle, layout=handle.layout)
    x = made.x[(made.topk_idx >= 0).any(-1)] if handle.layout == "slots" else made.x
    assert made.sources.tolist() == sources.tolist()
    rows = zip(x, sources.tolist(), tokens.tolist(), strict=True) if handle.layout != "experts" else ()
    for row, source, token in rows:
        wanted = torch.zeros(HIDDEN) if source in lost else given(source, phase).x[token] + 1
        assert torch.equal(row, wanted), f"rank {ep.rank}: row of token {token} of {source}"
    out = ep.combine(run_experts(ep, made), made.handle)
    missing = explain(out, Given(one.x + 1, one.ids, one.weights), ep)
    return Report(time.monotonic() - began, phase, made.lost, ep.active, (), missing)

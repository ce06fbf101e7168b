"""What ranks of two stages do in the tests of faults: steps whose every number is checked, as in `moe_faults`.

A rank draws what it gives from its number and that of the operation. Numbers are small and whole, so that sums are
exact whatever the grid: what comes must be what flat expert parallelism brings.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from moe_fault_rows import HIDDEN, Given, explain, given, run_experts
from moe_faults import Harm, Report, Where, step
from moe_tools import make_experts

from raynixl.moe.two_level import TwoLevel


class StagedHarm(Harm):
    """Harm at a place of the columns and the group together."""

    def is_time(self, ep: Any, operation: str) -> bool:
        """Whether the next operation is the one."""
        is_joined = bool(ep._council.applicants) or len(ep.active) > self.beside
        return operation == self.where.operation and bool(is_joined or not self.waits)

    is_done = False

    def at(self, kind: str, when: str) -> bool:
        """Whether this is the place, for the first time."""
        return not self.is_done and super().at(kind, when)

    def do(self) -> None:
        """Come to harm once."""
        self.is_done = True
        super().do()

    def arm(self, ep: Any) -> None:
        """Have the ways to all peers look out for the place; those of another view, too, which may come first."""
        regroup, armed = ep._regroup, []

        def regroup_and_arm(until: float) -> Any:
            stages = regroup(until)
            if stages not in armed:
                armed.append(stages)
                self.counts = {"put": 0, "line": 0}
                for part, _ in stages.parts():
                    for channel in part._session.channels.values():
                        self._arm(channel)
            return stages

        ep._regroup = regroup_and_arm


def make(member: Any, names: list[str], options: dict[str, Any]) -> None:
    """Make a `TwoLevel`."""
    make_experts(member, names, {"kind": TwoLevel, **options})


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

"""What ranks do in the tests of faults: steps whose every number is checked, and harm at a chosen place of one.

A step reports which rows came, and which holders' terms are in the sums: there is one set of them that explains all.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from agent_tools import eventually
from conftest import mapped_arenas, open_fds
from moe_fault_rows import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    TOPK,
    Given,
    check_rows,
    explain,
    given,
    is_staged,
    position_of,
    run_experts,
)  # fmt: skip
from moe_tools import make_experts

from raynixl.moe.lines import Cell

ROUND = 3 * 20
"""Phases of a round: a step has three."""

OPTIONS: dict[str, Any] = {
    "experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": TOKENS, "dtype": torch.float32,
    "eager_nbytes": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """A place in an operation, at the n-th put of rows or the n-th line to a rank."""

    operation: str
    kind: str
    number: int
    when: str
    """'before' it, 'amid' it (half of the rows are put), or 'after' it."""

    def __str__(self) -> str:
        return f"{self.when} {self.kind} {self.number} of {self.operation}"


DISPATCH = (
    Where("dispatch", "line", 0, "before"), Where("dispatch", "line", 1, "before"),
    Where("dispatch", "put", 0, "before"), Where("dispatch", "put", 0, "amid"), Where("dispatch", "put", 0, "after"),
    Where("dispatch", "put", 1, "before"), Where("dispatch", "put", 2, "amid"), Where("dispatch", "line", 5, "after"),
)  # fmt: skip
COMBINE = (
    Where("combine", "put", 0, "before"), Where("combine", "put", 0, "amid"), Where("combine", "put", 0, "after"),
    Where("combine", "put", 1, "before"), Where("combine", "put", 2, "amid"), Where("combine", "line", 2, "after"),
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What came of a step."""

    seconds: float
    phase: int
    lost: tuple[int, ...]
    active: tuple[int, ...]
    unheard: tuple[int, ...]
    """Sources whose rows for us have not come."""
    missing: tuple[int, ...]
    """Holders without whose terms our sums are."""
    why: str = ""
    """Why ranks were lost in the dispatch."""


@dataclass
class Harm:
    """Ends or freezes this process at a place of its next operation, or of the first beside one that joins."""

    where: Where
    number: int
    """Of the signal."""
    waits: bool = False
    """Whether it waits for one that joins."""
    beside: int = 99
    counts: dict[str, int] = field(default_factory=lambda: {"put": 0, "line": 0})

    def at(self, kind: str, when: str) -> bool:
        """Whether this is the place."""
        return (kind, self.counts[kind], when) == (self.where.kind, self.where.number, self.where.when)

    def is_time(self, ep: Any, operation: str) -> bool:
        """Whether the next operation is the one."""
        members = ep._session.members
        is_joined = members.ready or members.admitted or len(members.active) > self.beside
        return operation == self.where.operation and bool(is_joined or not self.waits)

    def do(self) -> None:
        """SIGKILL ends us here; behind SIGSTOP we go on here when we are resumed."""
        os.kill(os.getpid(), self.number)

    def arm(self, ep: Any) -> None:
        """Have the ways to all other ranks look out for the place."""
        for channel in ep._session.channels.values():
            self._arm(channel)

    def _arm(self, channel: Any) -> None:
        put, post = channel.put, channel.post

        def put_and_see(form: Any, place: Any, rows: Any, first: int, count: int, deadline: float) -> bool:
            if self.at("put", "before"):
                self.do()
            if self.at("put", "amid"):
                put(form, place, rows, first, count // 2, deadline)
                self.do()
            done = put(form, place, rows, first, count, deadline)
            if self.at("put", "after"):
                self.do()
            self.counts["put"] += 1
            return bool(done)

        def post_and_see(cell: Any, line: Any) -> bool:
            if cell not in (Cell.EVEN, Cell.ODD):
                return bool(post(cell, line))
            if self.at("line", "before"):
                self.do()
            done = post(cell, line)
            if self.at("line", "after"):
                self.do()
            self.counts["line"] += 1
            return bool(done)

        channel.put, channel.post = put_and_see, post_and_see
        channel.way = lambda _form, _slot: None  # by these alone, not all ranks' in one call of the core


def step(
    member: Any, layer: str, deadline: float = 20.0, keep: bool = False, moves: bool = False, **options: Any
) -> Report:
    """Dispatch and combine once; everything that comes is as it must be, but for what the report says.

    With `moves`, experts are spread over the active ranks anew once those have changed.
    """
    ep = member.eps[layer]
    look_out(member, ep, "dispatch")
    phase, began = position_of(ep), time.monotonic()
    one = given(ep.rank, phase)
    made = ep.dispatch(one.x, one.ids, one.weights, deadline=deadline, **options)
    seconds, why = time.monotonic() - began, "" if is_staged(ep) else str(ep._session.members.lost or "")
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
    return Report(seconds, phase, made.lost, ep.active, unheard, missing, why)


def look_out(member: Any, ep: Any, operation: str) -> None:
    """Come to harm in the next operation, if it is the one."""
    harm = member.kept.get("harm")
    if harm is not None and harm.is_time(ep, operation):
        del member.kept["harm"]
        harm.arm(ep)


def step_late(member: Any, layer: str, victim: int) -> Report:
    """Take a step once it is known here that a rank has ended."""
    session = member.eps[layer]._session
    eventually(lambda: session.is_gone(victim), "its end is known")
    return step(member, layer)


def line_is_here(member: Any, layer: str, rank: int) -> None:
    """Wait until a rank's line of the coming phase is here, and nothing else."""
    session = member.eps[layer]._session
    number = session.phase + 1
    eventually(lambda: session.board.number(rank, number & 1) == number, f"the line of {rank} is here")


def steps(member: Any, layer: str, count: int, **options: Any) -> list[Report]:
    """Take so many steps."""
    return [step(member, layer, **options) for _ in range(count)]


def steps_until(member: Any, layer: str, active: tuple[int, ...], most: int = 4000, **options: Any) -> list[Report]:
    """Take steps until these ranks, and no others, are active; all ranks find it so behind the same step."""
    reports = []
    while member.eps[layer].active != active:
        reports.append(step(member, layer, **options))
        assert len(reports) < most, f"{member.eps[layer].active} are active, not {active}"
    return reports


def harm(member: Any, where: Where, number: int = signal.SIGKILL, waits: bool = False) -> None:
    """Come to harm in the next step, or in the first beside one that joins."""
    beside = len(next(iter(member.eps.values())).active)
    member.kept["harm"] = Harm(where, number, waits, beside)


def one_round(member: Any, layer: str, joiner: int = -1, most: int = 4000) -> list[Report]:
    """Take steps until a multiple of so many since the layer began, and until one has joined: all stop alike."""
    ep, reports = member.eps[layer], []
    while not reports or ep._session.phase % ROUND or (joiner >= 0 and joiner not in ep.active):
        reports.append(step(member, layer))
        assert len(reports) < most, f"{ep.active} are active, not {joiner}"
    return reports


def join_round(member: Any, names: list[str], options: dict[str, Any]) -> list[Report]:
    """Make a layer beside others that run, and take the rest of the steps of their round."""
    make_experts(member, names, options)
    return one_round(member, options["name"])


def first_handle(member: Any, layer: str, layout: str) -> None:
    """Dispatch, and keep the handle."""
    ep = member.eps[layer]
    one = given(ep.rank, ep._session.phase)
    phase = ep._session.phase
    made = ep.dispatch(one.x, one.ids, one.weights, layout=layout)
    member.kept["cached"] = (phase, made.handle, made.sources, made.tokens)


def step_again(member: Any, layer: str, lost: tuple[int, ...]) -> Report:
    """Dispatch other rows by that handle, and combine: rows of those that were lost since are zero."""
    ep = member.eps[layer]
    phase, handle, sources, tokens = member.kept["cached"]
    began, one = time.monotonic(), given(ep.rank, phase)
    made = ep.dispatch(one.x + 1, handle=handle, layout=handle.layout)
    x = made.x[(made.topk_idx >= 0).any(-1)] if handle.layout == "slots" else made.x
    for row, source, token in zip(x, sources.tolist(), tokens.tolist(), strict=True):
        wanted = torch.zeros(HIDDEN) if source in lost else given(source, phase).x[token] + 1
        assert torch.equal(row, wanted), f"rank {ep.rank}: row of token {token} of {source}"
    y = run_experts(ep, made)
    out = ep.combine(y, made.handle)
    missing = explain(out, Given(one.x + 1, one.ids, one.weights), ep)
    return Report(time.monotonic() - began, phase, made.lost, ep.active, (), missing)


def step_behind(member: Any, layer: str, deadline: float = 20.0) -> Report:
    """Take a step of which both operations go on behind our back."""
    ep, began = member.eps[layer], time.monotonic()
    look_out(member, ep, "dispatch")
    look_out(member, ep, "combine")
    phase = ep._session.phase
    one = given(ep.rank, phase)
    made = ep.dispatch(one.x, one.ids, one.weights, async_=True, deadline=deadline).wait(60.0)
    unheard = check_rows(ep, made, phase)
    out = ep.combine(run_experts(ep, made), made.handle, async_=True, deadline=deadline).wait(60.0)
    missing = explain(out, one, ep)
    return Report(time.monotonic() - began, phase, made.lost, ep.active, unheard, missing)


def held_is_as_it_was(member: Any) -> int:
    """Fail if what steps kept has changed; return how much that is."""
    held = member.kept.pop("held", [])
    for tensor, copy in held:
        assert torch.equal(tensor.contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8))
    return len(held)


def drop(member: Any, layer: str) -> None:
    """Close a layer, if there is one here, and forget what was kept."""
    member.kept.clear()
    for made in (member.eps, member.groups):
        if layer in made:
            made.pop(layer).close()


def expect(member: Any, layer: str, names: list[str]) -> None:
    """Expect those of these members who are not known yet."""
    ep = member.eps[layer]
    ep.join(names[ep.world :])


def join(member: Any, names: list[str], options: dict[str, Any], active: tuple[int, ...]) -> list[Report]:
    """Make a layer beside others that run, and take steps until these ranks are active."""
    make_experts(member, names, options)
    ep = member.eps[options["name"]]
    assert ep.rank in ep.active
    return [step(member, options["name"], moves=True), *steps_until(member, options["name"], active, moves=True)]


def leave(member: Any, layer: str, ranks: list[int]) -> None:
    """Take ranks out; ours forgets the layer."""
    ep = member.eps[layer]
    ep.leave(ranks)
    if ep.rank in ranks:
        drop(member, layer)


def mask(member: Any, layer: str, rank: int) -> None:
    """Go on without a rank."""
    member.eps[layer].mask(rank)


def unmask(member: Any, layer: str, rank: int) -> None:
    """Let a rank in again."""
    member.eps[layer].unmask(rank)


def rejoin(member: Any, layer: str, **options: Any) -> tuple[float, Report]:
    """Come back and take a step; return the seconds that coming back took, and what came of the step."""
    member.kept.pop("placed", None)
    began = time.monotonic()
    member.eps[layer].rejoin(deadline=20.0)
    return time.monotonic() - began, step(member, layer, **options)


def quarantined(member: Any, layer: str) -> list[str]:
    """The slots that wait for a rank that may still write into them."""
    return [str(slot) for slot in member.eps[layer]._session.pool.quarantined]


def footprint(member: Any) -> tuple[list[str], int, int]:
    """What this process holds: threads of expert parallelism, descriptors of arenas, and mapped bytes of arenas."""
    gc.collect()
    threads = sorted(one.name for one in threading.enumerate() if one.name.startswith("raynixl-moe"))
    return threads, sum("memfd:raynixl" in target for _, target in open_fds()), mapped_arenas()

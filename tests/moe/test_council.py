"""Leaders of a council that wake up late, or are asked by many at once; who is late to come in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from agent_tools import eventually
from moe_tools import Layer, Threads

from raynixl import Agent, Masked, TransferTimeout
from raynixl.moe.council import Council, Regrouped
from raynixl.moe.grid import Grid
from raynixl.moe.seat import Charter
from raynixl.moe.two_level import TwoLevel
from raynixl.moe.view import NOT_YET, Ask, Member, View, first_view

OPTIONS: dict[str, Any] = {
    "kind": TwoLevel, "grid": Grid(((0, 1, 4), (2, 3))), "experts": 10, "hidden": 16, "topk": 2, "max_tokens": 5,
    "dtype": torch.float32, "deadline": 2.0,
}  # fmt: skip
NAMES = ["a", "b", "owner", "d"]
TOKENS = [secrets.token_hex(16) for _ in NAMES]
REST = (1, 2, 3)


def step(ep: Any, number: int) -> set[tuple[int, float]]:
    """Dispatch and combine; return which rank's rows came here, and what they said."""
    ids = torch.arange(10).reshape(5, 2)
    r = ep.dispatch(torch.full((5, 16), float(number)), ids, torch.ones(5, 2))
    ep.combine(r.x, r.handle)
    return set(zip(r.sources.tolist(), r.x[:, 0].tolist(), strict=True))


@pytest.fixture
def layer(crew: Threads) -> Iterator[Layer]:
    """Five ranks of two stages, which have taken a step."""
    with crew.experts(5, **OPTIONS) as made:
        made.run(lambda rank, ep: step(ep, 0))
        yield made


@pytest.fixture
def council(agent: Agent) -> Iterator[Council]:
    """The third of four."""
    one = Council(agent, Charter("layer", 2, NAMES, "", 5.0, 8, None, lambda: ()))
    one.take(view := first_view(members(one), None))
    one.adopt(view)
    yield one
    one.close()


def members(council: Council, *, gone: int | None = None) -> tuple[Member, ...]:
    tokens = [*TOKENS[:2], council.token, TOKENS[3]]
    return tuple(
        Member(name=name, token=None if rank == gone else token)
        for rank, (name, token) in enumerate(zip(NAMES, tokens, strict=True))
    )


def prepare(council: Council, number: int, leader: int) -> bool:
    return council._prepare(Ask(kind="prepare", rank=leader, token=TOKENS[leader], number=number))


def view_of(council: Council, number: int, leader: int) -> View:
    """Return a view without the last rank."""
    assert council.view is not None
    made = members(council, gone=3)
    return council.view.changed(number=number, leader=leader, since=0, members=made, is_joining=False)


def test_a_view_that_was_promised_to_nobody_else_is_taken(council: Council) -> None:
    assert prepare(council, 1, 0)
    assert council.commit(view := view_of(council, 1, 0), 0)
    assert council.view == view
    assert council._promise is None


def test_a_late_view_ends_no_promise_of_a_later_one(council: Council) -> None:
    before = council.view
    assert prepare(council, 2, 1)
    assert not council.commit(view_of(council, 1, 0), 0)
    assert council.view == before
    assert council._promise is not None


def test_who_spreads_what_a_former_leader_has_made_is_followed(council: Council) -> None:
    assert prepare(council, 2, 1)
    assert council.commit(view := view_of(council, 1, 0), 1)
    assert council.view == view


def test_one_number_is_promised_to_one_leader_alone(council: Council) -> None:
    assert prepare(council, 1, 1)
    assert not prepare(council, 1, 0)
    assert prepare(council, 2, 0)  # which it asks for next, since it has heard of that
    assert not council.commit(view_of(council, 1, 1), 1)
    assert council.next_number() == 3
    assert council.next_number(7) == 8


def test_a_leader_whose_own_promise_has_run_out_must_prepare_again(council: Council) -> None:
    assert council.promise(1, 2)
    assert council._promise is not None
    council._promise.until = time.monotonic() - 1
    assert not council.commit(view_of(council, 1, 2), 2)


def test_a_leader_that_wakes_up_amid_its_commit_changes_nothing(layer: Layer) -> None:
    gate, stands = threading.Event(), threading.Event()
    council = layer.eps[0]._council
    commit = council.commit

    def frozen(view: View, by: int) -> bool:
        if by == 0 and not stands.is_set():
            stands.set()
            assert gate.wait(30)
        return commit(view, by)

    def go(rank: int, ep: Any) -> list[Any]:
        if rank == 4:
            return []
        if rank == 0:
            council.commit = frozen
            ep.mask(4)
            with pytest.raises(Masked):
                step(ep, 1)
            return []
        assert stands.wait(30)
        if rank == 1:
            ep.mask(4)
        found = [step(ep, number) for number in range(1, 5)]
        if rank == 1:
            gate.set()
        eventually(lambda: council._masked is not None, "it hears that it is out")
        return [*found, *(step(ep, number) for number in range(5, 8))]

    played = layer.run(go)
    for rank in REST:
        assert played[rank] == [{(source, float(number)) for source in REST} for number in range(1, 8)]
    assert {layer.eps[rank].active for rank in REST} == {REST}


def test_a_report_is_answered_at_once_while_the_leader_is_at_work(council: Council) -> None:
    report = Ask(kind="report", rank=1, token=TOKENS[1], suspects=((3, TOKENS[3]),))
    with council.conductor._turn, ThreadPoolExecutor(1) as other:
        other.submit(council._answer, "b", report.to_bytes()).result(5)
    assert council.suspects == {3: TOKENS[3]}


def test_a_leader_that_has_no_thread_left_for_a_report_is_not_lost(
    council: Council, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(council.asking, "one", lambda *_: TransferTimeout("'a' is overloaded", hint="retry later"))
    council.suspect({3}, "it has ended")
    council._settle()
    assert council.suspects == {3: TOKENS[3]}


def test_who_gives_up_coming_back_holds_up_nobody(layer: Layer) -> None:
    rest = [0, 1, 2, 3]

    def without(rank: int, ep: Any) -> Any:
        ep.mask(4)
        step(ep, 1)
        ep.unmask(4)

    layer.run(without, ranks=rest)
    late = layer.eps[4]
    with pytest.raises(TransferTimeout):
        late.rejoin(deadline=0.3)  # the others take no step meanwhile
    began = time.monotonic()
    assert layer.run(lambda rank, ep: step(ep, 2), ranks=rest) == [{(rank, 2.0) for rank in rest}] * 4
    assert time.monotonic() - began < OPTIONS["deadline"]
    with pytest.raises(Masked, match="rejoin"):
        step(late, 2)
    came = threading.Event()

    def until_it_is_back(rank: int, ep: Any) -> set[tuple[int, float]]:
        if rank == 4:
            ep.rejoin()
            came.set()
        found = step(ep, 3)
        while ep.active != (0, 1, 2, 3, 4):
            found = step(ep, 3)
        return found

    assert layer.run(until_it_is_back) == [{(rank, 3.0) for rank in range(5)}] * 5


def test_nobody_comes_in_before_all_work_in_the_present_view(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a combine that is to be done again for a loss would end in the view of before it on some ranks."""
    one = Council(agent, Charter("layer", 0, ["owner", "b"], "", 5.0, 8, None, lambda: ()))
    asks = Ask(kind="hello", rank=1, token=TOKENS[1])
    answer = one.said(asks, False).model_copy(update={"rank": 1, "token": TOKENS[1], "position": NOT_YET})
    monkeypatch.setattr(one.asking, "all", lambda asked, *_: dict.fromkeys(asked, answer))
    one.take(view := first_view((Member(name="owner", token=one.token), Member(name="b")), None))
    one.applicants[1] = asks
    one.conductor.run()
    assert one.view == view
    one.adopt(view)
    one.applicants[1] = asks
    one.conductor.run()
    assert one.view.live == (0, 1)
    assert one.view.is_joining
    one.close()


def joining(council: Council, number: int = 1) -> View:
    assert council.view is not None
    return council.view.changed(number=number, leader=0, since=0, members=members(council), is_joining=True)


def test_a_view_that_is_for_the_next_dispatch_ends_no_making_of_another_one(council: Council) -> None:
    council.enter(is_fresh=False)
    assert council.commit(view := joining(council), 0)
    council.watch_building()
    assert council.due is None
    council.enter(is_fresh=True)
    assert council.due == view
    with pytest.raises(Regrouped):
        council.watch_building()


def test_who_comes_in_follows_any_later_view(council: Council) -> None:
    council.position = NOT_YET
    assert council.commit(view := joining(council), 0)
    assert council.due == view
    with pytest.raises(Regrouped):
        council.watch_building()


def test_who_was_to_come_in_asks_again_where_one_is_lost_before(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be amid a combine, which is to be done again without it; behind the next dispatch it stays."""
    for adopted, live in ((0, (0, 1)), (1, (0, 1, 3))):
        names = ["owner", "b", "c", "d"]
        one = Council(agent, Charter("layer", 0, names, "", 5.0, 8, None, lambda: ()))
        tokens = [one.token, *TOKENS[1:]]
        every = tuple(Member(name=name, token=token) for name, token in zip(names, tokens, strict=True))
        one.take(view := first_view((*every[:3], Member(name="d")), None))
        one.adopt(view)
        one.take(view.changed(leader=0, since=7, members=every, is_joining=True))
        one.position = 7
        asks = Ask(kind="state", rank=1, token=TOKENS[1])
        said = one.said(asks, False)
        answers = {
            1: said.model_copy(update={"rank": 1, "token": TOKENS[1], "adopted": adopted}),
            3: said.model_copy(update={"rank": 3, "token": TOKENS[3], "adopted": 1, "position": NOT_YET}),
        }
        monkeypatch.setattr(one.asking, "all", lambda asked, *_, known=answers: {rank: known[rank] for rank in asked})
        one.suspect({2}, "it has ended")
        one.conductor.run()
        assert one.view is not None
        assert (one.view.live, one.view.is_joining, one.view.since) == (live, False, 7)
        one.close()


def test_who_is_let_in_before_it_hears_that_the_others_run_asks_where_they_are(agent: Agent) -> None:
    one = Council(agent, Charter("layer", 2, NAMES, "", 5.0, 8, None, lambda: ()))
    view = first_view(members(one), None)
    assert one.commit(view.changed(leader=0, since=7, members=members(one), is_joining=True), 0)
    assert one.position == NOT_YET
    one.restart()
    assert one.position == 0
    one.take(first_view(members(one), None))
    assert one.position == 0  # it is one of those that began
    one.close()

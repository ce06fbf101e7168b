"""Making an ExpertParallel, or coming back, fails at any of its steps: nothing is left, and it can be tried again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agent_tools import make_agent

from raynixl import Agent, ConfigError, ExpertParallel, Group, InMemoryDirectory, Masked, RangeError, TransferTimeout
from raynixl.moe import meeting, rank, session

OPTIONS: dict[str, Any] = {"experts": 4, "hidden": 16, "topk": 1, "max_tokens": 4, "dtype": torch.float32}


@pytest.fixture
def pair(nothing_left: Callable[[], list[str]]) -> Iterator[list[Agent]]:
    """Two agents of this process, of which nothing is left."""
    directory = InMemoryDirectory()
    agents = [make_agent(name, directory=directory, backends=("loopback", "shm")) for name in ("a", "b")]
    yield agents
    for agent in agents:
        agent.close()


def held(agent: Agent) -> tuple[int, list[str], list[str]]:
    """The regions of an agent, and the topics that it answers or takes messages of."""
    gc.collect()
    control = agent.control
    topics = [topic for topic in control._handlers if topic.startswith("moe/")]
    receivers = [topic for topic in control.topics._receivers if topic.startswith("moe/")]
    return len(agent.regions), topics, receivers


def make_alone(agent: Agent, **options: Any) -> ExpertParallel:
    """Make a group of one."""
    with Group(agent, [agent.name]) as group:
        return ExpertParallel(group, **(OPTIONS | options))


def use(ep: ExpertParallel) -> None:
    """Take a step alone."""
    made = ep.dispatch(torch.ones(2, 16), torch.tensor([[0], [3]]))
    assert torch.equal(ep.combine(made.x, made.handle), torch.ones(2, 16))


PLACES = {
    "the pool": (rank, "Pool"), "the session": (rank, "Session"), "the board": (rank, "Board"),
    "the start": (rank, "start"), "the line of the session": (session, "Line"),
    "the rows of the meeting": (meeting, "RemoteRows"), "the hello of the meeting": (meeting, "Hello"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left_where_a_part_of_it_cannot_be_made(
    pair: list[Agent], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = held(pair[0])
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], refuse)
        with pytest.raises(RangeError, match="no more"):
            make_alone(pair[0])
    assert held(pair[0]) == before
    with make_alone(pair[0]) as ep:
        use(ep)
    assert held(pair[0]) == before


def refuse(*_: object, **__: object) -> None:
    raise RangeError("there is no more")


@pytest.mark.parametrize("topic", ["line", "hello", "slot", "placement"])
def test_nothing_is_left_where_a_topic_cannot_be_served(
    pair: list[Agent], topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = held(pair[0])
    serve, deliver = pair[0].serve, pair[0].deliver

    def check(name: str) -> None:
        if name.endswith(topic):
            raise RangeError("there is no more")

    monkeypatch.setattr(pair[0], "serve", lambda name, *args: (check(name), serve(name, *args)))
    monkeypatch.setattr(pair[0], "deliver", lambda name, *args: (check(name), deliver(name, *args)))
    with pytest.raises(RangeError, match="no more"):
        make_alone(pair[0])
    assert held(pair[0]) == before


def test_nothing_is_left_of_slots_that_no_memory_holds(pair: list[Agent]) -> None:
    before = held(pair[0])
    with pytest.raises(RangeError):
        make_alone(pair[0], capacity=1 << 44)
    assert held(pair[0]) == before


def test_nothing_is_left_where_the_others_do_not_come(pair: list[Agent]) -> None:
    before = held(pair[0])
    with Group(pair[0], ["a", "b"]) as group, pytest.raises(TransferTimeout, match="not all ranks"):
        ExpertParallel(group, **OPTIONS, deadline=0.1)
    assert held(pair[0]) == before


def test_who_could_not_come_back_says_so_and_can_try_again(pair: list[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    before = held(pair[0])
    with make_alone(pair[0]) as ep:
        for place in PLACES.values():
            with monkeypatch.context() as patch:
                patch.setattr(*place, refuse)
                with pytest.raises(RangeError, match="no more"):
                    ep.rejoin()
            assert held(pair[0]) == before
            with pytest.raises(Masked, match="rejoin"):
                use(ep)
        with make_alone(pair[0]), pytest.raises(ConfigError, match="already"):
            ep.rejoin()
        ep.rejoin()
        use(ep)
    assert held(pair[0]) == before


def test_who_could_not_come_back_takes_nothing_from_another_layer_of_its_name(
    pair: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_alone(pair[0])
    with monkeypatch.context() as patch:
        patch.setattr(rank, "Session", refuse)
        with pytest.raises(RangeError):
            first.rejoin()
    with make_alone(pair[0]) as second:
        had = held(pair[0])
        first.close()
        assert held(pair[0]) == had
        use(second)


def test_all_is_withdrawn_though_a_part_of_it_fails(pair: list[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    before = held(pair[0])
    ep = make_alone(pair[0])
    monkeypatch.setattr(ep._session.pool, "_drop", refuse)
    slots = len(ep._session.pool)
    with pytest.raises(RangeError):
        ep.close()
    regions, topics, receivers = held(pair[0])
    assert (regions - slots, topics, receivers) == before

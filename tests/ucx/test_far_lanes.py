"""Lanes to a peer whose process is out of sight, as on another host: it is watched by reading a word of its memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from agent_tools import PATIENCE, eventually, introduce, random_bytes
from lane_tools import TCP, LaneWorld, RudePeer, config_for

from raynixl import Agent
from raynixl.backends.ucx_lane import UcxLink
from raynixl.host import host_identity
from raynixl.native import DONE

N = 4096
LANES = 3


class CountingRail:
    """A rail that notes what it maps."""

    def __init__(self, rail: Any) -> None:
        self._rail = rail
        self.mapped: list[int] = []

    def map(self, address: int, nbytes: int, kind: int) -> Any:
        """Map it, and note it."""
        self.mapped.append(address)
        return self._rail.map(address, nbytes, kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rail, name)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, _leaves_nothing: None) -> Iterator[tuple[Agent, Agent]]:
    """Two agents that do not see each other's process."""
    monkeypatch.setattr(UcxLink, "watch_process", lambda *_: None)
    with Agent("alice", config=config_for(TCP)) as alice, Agent("bob", config=config_for(TCP)) as bob:
        introduce(alice, bob)
        bob.register(random_bytes(N), name="bobs")
        yield alice, bob


def network_of(agent: Agent) -> Any:
    """What an agent's backend has made for its peers."""
    backend: Any = agent.backend("ucx")
    return backend.network


def test_the_place_where_the_word_arrives_is_mapped_once_for_all_lanes(pair: tuple[Agent, Agent]) -> None:
    alice, _ = pair
    network = network_of(alice)
    rails = []
    for worker in network._run()._workers:
        worker.rail = CountingRail(worker.rail)
        rails.append(worker.rail)
    mine, theirs = alice.register(np.zeros(N, np.uint8)), alice.peer("bob")["bobs"]
    for _ in range(LANES):
        mine.array()[:] = 0
        alice.read(theirs, mine, timeout=PATIENCE).wait(PATIENCE)
        assert np.array_equal(mine.array(), random_bytes(N))
        (link,) = network._links._links
        check_hears(network, link)
        link.lane.fail()
    for rail in rails:
        assert len(rail.mapped) == len(set(rail.mapped)), "mapped again"


def check_hears(network: Any, link: Any) -> None:
    """The link's probe brings the peer's word."""
    network._heard.raw = bytes(len(network._heard))
    assert not link.pid
    assert not link.is_frozen()
    _, job, _ = link.lane._probe
    assert job.wait(PATIENCE)
    assert job.code == DONE
    assert network._heard.raw.decode() == link.incarnation


def test_no_peer_is_told_how_to_reach_that_place(pair: tuple[Agent, Agent]) -> None:
    alice, _ = pair
    mine = alice.register(np.zeros(N, np.uint8))
    alice.read(alice.peer("bob")["bobs"], mine, timeout=PATIENCE).wait(PATIENCE)
    places = [number for number in network_of(alice).exports._exports if number > 1 << 32]
    assert len(places) == 1
    with RudePeer("rude") as rude:
        link = rude.meet_agent(alice)
        link.send_control(json.dumps({"kind": "hello", "host": host_identity(), "pid": 1}).encode())
        link.send_control(json.dumps({"kind": "ask", "number": 1, "region": places[0]}).encode())
        eventually(lambda: rude.lost, "the end of the link")
    assert not any(b"answer" in body for body in rude.controls)


def test_a_peer_that_is_stopped_is_given_up_as_it_answers_not_even_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UcxLink, "watch_process", lambda *_: None)
    with LaneWorld(config_for(TCP)) as world:
        theirs, mine = world.theirs("user"), world.mine()
        world.near.read(theirs, mine, timeout=PATIENCE).wait(PATIENCE)
        world.stop()
        eventually(lambda: world.near.lost("victim"), "the loss of the stopped peer")
        assert "one-sided read" in str(world.near.lost("victim"))
        world.resume()

"""Whoever has not proved himself at an agent's port gets neither key nor address of UCX, and disturbs no peer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from agent_tools import PATIENCE, error_of, eventually, introduce, random_bytes
from lane_tools import SECRET, TCP, RudePeer, config_for, endpoint_of
from link_tools import TcpStranger, frame, framed
from pydantic import SecretBytes

from raynixl import Agent, ConfigError

CONNECTIONS = 10_000
N = 1 << 16


@dataclass
class Door:
    """An agent's port as strangers see it."""

    agent: Agent

    @property
    def endpoint(self) -> tuple[str, int]:
        """Where it listens."""
        return endpoint_of(self.agent)

    @property
    def incarnation(self) -> str:
        """What a greeting must name."""
        return self.agent.incarnation


def secret(text: bytes) -> dict[str, Any]:
    """The setting of a secret."""
    return {"secret": SecretBytes(text)}


@pytest.fixture
def pair(_leaves_nothing: None) -> Iterator[tuple[Agent, Agent]]:
    """An agent with a secret, and a friend who knows it; they have moved bytes."""
    with (
        Agent("guarded", config=config_for(TCP, **secret(SECRET))) as guarded,
        Agent("friend", config=config_for(TCP, **secret(SECRET))) as friend,
    ):
        introduce(guarded, friend)
        guarded.register(random_bytes(N), name="treasure")
        check_serves(guarded, friend)
        yield guarded, friend


def check_serves(guarded: Agent, friend: Agent) -> None:
    """The friend reads what is there."""
    mine = friend.register(np.zeros(N, np.uint8))
    friend.read(friend.peer("guarded")["treasure"], mine, timeout=PATIENCE).wait()
    assert np.array_equal(mine.array(), random_bytes(N))
    friend.deregister(mine)


def heard_by(stranger: TcpStranger) -> bytes:
    """All that a stranger is told until they hang up."""
    data = b""
    while more := stranger._read(1):
        data += more
    return data


def test_a_stranger_hears_neither_key_nor_address_of_ucx(pair: tuple[Agent, Agent]) -> None:
    guarded, friend = pair
    ask = frame(json.dumps({"kind": "ask", "number": 1, "region": 1}).encode(), channel=1)
    backend: Any = guarded.backend("ucx")
    known = [*backend.network.worker_addresses(), backend.network.exports._mapped(1).sealed]
    said = b""
    for words in (ask, framed(b"{}") + ask):
        with TcpStranger(Door(guarded)) as stranger:
            stranger.sock.sendall(words)
            said += heard_by(stranger)
    with TcpStranger(Door(guarded)) as stranger:
        stranger.say({"proof": stranger.challenge()["proof"], "probe": 0})  # reflected
        said += heard_by(stranger)
    assert b"wrong secret" in said
    assert not any(one[:16] in said for one in known)
    assert SECRET not in said
    counted = {"greeting: malformed": 2, "greeting: wrong secret": 1}  # the agent hangs up before it counts
    eventually(lambda: guarded.statistics().dropped == counted, "all three are counted")
    check_serves(guarded, friend)


def test_a_replayed_greeting_opens_no_link(pair: tuple[Agent, Agent]) -> None:
    guarded, friend = pair
    with TcpStranger(Door(guarded)) as honest:
        challenge = honest.challenge()
        hello, answer = honest.hello(), {"proof": honest.proof(challenge, SECRET), "probe": 0}
        honest.say(answer)
        assert honest.hear()["refusal"] == ""
    with TcpStranger(Door(guarded)) as stranger:
        stranger.say(hello)
        assert stranger.hear()["nonce"] != challenge["nonce"]
        stranger.say(answer)
        assert stranger.hear()["kind"] == "secret"
    check_serves(guarded, friend)


@pytest.mark.parametrize("theirs", [b"of another job", b""], ids=["wrong secret", "no secret"])
def test_agents_of_two_jobs_refuse_each_other(pair: tuple[Agent, Agent], theirs: bytes) -> None:
    guarded, friend = pair
    with Agent("foreign", config=config_for(TCP, **secret(theirs))) as foreign:
        introduce(guarded, foreign)
        foreign.register(bytearray(8), name="x")
        for one, other, region in ((foreign, "guarded", "treasure"), (guarded, "foreign", "x")):
            with pytest.raises(ConfigError, match="does not share our secret"):
                _ = one.peer(other)[region]
        mine = foreign.register(np.zeros(N, np.uint8))
        stolen = guarded.peer("friend").name and friend.peer("guarded")["treasure"]
        assert isinstance(error_of(foreign.read(stolen, mine)), ConfigError)
        assert not mine.array().any()
    check_serves(guarded, friend)


FLOOD = """
import random, socket, sys
target, connections = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
chance = random.Random(7)
for _ in range(connections):
    with socket.socket() as sock:
        try:
            sock.connect(target)
            sock.send(chance.randbytes(chance.randint(1, 300)))
        except OSError:
            pass
"""


def test_ten_thousand_connections_of_random_bytes_disturb_no_transfer(
    pair: tuple[Agent, Agent], nothing_left: Callable[[], list[str]]
) -> None:
    guarded, friend = pair
    held = len(nothing_left())
    host, port = endpoint_of(guarded)
    before = sum(guarded.statistics().dropped.values())
    flooder = subprocess.Popen([sys.executable, "-ISc", FLOOD, host, str(port), str(CONNECTIONS)])
    transfers = 0
    while flooder.poll() is None:
        check_serves(guarded, friend)
        transfers += 1
    assert flooder.wait(PATIENCE) == 0
    assert transfers > 10

    def count() -> int:
        return sum(guarded.statistics().dropped.values()) - before

    eventually(lambda: count() >= CONNECTIONS, "all of them to be counted")
    assert count() == CONNECTIONS
    assert guarded.lost("friend") is None
    eventually(lambda: len(nothing_left()) <= held, "their descriptors to be closed")


def test_one_who_leaves_with_the_last_word_of_the_greeting_leaves_nothing(
    pair: tuple[Agent, Agent], nothing_left: Callable[[], list[str]]
) -> None:
    """The agent then introduces itself to nobody."""
    guarded, friend = pair
    held = len(nothing_left())
    for turn in range(20):
        with TcpStranger(Door(guarded)) as leaver:
            leaver.say({"proof": leaver.proof(leaver.challenge(), SECRET), "probe": 0})
            if turn % 2:
                leaver.reset()
    eventually(lambda: len(nothing_left()) <= held, "their descriptors to be closed")
    check_serves(guarded, friend)


def test_a_peer_that_introduces_itself_never_is_given_up(pair: tuple[Agent, Agent]) -> None:
    guarded, friend = pair
    with RudePeer("mute", secret=SECRET) as mute:
        mute.meet_agent(guarded)
        eventually(lambda: mute.lost, "the end of the link")
        eventually(lambda: guarded.lost("mute") is not None, "the loss")
        assert "silent" in str(guarded.lost("mute"))
    check_serves(guarded, friend)

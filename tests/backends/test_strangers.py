"""Whoever reaches an agent's socket without the job's secret gets nothing, is counted, and disturbs nobody."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from agent_tools import PATIENCE, eventually, introduce, make_agent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger import Stranger

from raynixl import Agent, ConfigError, RaynixlError
from raynixl.backends import greeting

SECRET = b"of this job"
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def agent(nothing_left: Callable[[], list[str]]) -> Iterator[Agent]:
    """An agent with a secret, closed at the end."""
    with make_agent("guarded", backends=("shm",), secret=SECRET) as agent:
        yield agent


def dropped(agent: Agent) -> int:
    """How much the agent has turned away."""
    return sum(agent.statistics().dropped.values())


def check_serves(agent: Agent) -> None:
    """The agent still serves one who knows the secret."""
    with make_agent("friend", backends=("shm",), secret=SECRET) as friend:
        introduce(agent, friend)
        region = agent.register(np.arange(64, dtype=np.uint8))
        mine = friend.register(np.zeros(64, np.uint8))
        friend.read(region.describe(), mine).wait(PATIENCE)
        assert np.array_equal(mine.array(), np.arange(64))
        agent.deregister(region)


def refused(stranger: Stranger, reason: str) -> None:
    """The agent says why, hangs up, and has counted it."""
    before = stranger.hear()
    assert before.get("refusal") == reason, before
    assert stranger.hear() == {}
    eventually(lambda: stranger.agent.statistics().dropped.get(f"greeting: {reason}"), "the count")
    assert stranger.agent.statistics().peers == 0


def test_a_stranger_who_knows_nothing_hears_no_more_than_a_challenge(agent: Agent) -> None:
    with Stranger(agent) as stranger:
        challenge = stranger.challenge()
        assert SECRET.decode() not in str(challenge)
        stranger.say({"proof": "00" * 32, "probe": 0})
        refused(stranger, "wrong secret")
    check_serves(agent)


def test_a_wrong_secret_is_refused(agent: Agent) -> None:
    with Stranger(agent) as stranger:
        stranger.say({"proof": stranger.proof(stranger.challenge(), b"of another job"), "probe": 0})
        refused(stranger, "wrong secret")


def test_a_replayed_greeting_is_refused(agent: Agent) -> None:
    with Stranger(agent) as friend:
        challenge = friend.challenge()
        hello, answer = friend.hello(), {"proof": friend.proof(challenge, SECRET), "probe": 0}
        friend.say(answer)
        assert friend.hear()["refusal"] == ""
    with Stranger(agent) as stranger:
        stranger.say(hello)
        assert stranger.hear()["nonce"] != challenge["nonce"]
        stranger.say(answer)
        assert stranger.hear()["kind"] == "secret"


def test_a_proof_reflected_at_the_agent_is_refused(agent: Agent) -> None:
    with Stranger(agent) as stranger:
        stranger.say({"proof": stranger.challenge()["proof"], "probe": 0})
        refused(stranger, "wrong secret")


def test_a_peer_of_another_job_is_told_so_on_both_sides(agent: Agent) -> None:
    with make_agent("foreign", backends=("shm",), secret=b"of another job") as foreign:
        introduce(agent, foreign)
        with pytest.raises(ConfigError, match="does not share our secret"):
            foreign.notify("guarded", b"hello")
        with pytest.raises(ConfigError, match="does not share our secret"):
            agent.notify("foreign", b"hello")
    assert agent.notifications() == []
    check_serves(agent)


def test_a_greeting_for_another_incarnation_or_version_is_refused(agent: Agent) -> None:
    with Stranger(agent) as stranger:
        stranger.say(stranger.hello(target="0" * 32))
        refused(stranger, "another incarnation")
    with Stranger(agent) as stranger:
        stranger.say(stranger.hello(version=2))
        refused(stranger, "version")


GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=9000),
    st.text(min_size=1, max_size=200).map(str.encode),
    st.dictionaries(
        st.sampled_from(["version", "target", "name", "incarnation", "nonce", "proof", "probe", "x"]),
        st.one_of(st.integers(), st.text(max_size=20), st.none(), st.lists(st.integers(), max_size=3), st.booleans()),
    ).map(lambda words: repr(words).replace("'", '"').encode(errors="replace")),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(first=GARBAGE, second=GARBAGE, is_greeted=st.booleans())
def test_garbage_is_turned_away_and_counted(agent: Agent, first: bytes, second: bytes, is_greeted: bool) -> None:
    before = dropped(agent)
    with Stranger(agent) as stranger, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if is_greeted:
            assert stranger.challenge()
        stranger.sock.send(first)
        stranger.sock.send(second)
        while stranger.sock.recv(4096):
            continue
    eventually(lambda: dropped(agent) == before + 1, "the count of one more")
    assert agent.statistics().peers == 0


def test_the_fuzzed_agent_still_serves(agent: Agent) -> None:
    for size in (1, 100, 4096, 4097, 100_000):
        with Stranger(agent) as stranger:
            stranger.sock.send(b"{" * size)
            assert stranger.hear()["refusal"] == "malformed"
    check_serves(agent)


def test_hundreds_of_half_open_connections_keep_nobody_out(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(greeting.MAX_STRANGERS + 100):
            stranger = stack.enter_context(Stranger(agent))
            if number % 2:
                assert stranger.challenge()
        check_serves(agent)
        eventually(lambda: dropped(agent) >= 100, "the count of those turned away")
    eventually(lambda: dropped(agent) >= greeting.MAX_STRANGERS, "the count of those who hung up")


def test_a_stranger_who_says_nothing_is_sent_away(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_TIMEOUT", 0.05)
    with Stranger(agent) as stranger:
        refused(stranger, "timeout")


def test_a_stranger_who_leaves_within_the_greeting_leaves_nothing(
    agent: Agent, nothing_left: Callable[[], list[str]]
) -> None:
    held = len(nothing_left())
    for _ in range(20):
        with Stranger(agent) as stranger:
            stranger.say({"proof": stranger.proof(stranger.challenge(), SECRET), "probe": 0})
        with Stranger(agent) as stranger:
            stranger.say(stranger.hello())
    eventually(lambda: len(nothing_left()) <= held, "their descriptors to be closed")
    check_serves(agent)


def test_descriptors_passed_by_strangers_are_closed(agent: Agent, nothing_left: Callable[[], list[str]]) -> None:
    reader, writer = os.pipe()
    try:
        with Stranger(agent) as stranger:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer] * 4))
            stranger.sock.sendmsg([b"{}"], [rights])
            refused(stranger, "malformed")
        os.close(writer)
        writer = -1
        os.set_blocking(reader, False)
        assert os.read(reader, 1) == b""  # the end: nobody holds the other side open
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_an_agent_without_descriptors_left_recovers_when_there_are_some(agent: Agent) -> None:
    """The knock that cannot be answered is counted, not retried without a pause."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        stranger.settimeout(PATIENCE)
        stranger.connect(f"\0raynixl/{agent.incarnation}")
        eventually(lambda: agent.control.dropped["greeting: no descriptors"], "the count")
        count = agent.control.dropped["greeting: no descriptors"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
        stranger.close()
    assert count < 5
    check_serves(agent)


def test_a_peer_that_shows_a_foreign_word_is_not_read_by_process_vm(agent: Agent) -> None:
    """Its process id may mean another process by now: what lies there must say the peer's incarnation."""
    with Stranger(agent) as stranger:
        word = np.frombuffer(stranger.me.incarnation[::-1].encode(), np.uint8).copy()
        stranger.enter(SECRET, probe=int(word.ctypes.data))
        eventually(lambda: agent.connector.current("stranger"), "the link")
        link = agent.connector.current("stranger").link
        assert link.vm_refusal == "the process id means another process here"
    with Stranger(agent, name="other") as stranger:
        word = np.frombuffer(stranger.me.incarnation.encode(), np.uint8).copy()
        stranger.enter(SECRET, probe=int(word.ctypes.data))
        eventually(lambda: agent.connector.current("other"), "the link")
        assert agent.connector.current("other").link.vm_refusal == ""
    with Stranger(agent, name="third") as stranger:
        stranger.enter(SECRET, probe=8)  # not mapped
        eventually(lambda: agent.connector.current("third"), "the link")
        assert "errno" in agent.connector.current("third").link.vm_refusal


def test_errors_of_refused_peers_carry_a_remedy(agent: Agent) -> None:
    with make_agent("foreign", backends=("shm",)) as foreign:
        foreign.peer(agent.record())
        with pytest.raises(RaynixlError) as caught:
            foreign.notify("guarded", b"hello")
    assert "AgentConfig.secret" in caught.value.hint

"""Requests: asked, served and answered, with errors, threads, deadlines and lost peers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import pytest
from agent_process import far_agent
from agent_tools import MIB, PATIENCE, eventually, introduce, random_bytes

from raynixl import (
    Agent,
    AgentClosed,
    ConfigError,
    IntegrityError,
    PeerLost,
    RaynixlError,
    RegionUnknown,
    TransferTimeout,
)
from raynixl.agents import Inbox


def test_a_handler_answers_and_the_asker_may_wait_twice(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("upper", lambda peer, payload: peer.encode() + b":" + payload.upper(), threaded=False)
    reply = alice.ask("bob", "upper", b"text")
    assert reply.wait(PATIENCE) == b"alice:TEXT"
    assert reply.done
    assert reply.wait(0) == b"alice:TEXT"
    assert alice.peer("bob").ask("upper").wait() == b"alice:"


def test_many_requests_at_once_get_each_its_own_answer(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("same", lambda _peer, payload: payload, threaded=False)
    bob.serve("threaded", lambda _peer, payload: payload, threaded=True)
    for topic, count in (("same", 500), ("threaded", 50)):
        replies = [alice.ask("bob", topic, str(number).encode()) for number in range(count)]
        assert [int(reply.wait(PATIENCE)) for reply in reversed(replies)] == list(reversed(range(count)))


def test_large_requests_and_answers_travel(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("reverse", lambda _peer, payload: payload[::-1], threaded=False)
    payload = random_bytes(5 * MIB).tobytes()
    assert alice.ask("bob", "reverse", payload).wait(PATIENCE) == payload[::-1]


@pytest.mark.parametrize("threaded", [False, True])
def test_what_a_handler_raises_reaches_the_asker(
    pair: tuple[Agent, Agent], threaded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = pair

    def typed(_peer: str, _payload: bytes) -> bytes:
        raise IntegrityError("digest differs \ud800", hint="send it again")

    def untyped(_peer: str, _payload: bytes) -> bytes:
        raise ZeroDivisionError("by zero")

    bob.serve("typed", typed, threaded=threaded)
    bob.serve("untyped", untyped, threaded=threaded)
    bob.serve("text", lambda _peer, _payload: "text", threaded=threaded)  # type: ignore[arg-type,return-value]
    with pytest.raises(IntegrityError, match="digest differs") as found:
        alice.ask("bob", "typed").wait(PATIENCE)
    assert (found.value.hint, found.value.peer) == ("send it again", "bob")
    with caplog.at_level(logging.CRITICAL), pytest.raises(RaynixlError, match="ZeroDivisionError"):
        alice.ask("bob", "untyped").wait(PATIENCE)
    with pytest.raises(ConfigError, match="bytes, not str"):
        alice.ask("bob", "text").wait(PATIENCE)
    with pytest.raises(RegionUnknown, match="serves no") as unknown:
        alice.ask("bob", "nobody serves this").wait(PATIENCE)
    assert "agent.serve" in unknown.value.hint
    bob.serve("typed", lambda _peer, _payload: b"mended", threaded=threaded)
    assert alice.ask("bob", "typed").wait(PATIENCE) == b"mended"


def test_a_closed_agent_at_the_peer_does_not_look_like_ours(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair

    def closed(_peer: str, _payload: bytes) -> bytes:
        raise AgentClosed("agent 'bob' is closed", hint="make a new one")

    bob.serve("closed", closed)
    with pytest.raises(PeerLost, match="'bob' is closed") as found:
        alice.ask("bob", "closed").wait(PATIENCE)
    assert (found.value.hint, found.value.peer) == (PeerLost.remedy, "bob")


def test_a_threaded_handler_may_block_on_its_asker(pair: tuple[Agent, Agent]) -> None:
    """Each handler asks back before it answers, twice over."""
    alice, _ = pair

    def down(peer: str, payload: bytes, agent: Agent) -> bytes:
        depth = payload[0]
        return b"bottom" if depth == 0 else agent.ask(peer, "down", bytes([depth - 1])).wait(PATIENCE)

    for agent in pair:
        agent.serve("down", lambda peer, payload, agent=agent: down(peer, payload, agent), threaded=True)
    assert alice.ask("bob", "down", bytes([6])).wait(PATIENCE) == b"bottom"


def test_a_handler_may_wait_unless_it_was_to_run_on_the_polling_thread(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    alice.serve("back", lambda _peer, payload: payload)

    def ask_back(peer: str, payload: bytes) -> bytes:
        return bob.ask(peer, "back", payload).wait(PATIENCE)

    bob.serve("asks back", ask_back)
    assert alice.ask("bob", "asks back", b"there").wait(PATIENCE) == b"there"
    bob.serve("asks back", ask_back, threaded=False)
    with pytest.raises(ConfigError, match="must not wait") as found:
        alice.ask("bob", "asks back", b"there").wait(PATIENCE)
    assert "threaded=True" in found.value.hint


def test_letting_go_of_a_region_does_not_wait_for_busy_handlers(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    go_on = threading.Event()

    def block(_peer: str, _payload: bytes) -> bytes:
        go_on.wait(PATIENCE)
        return b""

    alice.serve("block", block, threaded=True)
    replies = [bob.ask("alice", "block") for _ in range(64)]
    eventually(lambda: alice.control._busy == 64, "every place is taken")
    with pytest.raises(TransferTimeout, match="overloaded"):
        bob.ask("alice", "block").wait(PATIENCE)
    region = bob.empty(64, name="far")
    alice.read(alice.peer("bob")["far"], alice.empty(64)).wait(PATIENCE)
    bob.deregister(region)
    assert alice.lost("bob") is None
    go_on.set()
    assert [reply.wait(PATIENCE) for reply in replies] == [b""] * 64


def test_a_wait_that_expires_leaves_the_request_standing(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    go_on = threading.Event()
    bob.serve("late", lambda _peer, _payload: b"late" if go_on.wait(PATIENCE) else b"", threaded=True)
    reply = alice.ask("bob", "late")
    with pytest.raises(TransferTimeout, match=r"0.01 s"):
        reply.wait(0.01)
    assert not reply.done
    go_on.set()
    assert reply.wait(PATIENCE) == b"late"


@pytest.mark.parametrize("awaited", [False, True])
def test_no_answer_by_the_deadline_is_a_timeout_and_a_late_one_is_dropped(
    pair: tuple[Agent, Agent], awaited: bool
) -> None:
    alice, bob = pair
    go_on = threading.Event()
    bob.serve("late", lambda _peer, _payload: b"late" if go_on.wait(PATIENCE) else b"", threaded=True)
    reply = alice.ask("bob", "late", timeout=0.05)

    async def wait() -> bytes:
        return await reply

    with pytest.raises(TransferTimeout, match=r"'late' within 0\.0"):
        asyncio.run(wait()) if awaited else reply.wait()
    assert reply.done
    go_on.set()
    eventually(lambda: alice.statistics().dropped.get("late reply") == 1, "the late answer is dropped", 5.0)
    with pytest.raises(TransferTimeout):
        reply.wait(0)


def test_a_peer_that_dies_ends_the_wait_for_its_answer(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",))
    with far_agent("bob") as far:
        alice.peer(far.record).connect()
        far.stop()
        reply = alice.ask("bob", "raynixl.record")
        far.kill()
        with pytest.raises(PeerLost):
            reply.wait(PATIENCE)
        with pytest.raises((PeerLost, RaynixlError)):
            alice.ask("bob", "raynixl.record").wait(PATIENCE)


def test_a_frozen_peer_ends_a_request_at_its_deadline(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",))
    with far_agent("bob") as far:
        alice.peer(far.record).connect()
        far.stop()
        with pytest.raises(TransferTimeout):
            alice.ask("bob", "raynixl.record", timeout=0.1).wait()


async def test_answers_are_awaited_by_many_coroutines(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("same", lambda _peer, payload: payload, threaded=False)

    async def ask(number: int) -> bytes:
        return await alice.ask("bob", "same", bytes([number]))

    assert await asyncio.gather(*(ask(number) for number in range(100))) == [bytes([n]) for n in range(100)]


def test_topics_of_the_agent_itself_cannot_be_taken_over(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("raynixl.bind", lambda _peer, _payload: b"stolen")
    mine, bobs = alice.register(random_bytes(64)), bob.empty(64)
    alice.write(mine, bobs.describe()).wait(PATIENCE)
    assert bobs.array().tolist() == mine.array().tolist()


def test_inboxes_keep_topics_and_order_apart(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    for number in range(300):
        alice.send("bob", f"topic {number % 3}", bytes([number // 3]))
    for topic in range(3):
        inbox = bob.inbox(f"topic {topic}")
        assert [inbox.wait(PATIENCE).payload[0] for _ in range(100)] == list(range(100))
        with pytest.raises(TransferTimeout, match=f"topic {topic}"):
            inbox.wait(0)


@pytest.mark.parametrize("awaited", [False, True])
def test_a_wait_for_a_message_ends_when_its_check_says_so(new_agent: Callable[..., Agent], awaited: bool) -> None:
    alice, bob = (new_agent(name, backends=("shm",)) for name in ("alice", "bob"))
    introduce(alice, bob)
    alice.send("bob", "topic", b"")
    inbox = bob.inbox("topic")
    inbox.wait(PATIENCE)
    timer = threading.Timer(0.05, alice.close)
    timer.start()
    with pytest.raises(PeerLost):
        _take(inbox, lambda: bob.lost("alice"), awaited)
    timer.join()


def _take(inbox: Inbox, check: Callable[[], RaynixlError | None], awaited: bool) -> object:
    if awaited:
        return asyncio.run(inbox.take(PATIENCE, check=check))
    return inbox.wait(PATIENCE, check=check)


def test_asking_a_closing_agent_does_not_hang(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    go_on = threading.Event()
    bob.serve("late", lambda _peer, _payload: b"late" if go_on.wait(PATIENCE) else b"", threaded=True)
    reply = alice.ask("bob", "late", timeout=PATIENCE * 3)
    timer = threading.Timer(0.05, alice.close)
    timer.start()
    with pytest.raises(AgentClosed):
        reply.wait()
    go_on.set()
    timer.join()

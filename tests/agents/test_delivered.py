"""Messages delivered to a function: each once and in order, also those that came before; its failures stop nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agent_scenes import naming
from agent_tools import MIB, PATIENCE, eventually, random_bytes
from window_tools import Couple

from raynixl import Agent, AgentClosed, ConfigError, PeerLost, RaynixlError


@pytest.fixture(params=["shm", "ucx"])
def couple(request: pytest.FixtureRequest, _leaves_nothing: None) -> Iterator[Couple]:
    """Two processes over one backend."""
    with Couple(str(request.param)) as couple:
        yield couple


def numbers(first: int, count: int) -> list[bytes]:
    """Payloads that tell their order."""
    return [str(number).encode() for number in range(first, first + count)]


class Heard:
    """Takes messages and remembers them."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, bytes]] = []

    def __call__(self, peer: str, payload: bytes) -> None:
        self.notes.append((peer, payload))

    def expect(self, payloads: list[bytes], peer: str = "alice") -> None:
        """Wait for these messages and no others."""
        eventually(lambda: len(self.notes) >= len(payloads), f"{len(payloads)} messages")
        assert self.notes == [(peer, payload) for payload in payloads]


def test_messages_go_to_the_function_and_not_to_an_inbox(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    heard = Heard()
    bob.deliver("lines", heard)
    for payload in numbers(0, 300):
        alice.send("bob", "lines", payload)
    alice.send("bob", "others", b"not this")
    heard.expect(numbers(0, 300))
    assert bob.inbox("others").wait(PATIENCE).payload == b"not this"
    large = random_bytes(3 * MIB).tobytes()
    alice.send("bob", "lines", large)
    alice.send("bob", "lines", b"")
    heard.expect([*numbers(0, 300), large, b""])


def test_what_came_before_is_handed_over_first(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    for payload in numbers(0, 50):
        alice.send("bob", "lines", payload)
    inbox = bob.inbox("lines")
    eventually(lambda: len(inbox) == 50, "messages in the inbox")
    assert inbox.wait(0).payload == b"0"
    heard = Heard()
    bob.deliver("lines", heard)
    heard.expect(numbers(1, 49))  # with none coming after them
    assert len(inbox) == 0
    alice.send("bob", "lines", b"50")
    heard.expect(numbers(1, 50))


def test_none_is_lost_or_overtaken_while_the_function_takes_the_inbox_s_place(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    for turn in range(20):
        topic = f"lines {turn}"
        sender = threading.Thread(target=lambda: [alice.send("bob", topic, one) for one in numbers(0, 200)])  # noqa: B023
        heard = Heard()
        sender.start()
        eventually(lambda: len(bob.inbox(topic)) > 5 * turn, "some messages")  # noqa: B023
        bob.deliver(topic, heard)
        sender.join(PATIENCE)
        heard.expect(numbers(0, 200))


def test_a_function_may_be_replaced_and_ended(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    first, second, third = Heard(), Heard(), Heard()
    bob.deliver("lines", first)
    alice.send("bob", "lines", b"1")
    first.expect([b"1"])
    bob.deliver("lines", second)
    alice.send("bob", "lines", b"2")
    second.expect([b"2"])
    bob.undeliver("lines")
    bob.undeliver("lines")
    bob.undeliver("never delivered")
    alice.send("bob", "lines", b"late")
    eventually(lambda: bob.statistics().dropped.get("closed topic") == 1, "a late message to be dropped")
    bob.deliver("lines", third)
    alice.send("bob", "lines", b"3")
    third.expect([b"3"])
    bob.undeliver("lines")
    inbox = bob.inbox("lines")
    alice.send("bob", "lines", b"4")
    assert inbox.wait(PATIENCE).payload == b"4"
    assert (first.notes, second.notes) == ([("alice", b"1")], [("alice", b"2")])


def test_what_a_function_raises_is_logged_and_counted_and_stops_nothing(
    pair: tuple[Agent, Agent], caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = pair
    heard = Heard()

    def fail(peer: str, payload: bytes) -> None:
        heard(peer, payload)
        if payload != b"good":
            raise RaynixlError("typed") if payload == b"typed" else ZeroDivisionError("untyped")

    for payload in (b"typed", b"untyped"):
        alice.send("bob", "lines", payload)
    eventually(lambda: len(bob.inbox("lines")) == 2, "messages in the inbox")
    with caplog.at_level(logging.ERROR):
        bob.deliver("lines", fail)
        for payload in (b"untyped", b"good"):
            alice.send("bob", "lines", payload)
        heard.expect([b"typed", b"untyped", b"untyped", b"good"])
    assert bob.statistics().dropped["receiver failed"] == 3
    assert len([one for one in caplog.records if "the receiver of 'lines' failed" in one.message]) == 3
    bob.serve("echo", lambda _peer, payload: payload, threaded=False)
    assert alice.ask("bob", "echo", b"well").wait(PATIENCE) == b"well"


def test_a_function_may_send_end_itself_and_pass_its_place_on(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    back, heard = Heard(), Heard()
    alice.deliver("back", back)

    def once(peer: str, payload: bytes) -> None:
        bob.send(peer, "back", b"re " + payload)
        if payload == b"0":
            bob.undeliver("lines")

    def passes_on(_peer: str, payload: bytes) -> None:
        if payload == b"1":
            bob.deliver("lines", heard)

    for payload in numbers(0, 3):
        alice.send("bob", "lines", payload)
    eventually(lambda: len(bob.inbox("lines")) == 3, "messages in the inbox")
    bob.deliver("lines", once)  # those behind the last that it wanted go with the topic
    back.expect([b"re 0"], peer="bob")
    alice.send("bob", "lines", b"dropped")
    eventually(lambda: bob.statistics().dropped.get("closed topic") == 1, "a late message to be dropped")
    bob.deliver("lines", passes_on)
    for payload in numbers(0, 4):
        alice.send("bob", "lines", payload)
    heard.expect(numbers(2, 2))


def test_once_a_function_is_ended_it_is_not_running(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    running, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def slow(_peer: str, _payload: bytes) -> None:
        running.set()
        go_on.wait(PATIENCE)
        over.set()

    bob.deliver("lines", slow)
    alice.send("bob", "lines", b"")
    assert running.wait(PATIENCE)
    threading.Timer(0.05, go_on.set).start()
    bob.undeliver("lines")
    assert over.is_set()


def test_nonsense_is_refused_and_changes_nothing(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    heard = Heard()
    bob.deliver("lines", heard)
    wrong: list[tuple[Any, Any]] = [
        ("lines", None),
        ("lines", "function"),
        ("", heard),
        (None, heard),
        ("x" * 70_000, heard),
    ]
    for topic, function in wrong:
        with naming(f"{topic!r:.20} {function!r:.20}"), pytest.raises(ConfigError):
            bob.deliver(topic, function)
    with pytest.raises(ConfigError, match="undeliver"):
        bob.inbox("lines")
    alice.send("bob", "lines", b"1")
    heard.expect([b"1"])
    bob.close()
    with pytest.raises(AgentClosed):
        bob.deliver("lines", heard)
    bob.undeliver("lines")


def test_an_agent_hears_itself(pair: tuple[Agent, Agent]) -> None:
    alice, _ = pair
    heard = Heard()
    alice.peer(alice.record())
    alice.deliver("lines", heard)
    alice.send("alice", "lines", b"me")
    heard.expect([b"me"])


def test_many_senders_are_each_heard_in_order(new_agent: Callable[..., Agent], backend: str) -> None:
    bob = new_agent("bob", backends=(backend,))
    heard = Heard()
    bob.deliver("lines", heard)
    senders = [new_agent(f"sender-{number}", backends=(backend,)) for number in range(4)]

    def send(agent: Agent) -> None:
        agent.peer(bob.record())
        for payload in numbers(0, 200):
            agent.send("bob", "lines", payload)

    threads = [threading.Thread(target=send, args=(agent,)) for agent in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    eventually(lambda: len(heard.notes) == 800, "all messages")
    for agent in senders:
        assert [payload for peer, payload in heard.notes if peer == agent.name] == numbers(0, 200)


def test_another_process_is_heard_in_order_from_before_and_after(couple: Couple) -> None:
    heard = Heard()
    couple.victim.ask("send", "near", "lines", numbers(0, 500))
    couple.near.deliver("lines", heard)
    couple.victim.ask("send", "near", "lines", numbers(500, 500))
    heard.expect(numbers(0, 1000), peer="victim")
    couple.near.undeliver("lines")
    couple.victim.ask("send", "near", "lines", [b"late"])
    eventually(lambda: couple.near.statistics().dropped.get("closed topic") == 1, "a late message to be dropped")


def test_a_frozen_killed_and_restarted_peer_is_heard_as_ever(couple: Couple) -> None:
    heard = Heard()
    couple.near.deliver("lines", heard)
    couple.victim.ask("send", "near", "lines", numbers(0, 10))
    heard.expect(numbers(0, 10), peer="victim")
    couple.stop()
    eventually(lambda: couple.near.lost("victim") is not None, "the frozen peer to be given up")
    couple.resume()
    probes = couple.near.inbox("probes")

    def is_heard_again() -> bool:
        """The peer hears a moment later than it goes on that it was given up."""
        with contextlib.suppress(PeerLost):
            couple.victim.ask("send", "near", "probes", [b"?"])
        return len(probes) > 0

    eventually(is_heard_again, "the peer to have connected again")
    couple.victim.ask("send", "near", "lines", numbers(10, 10))
    heard.expect(numbers(0, 20), peer="victim")
    couple.victim.vanish()
    eventually(lambda: couple.near.lost("victim") is not None, "the loss of the peer")
    couple.open(couple.victim, "victim")
    couple.victim.ask("send", "near", "lines", numbers(20, 10))
    heard.expect(numbers(0, 30), peer="victim")

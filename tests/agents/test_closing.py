"""Closing: what is in flight ends with typed errors, every wait ends, and nothing is left."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from agent_process import far_agent
from agent_tools import PATIENCE, error_of, eventually, introduce, make_agent, random_bytes

from raynixl import Agent, AgentClosed, ConfigError, PeerLost, RaynixlError, RegionStale, Transfer
from raynixl.directory import InMemoryDirectory

N = 4096
WORDS = 300_000


def slow(alice: Agent, bob: Agent) -> Transfer:
    """A read that takes about half a second: separate words over process_vm."""
    far = bob.register(np.ones(WORDS * 16, np.uint8)).describe()
    near = alice.register(np.zeros(WORDS * 16, np.uint8))
    starts = np.arange(WORDS) * 16
    alice.read(far[:1], near[:1]).wait(PATIENCE)
    return alice.read(far.blocks(starts, 8), near.blocks(starts, 8))


def two(new_agent: Callable[..., Agent], **settings: object) -> tuple[Agent, Agent]:
    """Two agents over shm whose copies all go to the engine's threads."""
    alice, bob = (new_agent(name, backends=("shm",), inline_nbytes=0, **settings) for name in ("alice", "bob"))
    introduce(alice, bob)
    return alice, bob


def test_closing_while_ours_runs_ends_it(new_agent: Callable[..., Agent]) -> None:
    alice, bob = two(new_agent)
    transfer = slow(alice, bob)
    assert not transfer.done
    alice.close()
    assert isinstance(error_of(transfer), AgentClosed)


def test_closing_waits_for_what_a_peer_has_in_flight(new_agent: Callable[..., Agent]) -> None:
    """After close the memory is the owner's alone: the peer's read has ended, well or not."""
    alice, bob = two(new_agent, deregister_timeout=PATIENCE)
    transfer = slow(alice, bob)
    bob.close()
    transfer.wait(PATIENCE)
    assert isinstance(error_of(alice.read(*_again(transfer))), PeerLost)


def _again(transfer: Transfer) -> tuple[object, object]:
    plan = transfer._prepared
    return plan.remote[0], plan.local[0]  # type: ignore[return-value]


def test_closing_while_a_peer_is_being_connected_ends_what_waits(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",), connect_timeout=1.0)
    with far_agent("bob") as far:
        far.ask("region", name="far", nbytes=N)
        with make_agent("scout", backends=("shm",)) as scout:
            theirs = scout.peer(far.record)["far"]
        alice.peer(far.record)
        far.stop()
        mine = alice.register(random_bytes(N))
        transfers = [alice.write(mine, theirs) for _ in range(5)]
        alice.close()
        for transfer in transfers:
            assert isinstance(error_of(transfer), RaynixlError)
        far.resume()
        assert far.ask("values", name="far") == [0]


@pytest.mark.parametrize("threaded", [False, True])
def test_a_handler_may_close_its_agent(pair: tuple[Agent, Agent], threaded: bool) -> None:
    alice, bob = pair

    def leave(_peer: str, _payload: bytes) -> bytes:
        bob.close()
        return b"leaving"

    bob.serve("leave", leave, threaded=threaded)
    reply = alice.ask("bob", "leave")
    eventually(lambda: reply.done, "an answer or a loss")
    bob.close()  # waits for the close that is under way
    assert bob.is_closed
    assert not [thread for thread in threading.enumerate() if thread.name == "raynixl-bob"]


def test_closing_twice_at_once_closes_once_and_both_wait_for_it(pair: tuple[Agent, Agent]) -> None:
    _, bob = pair
    start = threading.Barrier(4)

    def close() -> None:
        start.wait(PATIENCE)
        bob.close()
        assert bob.reactor.is_closed

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)


def test_threads_that_wait_for_messages_hear_of_the_close(pair: tuple[Agent, Agent]) -> None:
    _, bob = pair
    errors: list[RaynixlError] = []

    def wait(take: Callable[[], object]) -> None:
        try:
            take()
        except RaynixlError as exc:
            errors.append(exc)

    takes = [lambda: bob.wait_notification(PATIENCE * 3)] * 3 + [lambda: bob.inbox("topic").wait(PATIENCE * 3)] * 3
    threads = [threading.Thread(target=wait, args=(take,)) for take in takes]
    for thread in threads:
        thread.start()
    time.sleep(0.05)  # so that some of them wait already; the others must hear of it too
    bob.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert [type(error) for error in errors] == [AgentClosed] * 6


async def test_coroutines_that_wait_hear_of_the_close(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    go_on = threading.Event()
    alice.serve("late", lambda _peer, _payload: b"late" if go_on.wait(PATIENCE) else b"", threaded=True)

    async def reply() -> bytes:
        return await bob.ask("alice", "late", timeout=PATIENCE * 3)

    waits = [
        asyncio.create_task(bob.next_notification(PATIENCE * 3)),
        asyncio.create_task(bob.inbox("topic").take(PATIENCE * 3)),
        asyncio.create_task(reply()),
    ]
    await asyncio.sleep(0.02)
    await asyncio.to_thread(bob.close)
    results = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), PATIENCE)
    assert [type(result) for result in results] == [AgentClosed] * 3
    go_on.set()


async def test_an_agent_is_a_context_manager_of_both_kinds(backend: str) -> None:
    with make_agent("alice", backends=(backend,)) as alice:
        async with make_agent("bob", backends=(backend,)) as bob:
            introduce(alice, bob)
            mine, bobs = alice.register(random_bytes(N)), bob.empty(N)
            await alice.write(mine, bobs.describe())
            assert np.array_equal(bobs.array(), mine.array())
        assert bob.is_closed
    assert alice.is_closed


async def test_leaving_an_async_agent_lets_its_own_loop_answer(backend: str) -> None:
    async with make_agent("alice", backends=(backend,)) as alice:
        wait = asyncio.create_task(alice.next_notification(PATIENCE * 3))
        await asyncio.sleep(0)
    with pytest.raises(AgentClosed):
        await asyncio.wait_for(wait, PATIENCE)


def test_posting_while_closing_never_hangs(new_agent: Callable[..., Agent]) -> None:
    """Threads post, ask, register and look up without pause while their agent is closed: each ends with an error."""
    for turn in range(5):
        alice, bob = (new_agent(f"{name} {turn}") for name in ("alice", "bob"))
        introduce(alice, bob)
        mine = alice.register(bytearray(N))
        theirs = bob.empty(N, name="far").describe()
        ended: list[BaseException] = []

        def use(act: Callable[[], object], ended: list[BaseException] = ended) -> None:
            try:
                while True:
                    act()
            except BaseException as exc:  # noqa: BLE001 - told to the test
                ended.append(exc)

        acts: list[Callable[[], object]] = [
            lambda a=alice, m=mine, t=theirs: a.write(m, t).wait(PATIENCE),
            lambda a=alice, m=mine, t=theirs: a.write(m, t, notify=b"n").wait(PATIENCE),
            lambda a=alice, b=bob: a.ask(b.name, "raynixl.record").wait(PATIENCE),
            lambda a=alice: a.deregister(a.empty(N)),
            lambda a=alice, b=bob: a.peer(b.name)["far"],
        ]
        threads = [threading.Thread(target=use, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        time.sleep(0.02 * turn)
        alice.close()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(ended) == len(acts)
        assert all(isinstance(error, AgentClosed | PeerLost | RegionStale) for error in ended), ended


def test_closing_does_not_wait_for_a_frozen_peer(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",), deregister_timeout=PATIENCE)
    with far_agent("bob") as far:
        alice.peer(far.record).connect()
        region = alice.empty(N)
        connection = alice.connector.current("bob")
        assert connection is not None
        alice.regions.add_importer(region.id, connection.link)
        far.stop()
        began = time.monotonic()
        alice.close()
        assert time.monotonic() - began < PATIENCE / 2


def test_an_agent_that_cannot_be_made_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="pigeon"):
        make_agent("alice", backends=("shm", "pigeon"))
    directory = InMemoryDirectory()
    with make_agent("alice", directory=directory), pytest.raises(ConfigError, match="taken"):
        make_agent("alice", directory=directory)


def test_closing_does_not_wait_for_a_handler_that_waits_for_the_closer(
    new_agent: Callable[..., Agent], backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = (new_agent(name, backends=(backend,), deregister_timeout=0.1) for name in ("alice", "bob"))
    introduce(alice, bob)
    inside, held = threading.Event(), threading.Lock()

    def want_the_lock(_peer: str, _payload: bytes) -> bytes:
        inside.set()
        with held:
            return b""

    bob.serve("lock", want_the_lock, threaded=False)
    with held:
        alice.ask("bob", "lock")
        assert inside.wait(PATIENCE)
        with caplog.at_level(logging.ERROR):
            bob.close()
        assert "want_the_lock" in caplog.text
    bob.reactor._thread.join(PATIENCE)
    eventually(lambda: not bob.reactor._are_bells_open, "the handler's thread lets go")

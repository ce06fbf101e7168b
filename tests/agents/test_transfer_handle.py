"""The handle of a transfer: done, wait that expires and goes on, await, cancel, statistics, error, deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from agent_process import FarAgent, far_agent
from agent_tools import MIB, PATIENCE, error_of, eventually, random_bytes

from raynixl import Agent, ConfigError, RemoteRegion, Transfer, TransferCancelled, TransferTimeout
from raynixl.agents.transfer import Stage

N = 4096


@pytest.fixture
def alice(new_agent: Callable[..., Agent]) -> Agent:
    """The agent that posts."""
    return new_agent("alice", backends=("shm",))


@pytest.fixture
def far(alice: Agent) -> Iterator[FarAgent]:
    """Bob, in a process of his own, whom Alice has heard of but never met."""
    with far_agent("bob") as far:
        far.ask("region", name="far", nbytes=N)
        yield far


@pytest.fixture
def theirs(alice: Agent, far: FarAgent) -> RemoteRegion:
    """Bob's region, looked up by another agent, so that Alice has no connection yet; Bob is frozen now."""
    with Agent("scout", config=alice.config) as scout:
        region = scout.peer(far.record)["far"]
    alice.peer(far.record)
    far.stop()
    return region


def slow(alice: Agent, bob: Agent) -> Callable[[], Transfer]:
    """A read that takes about a second: half a million separate words over process_vm."""
    words = 500_000
    far = bob.register(np.ones(words * 16, np.uint8)).describe()
    near = alice.register(np.zeros(words * 16, np.uint8))
    starts = np.arange(words) * 16
    plan = alice.prepare("read", far.blocks(starts, 8), near.blocks(starts, 8))
    alice.read(far[:1], near[:1]).wait(PATIENCE)
    return plan.post


def test_done_after_the_end_and_wait_again_is_free(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    transfer = alice.write(alice.register(random_bytes(N)), bob.empty(N).describe())
    transfer.wait(PATIENCE)
    transfer.wait(0)
    transfer.wait()
    assert transfer.done
    assert transfer.error is None
    assert not transfer.cancel()
    assert "done" in repr(transfer)
    stats = transfer.stats
    assert (stats.peer, stats.nbytes, stats.blocks, stats.stage) == ("bob", N, 1, Stage.DONE)
    assert stats.backend in ("loopback", "shm")
    assert stats.seconds is not None
    assert 0 <= stats.seconds < PATIENCE


def test_posting_never_blocks_and_a_wait_that_expires_changes_nothing(
    alice: Agent, far: FarAgent, theirs: RemoteRegion
) -> None:
    mine = alice.register(random_bytes(N))
    transfer = alice.write(mine, theirs)
    assert not transfer.done
    for timeout in (0, 0.01, 0.05):
        with pytest.raises(TransferTimeout, match="connecting"):
            transfer.wait(timeout)
    with pytest.raises(ConfigError):
        transfer.wait(-1.0)
    assert not transfer.done
    assert transfer.error is None
    assert transfer.stats.stage is Stage.CONNECTING
    far.resume()
    transfer.wait(PATIENCE)
    assert far.ask("values", name="far") == sorted({int(value) for value in mine.array()})


def test_a_deadline_ends_a_transfer_with_a_frozen_peer(alice: Agent, far: FarAgent, theirs: RemoteRegion) -> None:
    transfer = alice.write(alice.register(random_bytes(N)), theirs, timeout=0.2)
    error = error_of(transfer)
    assert isinstance(error, TransferTimeout)
    assert "0.2 s" in error.message
    assert "connecting" in error.message
    assert alice.statistics().failures == 1


async def test_a_deadline_ends_a_transfer_that_is_awaited(alice: Agent, far: FarAgent, theirs: RemoteRegion) -> None:
    with pytest.raises(TransferTimeout):
        await alice.write(alice.register(random_bytes(N)), theirs, timeout=0.2)


def test_cancelled_before_it_was_connected_it_touches_no_memory(
    alice: Agent, far: FarAgent, theirs: RemoteRegion
) -> None:
    transfer = alice.write(alice.register(np.full(N, 7, np.uint8)), theirs)
    assert transfer.cancel()
    assert not transfer.cancel()
    assert isinstance(error_of(transfer), TransferCancelled)
    far.resume()
    eventually(
        lambda: not any(thread.name == "raynixl-connect" for thread in threading.enumerate()), "the connector rests"
    )
    assert far.ask("values", name="far") == [0]


def test_past_its_deadline_it_touches_no_memory(alice: Agent, far: FarAgent, theirs: RemoteRegion) -> None:
    transfer = alice.write(alice.register(np.full(N, 7, np.uint8)), theirs, timeout=0.1)
    assert isinstance(error_of(transfer), TransferTimeout)
    far.resume()
    alice.peer("bob").connect()
    eventually(
        lambda: not any(thread.name == "raynixl-connect" for thread in threading.enumerate()), "the connector rests"
    )
    assert far.ask("values", name="far") == [0]


def test_cancelled_while_it_copies_nothing_moves_afterwards(new_agent: Callable[..., Agent]) -> None:
    alice, bob = (new_agent(name, backends=("shm",), inline_nbytes=0) for name in ("alice", "bob"))
    alice.peer(bob.record())
    post = slow(alice, bob)
    transfer = post()
    assert transfer.stats.stage is Stage.COPYING
    assert transfer.cancel()
    memory = alice.regions.by_id(1).array()
    moved = int(memory.sum())
    assert isinstance(error_of(transfer), TransferCancelled)
    memory[:] = 0
    again = post()
    again.wait(PATIENCE)
    assert int(memory.sum()) == 4_000_000
    assert moved < 4_000_000


def test_a_wait_that_expires_while_it_copies_lets_it_go_on(new_agent: Callable[..., Agent]) -> None:
    alice, bob = (new_agent(name, backends=("shm",), inline_nbytes=0) for name in ("alice", "bob"))
    alice.peer(bob.record())
    transfer = slow(alice, bob)()
    with pytest.raises(TransferTimeout, match="copying"):
        transfer.wait(0)
    transfer.wait(PATIENCE)
    assert int(alice.regions.by_id(1).array().sum()) == 4_000_000


def test_a_deadline_ends_a_copy(new_agent: Callable[..., Agent]) -> None:
    alice, bob = (new_agent(name, backends=("shm",), inline_nbytes=0) for name in ("alice", "bob"))
    alice.peer(bob.record())
    slow(alice, bob)
    plan = alice.prepare("read", bob.regions.by_id(1).describe(), alice.regions.by_id(1))
    words = np.arange(500_000) * 16
    plan = alice.prepare(
        "read", bob.regions.by_id(1).describe().blocks(words, 8), alice.regions.by_id(1).blocks(words, 8)
    )
    error = error_of(plan.post(timeout=0.002))
    assert isinstance(error, TransferTimeout)
    assert "undefined" in error.hint
    plan.post().wait(PATIENCE)


def test_an_awaited_transfer_ends_soon_after_its_peer_is_connected(
    alice: Agent, far: FarAgent, theirs: RemoteRegion
) -> None:
    """The engine's job is made after the await began: whoever awaits must hear of its end all the same."""
    far.resume()
    far.ask("region", name="large", nbytes=48 * MIB)
    with Agent("scout", config=alice.config) as scout:
        large = scout.peer(far.record)["large"]
    far.stop()
    mine = alice.register(np.full(48 * MIB, 3, np.uint8))
    transfer = alice.write(mine, large, timeout=PATIENCE * 10)

    async def wait() -> float:
        asyncio.get_running_loop().call_later(0.05, far.resume)
        await asyncio.wait_for(transfer, PATIENCE)
        return time.monotonic()

    asyncio.run(wait())
    assert far.ask("values", name="large") == [3]


async def test_many_coroutines_await_one_transfer(alice: Agent, far: FarAgent, theirs: RemoteRegion) -> None:
    transfer = alice.write(alice.register(np.full(N, 5, np.uint8)), theirs)

    async def wait() -> None:
        await transfer

    waits = [asyncio.create_task(wait()) for _ in range(20)]
    dropped = [asyncio.create_task(wait()) for _ in range(20)]
    await asyncio.sleep(0)
    for task in dropped:
        task.cancel()
    assert not transfer.done
    far.resume()
    await asyncio.wait_for(asyncio.gather(*waits), PATIENCE)
    await asyncio.gather(*dropped, return_exceptions=True)
    assert all(task.cancelled() for task in dropped)
    await transfer
    assert far.ask("values", name="far") == [5]

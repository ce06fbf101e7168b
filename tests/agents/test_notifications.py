"""Notifications: behind the data of a transfer, alone, large, thousands in order, waited for and awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
from agent_process import far_agent
from agent_tools import MIB, PATIENCE, eventually, random_bytes

from raynixl import Agent, PeerLost, TransferTimeout

N = 4096


def test_a_notification_comes_after_its_data(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(np.zeros(N, np.uint8)), bob.empty(N, name="far")
    plan = alice.prepare("write", mine, alice.peer("bob")["far"])

    def write() -> None:
        for value in range(1, 201):
            mine.array()[:] = value
            plan.post(notify=bytes([value])).wait(PATIENCE)
            assert alice.wait_notification(PATIENCE).payload == b"next"

    writer = threading.Thread(target=write)
    writer.start()
    for value in range(1, 201):
        note = bob.wait_notification(PATIENCE)
        assert (note.peer, note.payload) == ("alice", bytes([value]))
        assert bobs.array()[0] == bobs.array()[-1] == value
        bob.notify("alice", b"next")
    writer.join(PATIENCE)
    assert not writer.is_alive()


def test_a_large_copy_is_there_before_its_notification(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(random_bytes(24 * MIB)), bob.empty(24 * MIB, name="far")
    alice.write(mine, alice.peer("bob")["far"], notify=b"landed")
    assert bob.wait_notification(PATIENCE).payload == b"landed"
    assert np.array_equal(bobs.array(), mine.array())


@pytest.mark.parametrize("nbytes", [0, 1, 59_999, 60_000, 60_001, 12 * MIB])
def test_notifications_of_any_size_travel_alone(pair: tuple[Agent, Agent], nbytes: int) -> None:
    alice, bob = pair
    payload = random_bytes(nbytes).tobytes()
    alice.notify("bob", payload)
    assert bob.wait_notification(PATIENCE).payload == payload


def test_thousands_of_notifications_keep_their_order(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    count = 5000
    for number in range(count):
        alice.notify("bob", number.to_bytes(4, "big") + b"x" * (number % 97))
    eventually(lambda: len(bob.control.notifications) == count, "all came")
    assert [int.from_bytes(note.payload[:4], "big") for note in bob.notifications()] == list(range(count))
    assert bob.notifications() == []
    assert alice.statistics().notifications_sent == count
    assert bob.statistics().notifications_received == count


@pytest.mark.parametrize("awaited", [False, True])
def test_a_transfer_whose_large_notification_waits_for_a_slow_peer_ends_when_it_has_left(
    new_agent: Callable[..., Agent], awaited: bool
) -> None:
    """The peer stands still while its socket fills: the transfer ends when it reads on, not at its deadline."""
    alice = new_agent("alice", backends=("shm",), transfer_timeout=PATIENCE * 6)
    with far_agent("bob") as far:
        alice.peer(far.record)
        far.ask("region", name="far", nbytes=N)
        plan = alice.prepare("write", alice.register(random_bytes(N)), alice.peer("bob")["far"])
        plan.post().wait(PATIENCE)
        far.stop()
        transfer = plan.post(notify=b"n" * (8 * MIB))
        assert not transfer.done

        async def wait() -> None:
            asyncio.get_running_loop().call_later(0.05, far.resume)
            await asyncio.wait_for(transfer, PATIENCE)

        if awaited:
            asyncio.run(wait())
        else:
            timer = threading.Timer(0.05, far.resume)
            timer.start()
            transfer.wait(PATIENCE)
            timer.join()
        assert [len(note) for note in _notes(far)] == [8 * MIB]


def _accepts(alice: Agent, payload: bytes) -> bool:
    try:
        alice.notify("bob", payload)
    except PeerLost as exc:
        if "does not read" not in exc.message:
            raise
        return False
    return True


def _notes(far: object) -> list[str]:
    found: list[str] = []

    def look() -> bool:
        found.extend(far.ask("notes"))  # type: ignore[attr-defined]
        return bool(found)

    eventually(look, "the notification came")
    return found


def test_what_a_slow_peer_was_not_sent_is_refused_whole(new_agent: Callable[..., Agent]) -> None:
    """A message is taken by the link or refused, never cut: what was accepted arrives complete."""
    limit = 1 << 20
    alice = new_agent("alice", backends=("shm",), max_message_nbytes=limit)
    with far_agent("bob", max_message_nbytes=limit) as far:
        alice.peer(far.record).connect()
        far.stop()
        accepted = 0
        while _accepts(alice, bytes([65 + accepted]) * 500_000):
            accepted += 1
        far.resume()
        found: list[str] = []
        eventually(lambda: found.extend(far.ask("notes")) or len(found) == accepted, "all that was accepted came")
        assert [(note[0], len(note)) for note in found] == [(chr(65 + i), 500_000) for i in range(accepted)]
        alice.notify("bob", b"z" * 500_000)
        assert [len(note) for note in _notes(far)] == [500_000]


def test_a_notification_of_a_transfer_to_a_lost_peer_is_an_error(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",))
    with far_agent("bob") as far:
        alice.peer(far.record)
        far.ask("region", name="far", nbytes=N)
        plan = alice.prepare("write", alice.register(random_bytes(N)), alice.peer("bob")["far"])
        plan.post().wait(PATIENCE)
        far.stop()
        transfer = plan.post(notify=b"n" * (8 * MIB))
        far.kill()
        with pytest.raises(PeerLost):
            transfer.wait(PATIENCE)
        with pytest.raises(PeerLost):
            alice.notify("bob", b"")


async def test_awaited_notifications_come_to_whoever_takes_them_once_each(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    takers = [asyncio.create_task(bob.next_notification(PATIENCE)) for _ in range(50)]
    await asyncio.sleep(0)
    for number in range(50):
        await asyncio.to_thread(alice.notify, "bob", bytes([number]))
    notes = await asyncio.gather(*takers)
    assert sorted(note.payload[0] for note in notes) == list(range(50))
    with pytest.raises(TransferTimeout):
        await bob.next_notification(0.01)


def test_threads_that_wait_take_each_notification_once(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    taken: list[int] = []

    def take() -> None:
        taken.extend(bob.wait_notification(PATIENCE).payload[0] for _ in range(25))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(200):
        alice.notify("bob", bytes([number]))
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(taken) == list(range(200))


async def test_waiting_in_vain_keeps_nothing(pair: tuple[Agent, Agent]) -> None:
    _, bob = pair
    for _ in range(200):
        with pytest.raises(TransferTimeout):
            await bob.next_notification(0.0)
    assert len(bob.control.notifications._waiters) == 0


def test_a_peer_is_named_by_its_name_or_by_itself(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.serve("same", lambda _peer, payload: payload)
    peer = alice.peer("bob")
    alice.notify(peer, b"by itself")
    peer.notify(b"its own", timeout=PATIENCE)
    assert [bob.wait_notification(PATIENCE).payload for _ in range(2)] == [b"by itself", b"its own"]
    alice.send(peer, "topic", b"sent")
    assert bob.inbox("topic").wait(PATIENCE).payload == b"sent"
    assert alice.ask(peer, "same", b"asked").wait(PATIENCE) == b"asked"
    assert alice.lost(peer) is None
    bob.close()
    eventually(lambda: alice.lost(peer), "the loss")


def test_looking_at_a_peer_does_not_connect_it(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    peer = alice.peer("bob")
    assert (peer.incarnation, peer.is_connected) == ("", False)
    assert "not connected" in repr(peer)
    assert alice.connector.current("bob") is None
    assert peer.connect(PATIENCE) == bob.incarnation
    assert (peer.incarnation, peer.is_connected) == (bob.incarnation, True)
    bob.close()
    eventually(lambda: not peer.incarnation, "the loss")

"""A slot is given out only when nobody uses it, and tensors keep the memory that they view."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from agent_tools import eventually, introduce, make_agent
from moe_pools import NBYTES, floats

from raynixl.errors import AgentClosed, RangeError
from raynixl.moe import pool as pools
from raynixl.moe.pool import Pool

pytestmark = pytest.mark.pure


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_new_slot_is_registered_zeroed_memory_of_the_size_asked_for(pool):
    small, large = pool.take(), pool.take(NBYTES * 3 + 1)
    assert small.nbytes == NBYTES
    assert NBYTES * 3 < large.nbytes <= NBYTES * 4
    assert small.region.is_registered
    assert small.region.memory.address == small.address
    assert not small.bytes.any()
    assert pool.find(small.number) is small
    assert pool.find(99) is None


def test_a_slot_is_not_given_out_while_its_taker_keeps_it(pool):
    first = pool.take()
    second = pool.take()
    assert first is not second
    pool.put_back(first)
    assert pool.take() is first


def test_a_slot_is_not_given_out_while_a_rank_that_was_told_of_it_has_not_answered(pool):
    slot = pool.take()
    pool.announce(slot, 0b101)
    pool.put_back(slot)
    pool.answered(slot, 1 << 0)
    assert pool.take() is not slot
    assert pool.quarantined == (slot,)
    pool.answered(slot, 1 << 2)
    assert pool.quarantined == ()
    assert pool.take() is slot


def test_ranks_that_are_told_later_are_waited_for_too(pool):
    slot = pool.take()
    pool.announce(slot, 0b01)
    pool.answered(slot, 1 << 0)
    pool.announce(slot, 0b10)
    pool.put_back(slot)
    assert slot.writers == 0b10
    assert not slot.is_free
    pool.answered(slot, 1 << 1)
    pool.answered(slot, 1 << 1)
    assert slot.is_free


def test_a_rank_that_is_gone_is_waited_for_in_no_slot(pool):
    slots = [pool.take() for _ in range(3)]
    for slot in slots:
        pool.announce(slot, 1 << 70 | 0b10)
        pool.put_back(slot)
    pool.gone(70)
    assert len(pool.quarantined) == 3
    pool.gone(1)
    assert pool.quarantined == ()
    assert {pool.take() for _ in range(3)} == set(slots)


def test_who_has_not_taken_a_slot_neither_announces_nor_leases_it(pool):
    slot = pool.take()
    pool.put_back(slot)
    with pytest.raises(AssertionError):
        pool.lease(slot)
    with pytest.raises(AssertionError):
        pool.announce(slot, 1)
    assert pool.take() is slot


def test_a_slot_that_does_is_preferred_to_a_larger_one_and_a_warm_one_to_one_unused_for_long(pool):
    large, cold, warm = pool.take(4 * NBYTES), pool.take(), pool.take()
    for slot in (cold, warm, large):
        pool.put_back(slot)
    assert pool.take() is warm
    assert pool.take() is cold
    assert pool.take(2 * NBYTES) is large


def test_slots_are_let_go_of_once_they_were_free_for_long_and_for_many_turns(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TURNS", 20)
    clock = Clock()
    pool = Pool(agent, NBYTES, clock=clock)
    burst = [pool.take() for _ in range(5)]
    told, last = burst[0], burst[4]
    pool.announce(told, 1)
    for slot in burst:
        pool.put_back(slot)
    clock.now += 2 * pools.KEEP_SECONDS
    for _ in range(8):
        pool.put_back(pool.take())
    assert len(pool) == 5, "few turns after a pause let go of nothing"
    for _ in range(8):
        pool.put_back(pool.take())
    assert set(pool.slots) == {told, last}
    eventually(lambda: not any(slot.region.is_registered for slot in burst[1:4]), "they are withdrawn")
    assert told.region.is_registered
    pool.close()


def test_a_slot_that_was_leased_for_long_is_kept_from_then_on(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TURNS", 4)
    clock = Clock()
    pool = Pool(agent, NBYTES, clock=clock)
    slot, other = pool.take(), pool.take()
    x = floats(pool, slot)
    pool.put_back(other)
    clock.now += 2 * pools.KEEP_SECONDS
    for _ in range(8):
        pool.put_back(pool.take())
    del x
    pool.put_back(pool.take())
    assert len(pool) == 2
    pool.close()


def test_a_burst_within_a_minute_is_kept(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TURNS", 8)
    pool = Pool(agent, NBYTES, clock=Clock())
    for slot in [pool.take() for _ in range(5)]:
        pool.put_back(slot)
    for _ in range(50):
        pool.put_back(pool.take())
    assert len(pool) == 5
    pool.close()


def test_numbers_are_never_used_again(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TURNS", 0)
    clock = Clock()
    pool = Pool(agent, NBYTES, clock=clock)
    seen = []
    for _ in range(5):
        one, other = pool.take(), pool.take()
        seen += [one.number, other.number]
        pool.put_back(one)
        pool.put_back(other)
        clock.now += 2 * pools.KEEP_SECONDS
        pool.put_back(pool.take())
    assert len(set(seen)) == 6
    pool.close()


def test_a_pool_may_be_closed_twice_and_after_its_agent(nothing_left):
    agent = make_agent("owner", backends=("loopback", "shm"))
    pool = Pool(agent, NBYTES)
    slot = pool.take()
    agent.close()
    pool.close()
    pool.close()
    pool.put_back(slot)
    with pytest.raises(AgentClosed):
        pool.take()


def test_a_peer_that_maps_a_slot_lets_go_of_it_with_the_pool(agent, nothing_left):
    peer = make_agent("peer", backends=("loopback", "shm"))
    introduce(agent, peer)
    pool = Pool(agent, NBYTES)
    slot = pool.take()
    source = peer.register(np.full(64, 5, np.uint8))
    peer.write(source, slot.region.describe()[0:64]).wait(10)
    x = pool.lease(slot).tensor(torch.uint8, (64,))
    assert (x == 5).all()
    pool.close()
    assert not slot.region.is_registered
    assert (x == 5).all()
    peer.close()


def test_what_holds_many_slots_is_logged_once_at_each_doubling(pool, caplog):
    with caplog.at_level(logging.WARNING, "raynixl.moe.pool"):
        tensors = [floats(pool, pool.take()) for _ in range(15)]
        assert not caplog.records
        told = pool.take()
        pool.announce(told, 0b1000)
        assert "16 slots" in caplog.text
        assert "15 held by tensors" in caplog.text
        tensors += [floats(pool, pool.take()) for _ in range(20)]
    assert [record.getMessage().split(" slots")[0].split()[-1] for record in caplog.records] == ["16", "32"]
    assert "rank 3 may write into 1" in caplog.text
    del tensors
    assert len([slot for slot in pool.slots if slot.is_free]) == 35


def test_without_memory_what_is_free_is_let_go_of_and_then_said_what_holds_the_rest(pool, agent, monkeypatch):
    free, held = pool.take(), pool.take()
    pool.put_back(free)
    x = floats(pool, held)
    attempts = []

    def empty(nbytes, **_):
        attempts.append(len(pool))
        raise RangeError("cannot allocate", hint="ask for less")

    monkeypatch.setattr(type(agent), "empty", lambda _, nbytes, **rest: empty(nbytes, **rest))
    with pytest.raises(RangeError, match=r"1 held by tensors.*drop results"):
        pool.take(10 * NBYTES)
    assert attempts == [2, 1]
    assert not free.region.is_registered
    assert x.sum() == 0


def test_a_pool_that_is_closed_while_a_slot_is_made_does_not_keep_it(pool, agent, monkeypatch):
    made = []
    empty = type(agent).empty

    def late(self, nbytes, **rest):
        made.append(empty(self, nbytes, **rest))
        pool.close()
        return made[-1]

    monkeypatch.setattr(type(agent), "empty", late)
    with pytest.raises(AgentClosed):
        pool.take()
    assert not made[0].is_registered

"""A slot is given out only when nobody uses it, and tensors keep the memory that they view."""

from __future__ import annotations

import gc
import logging
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from agent_tools import eventually, introduce, make_agent

from raynixl.errors import AgentClosed, RangeError
from raynixl.moe import pool as pools
from raynixl.moe.pool import Pool

NBYTES = 8192


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def agent(nothing_left):
    one = make_agent("owner", backends=("loopback", "shm"))
    yield one
    one.close()


@pytest.fixture
def pool(agent):
    one = Pool(agent, NBYTES, "test")
    yield one
    one.close()


def floats(pool, slot, count=4):
    return pool.lease(slot).tensor(torch.float32, (count,))


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
    pool.answered(slot, 0)
    assert pool.take() is not slot
    assert pool.quarantined == (slot,)
    pool.answered(slot, 2)
    assert pool.quarantined == ()
    assert pool.take() is slot


def test_ranks_that_are_told_later_are_waited_for_too(pool):
    slot = pool.take()
    pool.announce(slot, 0b01)
    pool.answered(slot, 0)
    pool.announce(slot, 0b10)
    pool.put_back(slot)
    assert slot.writers == 0b10
    assert not slot.is_free
    pool.answered(slot, 1)
    pool.answered(slot, 1)
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


@pytest.mark.parametrize(
    "derive",
    [
        lambda t: t,
        lambda t: t[1:2],
        lambda t: t.numpy(),
        lambda t: t.numpy()[::2],
        lambda t: t.detach(),
        lambda t: memoryview(t.numpy()),
        lambda t: torch.from_dlpack(t),
        lambda t: t.untyped_storage(),
        lambda t: (torch.ones(4, requires_grad=True) * t).sum(),
        lambda t: [t.view(2, 2).t()],
    ],
    ids="itself slice numpy numpy-view detached memoryview dlpack storage autograd transposed".split(),
)
def test_whatever_views_the_memory_keeps_the_lease(pool, derive):
    slot = pool.take()
    kept = derive(floats(pool, slot))
    other = pool.take()
    assert other is not slot
    assert slot.is_leased
    del kept
    assert pool.take() is slot


def test_the_lease_itself_keeps_the_slot_until_its_tensors_are_made(pool):
    slot = pool.take()
    lease = pool.lease(slot)
    first = lease.tensor(torch.float32, (4,))
    del first
    assert pool.take() is not slot
    del lease
    assert pool.take() is slot


def test_a_leased_slot_waits_for_ranks_that_may_still_write_into_it(pool):
    slot = pool.take()
    pool.announce(slot, 0b1)
    del_me = floats(pool, slot)
    assert pool.quarantined == ()
    del del_me
    assert pool.quarantined == (slot,)
    pool.gone(0)
    assert pool.take() is slot


def test_tensors_in_a_cycle_end_with_the_garbage_collection(pool):
    slot = pool.take()
    cycle = [floats(pool, slot)]
    cycle.append(cycle)
    del cycle
    assert pool.take() is not slot
    gc.collect()
    assert pool.take() is slot


def test_the_gradient_of_a_leased_tensor_is_right_after_many_more_steps(pool):
    slot = pool.take()
    weight = torch.arange(4.0, requires_grad=True)
    x = floats(pool, slot)
    x[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = (weight * x).sum()
    del x
    for _ in range(10):
        floats(pool, pool.take())[:] = 99.0
    loss.backward()
    assert weight.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool]
)
def test_tensors_of_every_dtype_lie_where_they_are_asked_for(pool, dtype):
    slot = pool.take()
    slot.bytes[:] = np.arange(NBYTES, dtype=np.int64).astype(np.uint8) & 1
    x = pool.lease(slot).tensor(dtype, (3, 5), 64)
    assert (x.dtype, x.shape, x.data_ptr()) == (dtype, (3, 5), slot.address + 64)
    assert x.is_contiguous()
    there = slot.bytes[64 : 64 + x.numel() * x.element_size()]
    assert x.view(torch.uint8).numpy().tobytes() == there.tobytes()


def test_tensors_without_elements_and_of_one_can_be_had(pool):
    lease = pool.lease(pool.take())
    assert lease.tensor(torch.bfloat16, (0, 7168)).shape == (0, 7168)
    assert lease.tensor(torch.float32, ()).shape == ()
    assert lease.tensor(torch.float32, (NBYTES // 4,)).shape == (NBYTES // 4,)


@pytest.mark.parametrize(
    ("shape", "offset"), [((NBYTES // 4 + 1,), 0), ((4,), NBYTES - 12), ((4,), -4), ((-1, 4), 0), ((4,), 2)]
)
def test_a_tensor_that_does_not_lie_in_the_slot_is_refused(pool, shape, offset):
    lease = pool.lease(pool.take())
    with pytest.raises(RangeError):
        lease.tensor(torch.float32, shape, offset)


def test_a_slot_that_does_is_preferred_to_a_larger_one_and_a_warm_one_to_one_unused_for_long(pool):
    large, cold, warm = pool.take(4 * NBYTES), pool.take(), pool.take()
    for slot in (cold, warm, large):
        pool.put_back(slot)
    assert pool.take() is warm
    assert pool.take() is cold
    assert pool.take(2 * NBYTES) is large


def test_slots_are_let_go_of_once_they_were_free_for_long_and_for_many_takes(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TAKES", 8)
    clock = Clock()
    pool = Pool(agent, NBYTES, clock=clock)
    burst = [pool.take() for _ in range(5)]
    told = burst[0]
    pool.announce(told, 1)
    for slot in burst:
        pool.put_back(slot)
    clock.now += 2 * pools.KEEP_SECONDS
    for _ in range(8):
        pool.put_back(pool.take())
    assert len(pool) == 5, "few takes after a pause let go of nothing"
    for _ in range(8):
        pool.put_back(pool.take())
    assert set(pool.slots) == {told, burst[4]}
    eventually(lambda: not any(slot.region.is_registered for slot in burst[1:4]), "they are withdrawn")
    assert told.region.is_registered
    pool.close()


def test_a_burst_within_a_minute_is_kept(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TAKES", 8)
    pool = Pool(agent, NBYTES, clock=Clock())
    for slot in [pool.take() for _ in range(5)]:
        pool.put_back(slot)
    for _ in range(50):
        pool.put_back(pool.take())
    assert len(pool) == 5
    pool.close()


def test_numbers_are_never_used_again(agent, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TAKES", 0)
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


def test_memory_lives_as_long_as_tensors_though_the_pool_and_the_agent_are_closed(nothing_left):
    agent = make_agent("owner", backends=("loopback", "shm"))
    pool = Pool(agent, NBYTES)
    x = floats(pool, pool.take())
    x[:] = 7.0
    pool.close()
    agent.close()
    del pool, agent
    gc.collect()
    assert x.tolist() == [7.0] * 4
    x[:] = 8.0
    assert x.sum() == 32.0
    assert nothing_left()
    del x
    assert nothing_left() == []


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
    with pytest.raises(RangeError, match="1 held by tensors.*drop results"):
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


def test_tensors_that_end_while_the_lock_is_held_hold_up_nothing(pool):
    slot = pool.take()
    x = floats(pool, slot)
    with pool._lock:
        del x
        gc.collect()
    assert pool.take() is slot


def test_tensors_that_end_in_other_threads_amid_takes_free_their_slots(pool):
    many = threading.Barrier(4)
    wrong = []

    def work(seed):
        many.wait(10)
        rng = np.random.default_rng(seed)
        held = []
        for step in range(400):
            slot = pool.take()
            mine = seed << 20 | step
            pool.announce(slot, 1 << seed)
            x = pool.lease(slot).tensor(torch.int32, (8,))
            x.fill_(mine)
            pool.answered(slot, seed)
            held.append((x, mine))
            if rng.random() < 0.5:
                y, expected = held.pop(int(rng.integers(len(held))))
                if not (y == expected).all():
                    wrong.append((seed, step))
        wrong.extend((seed, mine) for x, mine in held if not (x == mine).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert all(slot.is_free for slot in pool.slots)


def test_a_copy_of_a_leased_tensor_holds_no_slot(pool):
    slot = pool.take()
    copy = pickle.loads(pickle.dumps(floats(pool, slot)))
    assert pool.take() is slot
    assert copy.sum() == 0


def test_tensors_that_live_to_the_end_of_the_interpreter_are_no_error():
    script = """
import torch
from raynixl import Agent, AgentConfig
from raynixl.moe.pool import Pool
agent = Agent("owner", config=AgentConfig(backends=("loopback", "shm")))
pool = Pool(agent, 8192)
kept = [pool.lease(pool.take()).tensor(torch.float32, (4,)) for _ in range(3)]
cycle = [pool.lease(pool.take()).tensor(torch.float32, (4,))]
cycle.append(cycle)
pool.close()
more = Pool(agent, 8192)
left = more.lease(more.take()).tensor(torch.float32, (4,))
more.close()
agent.close()
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")

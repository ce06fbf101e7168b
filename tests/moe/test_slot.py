"""Tensors of a lease keep a slot, and its memory, wherever they and their views end."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from agent_tools import make_agent
from moe_pools import NBYTES, floats

from raynixl.errors import RangeError
from raynixl.moe.pool import Pool

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    "derive",
    [
        lambda t: t,
        lambda t: t[1:2],
        lambda t: t.numpy(),
        lambda t: t.numpy()[::2],
        lambda t: t.detach(),
        lambda t: memoryview(t.numpy()),
        torch.from_dlpack,
        lambda t: t.untyped_storage(),
        lambda t: (torch.ones(4, requires_grad=True) * t).sum(),
        lambda t: [t.view(2, 2).t()],
    ],
    ids=["itself", "slice", "numpy", "numpy-view", "detached", "memoryview", "dlpack", "storage", "autograd", "list"],
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
            pool.answered(slot, 1 << seed)
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

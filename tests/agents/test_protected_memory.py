"""Memory that is not what its owner says, and memory that somebody may still write."""

from __future__ import annotations

import ctypes
import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent, far_agent
from agent_tools import PATIENCE, eventually

from raynixl import Agent, MemorySpan, RegionReadOnly
from raynixl.memory import is_writable

PAGE = mmap.PAGESIZE


@pytest.fixture
def protected() -> Iterator[tuple[int, Callable[[], bytes]]]:
    """The address of two pages of which the second may not be written, and how to look at them."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    memory = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(address + PAGE, PAGE, mmap.PROT_READ) == 0
    yield address, lambda: ctypes.string_at(address, 2 * PAGE)
    assert libc.mprotect(address + PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_the_kernel_is_asked_what_may_be_written(protected: tuple[int, Any]) -> None:
    address, _ = protected
    assert is_writable(address, PAGE)
    assert not is_writable(address + PAGE, 8)
    assert not is_writable(address, 2 * PAGE)
    assert not is_writable(address, PAGE + 1)


@pytest.mark.parametrize("nbytes", [8, PAGE, PAGE + 8])
def test_protected_memory_is_a_source_and_no_destination_whatever_is_said_of_it(
    new_agent: Callable[..., Agent], protected: tuple[int, Callable[[], bytes]], nbytes: int
) -> None:
    address, look = protected
    alice, bob = new_agent("alice", backends=("shm",)), new_agent("bob", backends=("shm",))
    start = address + PAGE if nbytes <= PAGE else address
    theirs = bob.register(MemorySpan(start, nbytes), name="protected")
    mine = alice.register(np.ones(nbytes, np.uint8))
    assert not theirs.memory.writable
    with pytest.raises(RegionReadOnly):
        alice.write(mine, alice.peer(bob.record())["protected"])
    alice.read(alice.peer("bob")["protected"], mine).wait(PATIENCE)
    assert not mine.array().any()
    assert not any(look())


def lent(agent: Agent, far: FarAgent) -> weakref.ref[np.ndarray]:
    """Register an array that nobody else holds, and have the far agent read it; return a weak reference to it."""
    array = np.ones(1000, np.uint8)
    agent.register(array, name="lent")
    assert far.ask("read", record=agent.record().decode(), region="lent") == 1000
    return weakref.ref(array)


def withdraw(agent: Agent, array: weakref.ref[np.ndarray]) -> bool:
    """Deregister the array; say whether it lives on."""
    agent.deregister(agent.regions.by_name("lent"))
    gc.collect()
    return array() is not None


def test_what_a_healthy_peer_has_used_is_let_go_at_once(new_agent: Callable[..., Agent]) -> None:
    agent = new_agent("owner", backends=("shm",))
    with far_agent("far") as far:
        assert not withdraw(agent, lent(agent, far))


@pytest.mark.parametrize("is_given_up", [False, True])
def test_what_a_frozen_process_may_still_write_is_kept_until_it_has_ended(
    new_agent: Callable[..., Agent], is_given_up: bool
) -> None:
    settings = {"heartbeat_interval": 0.05, "heartbeat_timeout": 0.2} if is_given_up else {}
    agent = new_agent("owner", backends=("shm",), deregister_timeout=0.2, **settings)
    with far_agent("far") as far:
        array = lent(agent, far)
        far.stop()
        if is_given_up:
            eventually(lambda: agent.lost("far"), "the frozen one is given up")
        assert withdraw(agent, array)
        far.kill()
        eventually(lambda: array() is None, "the array is let go")


def test_closing_keeps_it_too(new_agent: Callable[..., Agent]) -> None:
    agent = new_agent("owner", backends=("shm",), deregister_timeout=0.2)
    with far_agent("far") as far:
        array = lent(agent, far)
        far.stop()
        agent.close()
        gc.collect()
        assert array() is not None
        far.kill()
        eventually(lambda: array() is None, "the array is let go")

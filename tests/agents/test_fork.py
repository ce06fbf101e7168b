"""A forked child must not use its parent's agent, and does it no harm."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import numpy as np
from agent_tools import MIB, PATIENCE, eventually, random_bytes

from raynixl import Agent, AgentClosed


def in_child(action: Callable[[], bool]) -> int:
    """Fork, act in the child, and return its exit code: 0 if the action returned True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks among threads: we mean it
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if action() else 2
        finally:
            os._exit(code)
    ended: list[int] = []

    def is_over() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append(os.waitstatus_to_exitcode(status))
        return bool(ended)

    try:
        eventually(is_over, "the child ends", 10.0)
    except AssertionError:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise
    return ended[0]


def test_a_child_is_refused_and_the_parent_goes_on(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, bobs = alice.register(random_bytes(9 * MIB)), bob.empty(9 * MIB, name="far")
    theirs = alice.peer("bob")["far"]
    large, small = alice.prepare("write", mine, theirs), alice.prepare("write", mine[:8], theirs[:8])
    for plan in (large, small):
        plan.post().wait(PATIENCE)
    bobs.array()[:] = 0
    actions = (
        large.post,
        small.post,
        lambda: small.post(notify=b"x"),
        lambda: alice.write(mine, theirs),
        lambda: alice.register(bytearray(8)),
        lambda: alice.empty(8),
        lambda: alice.peer("bob"),
        lambda: alice.peer("bob").connect(),
        lambda: alice.notify("bob", b""),
        lambda: alice.ask("bob", "x"),
        lambda: alice.deregister(mine),
    )

    def child() -> bool:
        for action in actions:
            try:
                action()
            except AgentClosed as exc:
                if "fork" not in exc.hint:
                    return False
            else:
                return False
        alice.close()
        bob.close()
        return True

    assert in_child(child) == 0
    assert not bobs.array().any()
    large.post().wait(PATIENCE)
    assert np.array_equal(bobs.array(), mine.array())
    bob.notify("alice", b"still here")
    assert alice.wait_notification(PATIENCE).payload == b"still here"


def test_a_child_makes_an_agent_of_its_own(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bobs = bob.empty(4096, name="far")
    record = bob.record()

    def child() -> bool:
        with Agent("child", config=alice.config.model_copy(update={"backends": ("shm",)})) as agent:
            mine = agent.register(np.full(4096, 9, np.uint8))
            if "shm" not in alice.config.backends:
                return True
            agent.write(mine, agent.peer(record)["far"], notify=b"from the child").wait(PATIENCE)
        return True

    assert in_child(child) == 0
    if "shm" in alice.config.backends:
        assert bob.wait_notification(PATIENCE).payload == b"from the child"
        assert (bobs.array() == 9).all()

"""What the user has set for UCX: respected, or named where it leaves nothing; nothing is written or loaded early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from agent_tools import PATIENCE, error_of, random_bytes
from lane_tools import config_for

from raynixl import Agent, AgentClosed, BackendUnavailable

N = 4096

Pair = Callable[..., tuple[Agent, Agent]]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, _leaves_nothing: None) -> Iterator[Pair]:
    """Make two agents that know each other, with options of UCX and variables of the environment."""
    with ExitStack() as stack:

        def make(options: dict[str, str], environment: dict[str, str]) -> tuple[Agent, Agent]:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            config = config_for("tcp", ucx=options)
            alice, bob = (stack.enter_context(Agent(name, config=config)) for name in ("alice", "bob"))
            bob.register(random_bytes(N), name="bobs")
            alice.peer(bob.record())
            return alice, bob

        yield make


@pytest.mark.parametrize(
    ("options", "environment", "named"),
    [
        ({}, {"UCX_TLS": "cma"}, "UCX_TLS=cma"),
        ({}, {"UCX_TLS": "nonsense"}, "UCX_TLS=nonsense"),
        ({"TLS": "nonsense"}, {}, "UCX_TLS=nonsense"),
        ({"TLS": "self"}, {"UCX_TLS": "tcp"}, "UCX_TLS=self"),
        ({"TLS": "tcp"}, {"UCX_NET_DEVICES": "bogus"}, "UCX_NET_DEVICES=bogus"),
        ({"TLS": "tcp", "NET_DEVICES": "bogus"}, {}, "UCX_NET_DEVICES=bogus"),
        ({"NO_SUCH_OPTION": "1"}, {}, "NO_SUCH_OPTION"),
        ({"RNDV_THRESH": "a lot"}, {}, "RNDV_THRESH"),
    ],
    ids=str,
)
def test_settings_that_leave_nothing_are_named(
    pair: Pair, options: dict[str, str], environment: dict[str, str], named: str
) -> None:
    alice, _ = pair(options, environment)
    error = error_of(alice.read(alice.peer("bob")["bobs"], alice.register(np.zeros(N, np.uint8))))
    assert isinstance(error, BackendUnavailable)
    assert named in str(error)


@pytest.mark.parametrize(
    ("options", "environment", "path"),
    [
        ({}, {"UCX_TLS": "tcp"}, "tcp"),
        ({}, {"UCX_TLS": "tcp,cma"}, "cma"),
        ({"TLS": "tcp"}, {"UCX_TLS": "cma,tcp"}, "tcp"),
    ],
    ids=str,
)
def test_settings_that_can_be_kept_are_kept_and_explained(
    pair: Pair, options: dict[str, str], environment: dict[str, str], path: str
) -> None:
    alice, _ = pair(options, environment)
    before = dict(os.environ)
    theirs, mine = alice.peer("bob")["bobs"], alice.register(np.zeros(N, np.uint8))
    alice.read(theirs, mine).wait(PATIENCE)
    assert np.array_equal(mine.array(), random_bytes(N))
    said = str(alice.explain(theirs, mine))
    assert path in said
    assert ("cma" in said) == (path == "cma")
    assert dict(os.environ) == before


FRESH = """
import os, sys
before = dict(os.environ)
import raynixl
from raynixl import Agent, AgentConfig
assert "ucxx" not in sys.modules
config = AgentConfig(backends=("ucx",), ucx={"TLS": "tcp"})
with Agent("a", config=config) as a, Agent("b", config=config) as b:
    assert "ucxx" not in sys.modules and "ucxx._lib" not in sys.modules
    theirs = b.register(bytearray(b"x" * 64), name="there") and a.peer(b.record())["there"]
    mine = a.register(bytearray(64))
    assert not [name for name in sys.modules if name.startswith("ucxx")], "loaded before it is needed"
    a.read(theirs, mine).wait(20)
    assert bytes(mine.array()) == b"x" * 64
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
print("fine")
"""


def test_ucx_is_loaded_at_its_first_use_and_writes_no_variable() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_a_forked_child_is_refused_and_the_parent_goes_on(pair: Pair) -> None:
    alice, bob = pair({"TLS": "cma,tcp"}, {})
    theirs, mine = alice.peer("bob")["bobs"], alice.register(np.zeros(N, np.uint8))
    read = alice.prepare("read", theirs, mine)
    read.post().wait(PATIENCE)

    def child() -> None:
        for action in (read.post, lambda: alice.read(theirs, mine), lambda: alice.deregister(mine)):
            try:
                action()
            except AgentClosed:
                continue
            os._exit(1)
        alice.close()
        bob.close()
        with Agent("child", config=config_for("tcp")) as agent:
            agent.register(bytearray(8))
        os._exit(0)

    assert exit_code_of(child) == 0
    mine.array()[:] = 0
    read.post().wait(PATIENCE)
    assert np.array_equal(mine.array(), random_bytes(N))


def exit_code_of(child: Callable[[], Any]) -> int:
    """Fork, act in the child and return its exit code."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks among threads: we mean it
        pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

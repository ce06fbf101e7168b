"""Agents, patience and memory for the tests in tests/agents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raynixl import Agent, AgentConfig, RaynixlError, Transfer
from raynixl.config import from_env
from raynixl.directory import Directory

KIB, MIB = 1 << 10, 1 << 20
PATIENCE = 20.0


def make_config(**settings: Any) -> AgentConfig:
    """A configuration for tests: deadlines short enough to be waited for, RAYNIXL_* variables respected."""
    base: dict[str, Any] = {
        "copy_threads": 2, "transfer_timeout": 15.0, "connect_timeout": 8.0, "request_timeout": 8.0,
        "deregister_timeout": 3.0,
    }  # fmt: skip
    return from_env(AgentConfig(**(base | settings)))


def make_agent(name: str, *, directory: Directory | None = None, **settings: Any) -> Agent:
    """An agent configured for tests."""
    return Agent(name, config=make_config(**settings), directory=directory)


def introduce(*agents: Agent) -> None:
    """Make every agent known to every other by the bytes of its record."""
    for one in agents:
        for other in agents:
            if one is not other:
                one.peer(other.record())


def eventually(is_so: Callable[[], Any], what: str, timeout: float = PATIENCE, *, pause: float = 0.02) -> None:
    """Wait until something is so, a bounded time; `pause` is the longest between two looks."""
    deadline = time.monotonic() + timeout
    seconds = 0.0005
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(seconds)
        seconds = min(pause, seconds * 1.5)


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    """Bytes that differ from place to place."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def error_of(transfer: Transfer, timeout: float = PATIENCE) -> RaynixlError:
    """Wait for a transfer that must fail; return why it did."""
    with pytest.raises(RaynixlError) as found:
        transfer.wait(timeout)
    assert transfer.done, f"{transfer!r} still runs: {found.value}"
    assert transfer.error is found.value
    return found.value

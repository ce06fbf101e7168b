"""A world of real processes for the tests of liveness: one that will end or freeze, one that looks on, and this one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import warm
from agent_tools import PATIENCE, eventually, make_config

from raynixl import Agent, AgentConfig, RaynixlError, Region, RemoteRegion
from raynixl.backends.shm import ShmBackend
from raynixl.backends.table import Factory
from raynixl.host import is_frozen
from raynixl.testing.far import make_agent, pattern
from raynixl.testing.places import FarProcess

QUICK = make_config(
    heartbeat_interval=0.2, heartbeat_timeout=0.8, transfer_timeout=1.5, connect_timeout=1.5, request_timeout=4.0,
    deregister_timeout=0.8,
)  # fmt: skip
N = 8192


class World:
    """Three agents of three processes that know each other: near (here), victim and bystander."""

    def __init__(self, factory: Factory = ShmBackend, config: AgentConfig = QUICK) -> None:
        self.near: Agent = make_agent("near", factory, config)
        self.victim = FarProcess(factory, config, is_busy=False, launch=warm.popen)
        self.bystander = FarProcess(factory, config, is_busy=False, launch=warm.popen)
        self.open(self.bystander, "bystander")
        self.open(self.victim, "victim")
        self.is_stopped = False

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_stopped:
            self.resume()
        self.near.close()
        self.victim.close()
        self.bystander.close()

    def open(self, far: FarProcess, name: str) -> None:
        """Start an agent in a process, and hand the records around by the pipes."""
        far.open(name)
        record = far.ask("record")
        self.near.peer(record)
        far.ask("meet", self.near.record())
        if name == "victim":
            self.bystander.ask("meet", record)
            far.ask("meet", self.bystander.ask("record"))

    def theirs(self, memory: str = "arena", name: str = "theirs", nbytes: int = N) -> RemoteRegion:
        """A region of the victim."""
        self.victim.ask("make", name, nbytes, memory, 1)
        return RemoteRegion.from_bytes(self.victim.ask("describe", name))

    def mine(self, nbytes: int = N, name: str = "") -> Region:
        """A region of ours, in memory that is no arena."""
        return self.near.register(np.zeros(nbytes, np.uint8), name=name)

    def stop(self) -> None:
        """Freeze the victim."""
        os.kill(self.victim.pid, signal.SIGSTOP)
        self.is_stopped = True
        eventually(lambda: is_frozen(self.victim.pid), "the victim to stop")

    def resume(self) -> None:
        """Let the victim go on."""
        os.kill(self.victim.pid, signal.SIGCONT)
        self.is_stopped = False

    def check_bystander(self) -> None:
        """Near and the bystander are undisturbed."""
        assert self.near.ask("bystander", "echo", b"there?").wait() == b"there?"
        assert self.near.lost("bystander") is None

    def check_reads(self, name: str, seed: int) -> None:
        """The victim is used by name, with no other call by the user."""
        mine = self.mine()
        self.near.read(self.near.peer("victim")[name], mine, timeout=PATIENCE).wait(PATIENCE)
        assert np.array_equal(mine.array(), pattern(N, seed))
        self.near.deregister(mine)


def ends_with(action: Callable[[], Any], *kinds: type[RaynixlError]) -> RaynixlError:
    """Have something end with one of these errors, in bounded time."""
    with pytest.raises(kinds) as caught:
        action().wait(PATIENCE)
    return caught.value


def mapped_arenas() -> int:
    """How many arenas are mapped in this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return sum("/memfd:raynixl" in line for line in maps)

"""The far side of a conformance check: an agent that does what the check asks of it, in this process or another."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from raynixl.agents import Agent, Transfer
from raynixl.backends.base import Capabilities
from raynixl.backends.table import Factory, offered
from raynixl.config import AgentConfig
from raynixl.errors import RaynixlError
from raynixl.region import Region
from raynixl.testing.contents import get, put

BACKEND = "under-test"
"""The name by which configurations of the checks name the backend."""
PATIENCE = 20.0
_TURN_SECONDS = 0.001
"""How long the busy thread of a far process goes on when another wants to run: checks ask for much."""
_TALKS = Capabilities(frozenset(), messages=True)


def make_agent(name: str, factory: Factory, config: AgentConfig) -> Agent:
    """Return an agent that has the backend under test, and shm if that carries no messages."""
    others = () if getattr(factory, "capabilities", _TALKS).messages else ("shm",)
    with offered(BACKEND, factory):
        return Agent(name, config=config.model_copy(update={"backends": (BACKEND, *others)}))


def make_region(agent: Agent, name: str, nbytes: int, memory: str) -> Region:
    """Return a region of memory of a sort: 'arena', 'user' or 'vram'."""
    if memory == "user":
        return agent.register(np.empty(nbytes, np.uint8), name=name)
    return agent.empty(nbytes, kind="vram" if memory == "vram" else "dram", name=name)


def pattern(nbytes: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return bytes that differ from place to place and from seed to seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


class FarAgent:
    """What a check can ask of the far side. Arguments and results can be pickled."""

    def __init__(self, factory: Factory, config: AgentConfig, name: str) -> None:
        self.agent = make_agent(name, factory, config)
        self._regions: dict[str, Region] = {}
        self._flood: list[Transfer] = []
        self.agent.serve("echo", lambda _peer, payload: payload, threaded=False)
        self._withdrawn: list[Any] = []  # a backend that still writes there shall fail the check, not crash it
        self._silence = threading.Event()
        self.agent.serve("silence", self._stay_silent, threaded=True)

    def record(self) -> bytes:
        """Return the agent's record."""
        return self.agent.record()

    def meet(self, record: bytes) -> None:
        """Make a peer known."""
        self.agent.peer(record)

    def make(self, name: str, nbytes: int, memory: str, seed: int) -> None:
        """Register memory of a sort that holds the pattern of a seed."""
        region = self._regions[name] = make_region(self.agent, name, nbytes, memory)
        put(region.memory, pattern(nbytes, seed))

    def describe(self, name: str) -> bytes:
        """Return a region's descriptor."""
        return self._regions[name].describe().to_bytes()

    def content(self, name: str) -> bytes:
        """Return the bytes of a region."""
        return get(self._regions[name].memory).tobytes()

    def fill(self, name: str, seed: int) -> None:
        """Write the pattern of a seed into a region."""
        region = self._regions[name]
        put(region.memory, pattern(region.nbytes, seed))

    def withdraw(self, name: str) -> bool:
        """Deregister a region; return whether its memory stays as it is from then on."""
        region = self._regions.pop(name)
        memory = region.memory
        self._withdrawn.append(memory)
        self.agent.deregister(region)
        put(memory, np.zeros(memory.nbytes, np.uint8))
        threading.Event().wait(0.05)
        return not get(memory).any()

    def copy(self, op: str, mine: str, peer: str, theirs: str) -> None:
        """Read or write the whole of a region of a peer, and wait for it."""
        ours, remote = self._regions[mine], self.agent.peer(peer)[theirs]
        source, target = (remote, ours) if op == "read" else (ours, remote)
        self.agent.prepare(op, source, target).post(timeout=PATIENCE).wait(PATIENCE)

    def flood(self, op: str, mine: str, peer: str, theirs: str, count: int) -> None:
        """Start to read or write the whole of a region of a peer, so many times, and wait for none of it."""
        ours, remote = self._regions[mine], self.agent.peer(peer)[theirs]
        plan = self.agent.prepare(op, *((remote, ours) if op == "read" else (ours, remote)))
        self._flood = [plan.post(timeout=PATIENCE) for _ in range(count)]

    def flood_ends(self) -> list[str]:
        """Wait for the end of each; return how it ended: the class of its error, or ''."""
        ends = []
        for transfer in self._flood:
            try:
                transfer.wait(PATIENCE)
                ends.append("")
            except RaynixlError as exc:
                ends.append(type(exc).__name__)
        return ends

    def notify(self, peer: str, payloads: list[bytes]) -> None:
        """Send notifications."""
        for payload in payloads:
            self.agent.notify(peer, payload)

    def send(self, peer: str, topic: str, payloads: list[bytes]) -> None:
        """Send messages under a topic."""
        for payload in payloads:
            self.agent.send(peer, topic, payload)

    def hear(self, count: int) -> list[bytes]:
        """Wait for notifications; return their payloads."""
        return [self.agent.wait_notification(PATIENCE).payload for _ in range(count)]

    def hear_and_look(self, name: str) -> tuple[bytes, bytes]:
        """Wait for a notification; return its payload and the region's bytes at that moment."""
        note = self.agent.wait_notification(PATIENCE)
        return note.payload, self.content(name)

    def ask(self, peer: str, payload: bytes) -> bytes:
        """Ask a peer to echo."""
        return self.agent.ask(peer, "echo", payload).wait()

    def exit(self) -> None:
        """End the process as if by a crash: nothing is closed."""
        os._exit(1)

    def close(self) -> None:
        """Close the agent; idempotent."""
        self.agent.close()
        self._regions.clear()
        self._withdrawn.clear()
        self._silence.set()  # a handler that answered before would be no silence

    def _stay_silent(self, _peer: str, payload: bytes) -> bytes:
        self._silence.wait(PATIENCE)
        return payload


def main(fd: int) -> None:
    """Serve the checks of another process over a pipe until it is closed; `spin` keeps Python busy meanwhile."""
    pipe = Connection(fd)
    sys.path[:], is_busy = pipe.recv()
    factory, config = pipe.recv()
    worker = threading.Thread(target=_serve, args=(pipe, factory, config), name="far", daemon=True)
    worker.start()
    if is_busy:
        sys.setswitchinterval(_TURN_SECONDS)
    while is_busy and worker.is_alive():  # this process's Python is never idle
        continue
    worker.join()


def _serve(pipe: Connection, factory: Factory, config: AgentConfig) -> None:
    far: FarAgent | None = None
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            try:
                if method == "open":
                    far = FarAgent(factory, config, *arguments)
                    answer = None
                else:
                    answer = getattr(far, method)(*arguments)
            except BaseException as exc:  # noqa: BLE001 - process edge: the check gets whatever it was
                pipe.send((False, exc))
            else:
                pipe.send((True, answer))
    if far is not None:
        far.close()

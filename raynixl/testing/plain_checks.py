"""Checks of what a backend says of itself, and of what it holds after its end."""

from __future__ import annotations

import gc
import os
import threading
import time

import numpy as np

from raynixl.errors import BackendUnavailable
from raynixl.memory import Memory, MemoryKind, resolve
from raynixl.region import RemoteRegion
from raynixl.testing.contents import get
from raynixl.testing.far import PATIENCE, make_agent, make_region
from raynixl.testing.scene import Scene, expect, expect_equal, split


def capabilities_are_sane(scene: Scene) -> None:
    """Names and capabilities are of the right types, stable, and fit the agent's record."""
    backend = scene.backend
    expect(isinstance(backend.name, str) and backend.name, "name is not text")
    kinds = backend.capabilities.kinds
    expect(kinds, "it carries no kinds of memory")
    for pair in kinds:
        expect(all(isinstance(kind, MemoryKind) for kind in pair), f"{pair!r} are not kinds of memory")
    expect(backend.local_metadata() == backend.local_metadata(), "its metadata changes from call to call")
    expect(len(scene.near.record()) < 4096, "its metadata makes the agent's record large")


def registers_and_deregisters(scene: Scene) -> None:
    """Memory can be registered, withdrawn, and registered again; the key fits the region's descriptor."""
    memory = resolve(np.zeros(4096, np.uint8))
    for number in (1 << 40, (1 << 40) + 1):
        key = scene.backend.register(number, memory)
        expect(all(isinstance(name, str) and isinstance(value, str | int) for name, value in key.items()),
               f"the key {key!r} is not texts and numbers under texts")  # fmt: skip
    for number in (1 << 40, (1 << 40) + 1):
        scene.backend.deregister(number)
    scene.backend.deregister(1 << 41)  # one that a refused registration never made
    scene.backend.register(1 << 40, memory)
    scene.backend.deregister(1 << 40)


def refuses_kinds_it_does_not_carry(scene: Scene) -> None:
    """Memory of a kind outside its capabilities is refused with BackendUnavailable."""
    carried = {ours for ours, _ in scene.backend.capabilities.kinds}
    array = np.zeros(64, np.uint8)
    for kind in set(MemoryKind) - carried:
        foreign = Memory(kind, 0, array.ctypes.data, array.nbytes, True, array)
        try:
            scene.backend.register(1 << 42, foreign)
        except BackendUnavailable:
            continue
        raise AssertionError(f"it takes {kind.value} memory, which its capabilities do not name")


def closes_more_than_once(scene: Scene) -> None:
    """A backend that was closed may be closed again."""
    agent = make_agent("closing", scene.factory, scene.config)
    backend = agent.backends[0]
    agent.close()
    backend.close()
    agent.close()


def leaves_nothing_behind(scene: Scene) -> None:
    """After the agent's end no thread and no descriptor of it is left."""
    memory = scene.memories[0]
    theirs = scene.remote(4096, memory)
    _visit(scene, theirs, memory, "visitor-0")  # what a process opens once, it may keep
    before = _held()
    for number in range(1, 4):
        _visit(scene, theirs, memory, f"visitor-{number}")
    deadline, held = time.monotonic() + PATIENCE / 4, _held()
    while any(now > was for now, was in zip(held, before, strict=True)) and time.monotonic() < deadline:
        gc.collect()
        threading.Event().wait(0.01)
        held = _held()
    expect(held[0] <= before[0], f"{held[0] - before[0]} threads are left of 3 agents")
    expect(held[1] <= before[1], f"{held[1] - before[1]} descriptors are left of 3 agents")


def _visit(scene: Scene, theirs: RemoteRegion, memory: str, name: str) -> None:
    """Have one more agent of this process read from the far one, and close it."""
    with make_agent(name, scene.factory, scene.config) as agent:
        agent.peer(scene.far.ask("record"))
        scene.far.ask("meet", agent.record())
        mine = make_region(agent, "", 4096, split(memory)[0])
        agent.read(agent.peer("far")[theirs.name], mine).wait(PATIENCE)
        expect_equal(get(mine.memory), scene.content(theirs), "a visitor's read")


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


CHECKS = (
    capabilities_are_sane,
    registers_and_deregisters,
    refuses_kinds_it_does_not_carry,
    closes_more_than_once,
    leaves_nothing_behind,
)

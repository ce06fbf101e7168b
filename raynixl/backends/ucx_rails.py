"""Which rails carry a transfer, and how its rows are cut over them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from raynixl.backends.base import Op, Request
from raynixl.cuda import bus_id
from raynixl.memory import Memory, MemoryKind
from raynixl.topology import Choice, Nic, Place, gpu_place, memory_place, nearest, stripe

STRIPE_NBYTES = 1 << 20
"""A rail gets no less than this: below, a second one costs more than it brings."""
STRIPE_ALIGN = 1 << 16
_MAX_CHOICES = 4096

Rows = NDArray[np.uint64]
Paths = NDArray[np.int64]


class RailChoice:
    """Chooses rails near a transfer's memory: those that the user named, all of them, or the nearest devices."""

    def __init__(self, given: Sequence[str]) -> None:
        self._given = tuple(given)
        self._lock = threading.Lock()  # protects _choices
        self._choices: dict[tuple[int, int], Choice] = {}

    def explain(self, memory: Memory, devices: Sequence[str], nics: Sequence[Nic]) -> Choice:
        """Return the devices for a piece of our memory, and why; none where one rail may use all."""
        if self._given:
            return Choice(self._given, "named in AgentConfig.rails")
        if len(devices) < 2:
            return Choice((), "one rail, whose devices UCX chooses")
        key = (memory.address, memory.nbytes)
        with self._lock:
            choice = self._choices.get(key)
        if choice is None:
            choice = nearest([nic for nic in nics if nic.device in devices], _place(memory))
            if not choice.devices:  # not remembered: where memory is may be known once it was touched
                return Choice(tuple(devices), "all there are, since none is known to be nearer to the memory")
            with self._lock:
                if len(self._choices) >= _MAX_CHOICES:
                    self._choices.clear()
                self._choices[key] = choice
        return choice

    def rails_for(
        self, memory: Memory, devices: Sequence[str], nics: Sequence[Nic], *, connected: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the numbers of the rails for a piece of our memory, of those that reach the peer; never none."""
        wanted = self.explain(memory, devices, nics).devices
        chosen = tuple(number for number in connected if devices[number] in wanted)
        return chosen or tuple(connected)

    def describe(self, memory: Memory, devices: Sequence[str], nics: Sequence[Nic], *, connected: Sequence[int]) -> str:
        """Say which rails carry a piece of our memory to a peer, and why."""
        choice = self.explain(memory, devices, nics)
        if not choice.devices:
            return choice.reason
        used = [devices[number] for number in self.rails_for(memory, devices, nics, connected=connected)]
        text = f"{'rail' if len(used) == 1 else 'rails'} {', '.join(used)}: {choice.reason}"
        lacking = [device for device in choice.devices if device in devices and devices.index(device) not in connected]
        return f"{text}; {', '.join(lacking)} reaches no rail of the peer" if lacking else text


def rows_of(request: Request, table: Rows) -> Rows:
    """Return rows of (our region, the peer's, our address, the peer's, nbytes) of (source, target, nbytes)."""
    segments = request.segments
    regions, addresses = (segments.source_region, segments.target_region), (table[:, 0], table[:, 1])
    if request.op is Op.READ:
        regions, addresses = regions[::-1], addresses[::-1]
    return np.column_stack((*regions, *addresses, table[:, 2])).astype(np.uint64)


def apart(rows: Rows, staged: Sequence[bool]) -> Iterator[tuple[bool, Rows]]:
    """Yield the rows whose memory of ours is not staged, and those in which it is: `staged` says so of our regions."""
    if not any(staged):
        yield False, rows
        return
    flags = np.asarray(staged)[rows[:, 0].astype(np.intp)]
    for flag in (False, True):
        if (flags == flag).any():
            yield flag, rows[flags == flag]


def cut(table: Rows, rails: Sequence[int]) -> tuple[Rows, Paths]:
    """Cut rows of (our region, the peer's, our address, the peer's, nbytes) over rails.

    Returns rows of (path, our address, the peer's address, nbytes) and the paths as rows of (our region, the peer's,
    rail); each path is used. Every byte goes once; less than STRIPE_NBYTES for each rail stays together.
    """
    if len(rails) == 1 and not table[:, :2].any():  # the most common: one region on each side
        rows = table[:, 1:].copy()
        return rows, np.array([[0, 0, rails[0]]], np.int64)
    if len(rails) > 1:
        # Small transfers would all take the first rail: they are spread by where their memory lies.
        first = int(table[0, 2] // STRIPE_ALIGN) % len(rails)
        pieces = stripe(table[:, 4], len(rails), min_nbytes=STRIPE_NBYTES, align=STRIPE_ALIGN, first=first)
        table = table[pieces.block]
        table[:, 2] += pieces.offset
        table[:, 3] += pieces.offset
        table[:, 4] = pieces.nbytes
        rail = np.asarray(rails, np.int64)[pieces.rail]
    else:
        rail = np.full(len(table), rails[0], np.int64)
    ways = np.column_stack((table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), rail))
    paths, path = _distinct(ways)
    rows = np.empty((len(table), 4), np.uint64)
    rows[:, 0] = path
    rows[:, 1:] = table[:, 2:]
    return rows, paths


def _distinct(ways: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different rows, and which of them each row is."""
    if not (ways != ways[0]).any():  # by far the most common, and a sort is dear
        return ways[:1], np.zeros(len(ways), np.int64)
    paths, path = np.unique(ways, axis=0, return_inverse=True)
    return paths, path.reshape(-1)


def _place(memory: Memory) -> Place:
    if memory.kind is MemoryKind.VRAM:
        return gpu_place(bus_id(memory.device), name=f"GPU {memory.device}")
    return memory_place(memory.address, memory.nbytes)

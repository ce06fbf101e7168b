"""Wrong operations and descriptors are refused, each with its own error, and the peer is unharmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from agent_scenes import N, Scene, changed, naming, refused

from raynixl import (
    BackendUnavailable,
    ConfigError,
    IntegrityError,
    MemoryKind,
    PeerRestarted,
    PeerUnknown,
    RangeError,
    RegionStale,
    RegionUnknown,
)
from raynixl.blocks import Blocks

Case = tuple[Callable[[Scene], Any], Any]


def same_memory_shifted(s: Scene) -> Any:
    """Alice and Bob register the same memory; the transfer moves it by 8 bytes onto itself."""
    shared = np.zeros(256, np.uint8)
    mine, bobs = s.alice.register(shared), s.bob.register(shared)
    return s.alice.write(mine[0:128], bobs.describe()[8:136])


OPERATIONS: dict[str, Case] = {
    "unequal lengths": (lambda s: s.alice.write(s.mine[:8], s.theirs[:9]), RangeError),
    "unequal lists": (lambda s: s.alice.read([s.theirs[:8], s.theirs[:8]], s.mine[:15]), RangeError),
    "no bytes": (lambda s: s.alice.write(s.mine[:0], s.theirs[:0]), RangeError),
    "a slice backwards": (lambda s: s.alice.write(s.mine[9:8], s.theirs[9:8]), RangeError),
    "no blocks": (lambda s: s.alice.write(s.mine.blocks([], []), s.theirs.blocks([], [])), RangeError),
    "no pages": (lambda s: s.alice.read(s.theirs.pages([], 64), s.mine.pages([], 64)), RangeError),
    "blocks of no bytes": (lambda s: s.alice.write(s.mine.blocks([0, 8], 0), s.theirs.blocks([0, 8], 0)), RangeError),
    "no regions": (lambda s: s.alice.write([], []), ConfigError),
    "overlapping destination": (
        lambda s: s.alice.write(s.mine.blocks([0, 64], 64), s.theirs.blocks([0, 63], 64)), RangeError,
    ),
    "overlapping own destination": (
        lambda s: s.alice.read(s.theirs.blocks([0, 64], 64), s.mine.blocks([63, 0], 64)), RangeError,
    ),
    "one page twice": (lambda s: s.alice.write(s.mine.pages([0, 1], 64), s.theirs.pages([2, 2], 64)), RangeError),
    "overlap across a list": (
        lambda s: s.alice.write(s.mine[:16], [s.theirs[0:8], s.theirs[7:15]]), RangeError,
    ),
    "onto itself, shifted": (same_memory_shifted, RangeError),
    "a region as the peer's": (lambda s: s.alice.write(s.mine, s.mine), ConfigError),
    "the peer's as ours": (lambda s: s.alice.write(s.theirs, s.theirs), ConfigError),
    "the wrong way round": (lambda s: s.alice.read(s.mine, s.theirs), ConfigError),
    "another agent's region as ours": (lambda s: s.alice.write(s.bobs, s.theirs), RegionUnknown),
    "nothing": (lambda s: s.alice.write(None, s.theirs), ConfigError),
    "nothing as target": (lambda s: s.alice.write(s.mine, None), ConfigError),
    "a number": (lambda s: s.alice.write(5, s.theirs), ConfigError),
    "text": (lambda s: s.alice.write("mine", s.theirs), ConfigError),
    "bytes": (lambda s: s.alice.write(b"mine", s.theirs), ConfigError),
    "no text": (lambda s: s.alice.write(s.mine, ""), ConfigError),
    "an array": (lambda s: s.alice.write(np.zeros(8, np.uint8), s.theirs), ConfigError),
    "a tensor": (lambda s: s.alice.read(s.theirs, torch.zeros(8)), ConfigError),
    "the agents": (lambda s: s.alice.write(s.alice, s.bob), ConfigError),
    "nested lists": (lambda s: s.alice.write([[s.mine]], s.theirs), ConfigError),
    "blocks of nothing": (lambda s: s.alice.write(Blocks(None, s.mine[:8].table), s.theirs[:8]), ConfigError),
    "explain nothing": (lambda s: s.alice.explain(None, None), ConfigError),
    "explain text": (lambda s: s.alice.explain("a", "b"), ConfigError),
    "no such operation": (lambda s: s.alice.prepare("copy", s.mine, s.theirs), ConfigError),
    "no operation": (lambda s: s.alice.prepare(None, s.mine, s.theirs), ConfigError),
    "unhashable operation": (lambda s: s.alice.prepare([], s.mine, s.theirs), ConfigError),
    "text as notification": (lambda s: s.alice.write(s.mine, s.theirs, notify="v1"), ConfigError),
    "too long a notification": (lambda s: s.alice.write(s.mine, s.theirs, notify=bytes(65 << 20)), RangeError),
    "two peers": (
        lambda s: s.alice.write([s.mine[:8], s.mine[8:16]], [s.theirs[:8], replace(s.theirs, owner="carol")[:8]]),
        ConfigError,
    ),
}  # fmt: skip

DESCRIPTORS: dict[str, Case] = {
    "a larger region": (lambda s: s.alice.read(changed(s.theirs, nbytes=2 * N)[N:], s.mine), IntegrityError),
    "write behind the region": (lambda s: s.alice.write(s.mine, changed(s.theirs, nbytes=2 * N)[N:]), IntegrityError),
    "one byte larger": (lambda s: s.alice.write(s.mine[:1], changed(s.theirs, nbytes=N + 1)[N:]), IntegrityError),
    "2^62 bytes": (lambda s: s.alice.write(s.mine[:1], changed(s.theirs, nbytes=1 << 62)[-1:]), IntegrityError),
    "sums that wrap": (
        lambda s: s.alice.read(changed(s.theirs, nbytes=1 << 62).blocks([0] * 5, [1 << 62] * 4 + [8]), s.mine[:8]),
        (RangeError, IntegrityError),
    ),
    "a smaller region": (lambda s: s.alice.write(s.mine[:8], changed(s.theirs, nbytes=8)), IntegrityError),
    "another generation": (lambda s: s.alice.write(s.mine, changed(s.theirs, generation=2)), RegionStale),
    "generation 2^62": (lambda s: s.alice.write(s.mine, changed(s.theirs, generation=1 << 62)), RegionStale),
    "an id never given": (lambda s: s.alice.write(s.mine, changed(s.theirs, id=999)), (RegionStale, RegionUnknown)),
    "an id of 2^62": (lambda s: s.alice.read(changed(s.theirs, id=1 << 62), s.mine), (RegionStale, RegionUnknown)),
    "other addresses": (
        lambda s: s.alice.write(s.mine, changed(s.theirs, keys={"shm": {"address": 4096}, "loopback": {}})),
        IntegrityError,
    ),
    "an address of 2^64": (
        lambda s: s.alice.write(s.mine, changed(s.theirs, keys={"shm": {"address": 2**64}})), IntegrityError,
    ),
    "a negative address": (
        lambda s: s.alice.write(s.mine, changed(s.theirs, keys={"shm": {"address": -8}, "loopback": {}})),
        IntegrityError,
    ),
    "text as address": (
        lambda s: s.alice.write(s.mine, changed(s.theirs, keys={"shm": {"address": "x"}})), IntegrityError,
    ),
    "no keys": (lambda s: s.alice.write(s.mine, changed(s.theirs, keys={})), (IntegrityError, BackendUnavailable)),
    "another name": (lambda s: s.alice.write(s.mine, changed(s.theirs, name="other")), IntegrityError),
    "video memory": (
        lambda s: s.alice.write(s.mine, changed(s.theirs, kind=MemoryKind.VRAM)), (IntegrityError, BackendUnavailable),
    ),
    "a file": (
        lambda s: s.alice.read(changed(s.theirs, kind=MemoryKind.FILE), s.mine), (IntegrityError, BackendUnavailable),
    ),
    "another device": (lambda s: s.alice.write(s.mine, changed(s.theirs, device=3)), IntegrityError),
    "an older incarnation": (
        lambda s: s.alice.write(s.mine, replace(s.theirs, incarnation="0" * 32)), PeerRestarted,
    ),
    "an incarnation of nonsense": (
        lambda s: s.alice.write(s.mine, replace(s.theirs, incarnation="\x00")), (PeerRestarted, ConfigError),
    ),
    "an unknown owner": (lambda s: s.alice.write(s.mine, replace(s.theirs, owner="nobody")), PeerUnknown),
    "an owner of nonsense": (
        lambda s: s.alice.write(s.mine, replace(s.theirs, owner="\x00")), (PeerUnknown, ConfigError),
    ),
}  # fmt: skip


def test_wrong_operations_are_refused(scene: Scene) -> None:
    for name, (action, kind) in OPERATIONS.items():
        with naming(name):
            refused(lambda: action(scene), kind)  # noqa: B023 - called at once
            scene.check_unharmed()


def test_descriptors_that_are_not_the_owners_are_refused(scene: Scene) -> None:
    for name, (action, kind) in DESCRIPTORS.items():
        with naming(name):
            refused(lambda: action(scene), kind)  # noqa: B023 - called at once
            scene.check_unharmed()

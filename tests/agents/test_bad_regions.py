"""Regions that are gone, foreign or read-only are refused, and found anew by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agent_scenes import N, Scene, changed, refused
from agent_tools import PATIENCE

from raynixl import IntegrityError, RegionReadOnly, RegionStale, RegionUnknown


def test_a_deregistered_region_of_ours_is_stale(scene: Scene) -> None:
    gone = scene.alice.register(np.zeros(N, np.uint8))
    plan = scene.alice.prepare("write", gone, scene.theirs)
    scene.alice.deregister(gone)
    refused(lambda: scene.alice.write(gone, scene.theirs), RegionStale)
    refused(plan.post, RegionStale)
    refused(lambda: scene.alice.deregister(gone), RegionStale)
    refused(lambda: scene.bob.deregister(scene.mine), RegionUnknown)
    scene.check_unharmed()


def test_a_region_that_the_peer_withdrew_is_stale_and_found_again_by_name(scene: Scene) -> None:
    s = scene
    plan = s.alice.prepare("read", s.theirs, s.mine)
    plan.post().wait(PATIENCE)
    s.bob.deregister(s.bobs)
    for action in (lambda: s.alice.write(s.mine, s.theirs), lambda: s.alice.read(s.theirs, s.mine), plan.post):
        refused(action, RegionStale)
    again = np.array(s.around[N : 2 * N])
    s.bobs = s.bob.register(again, name="theirs")
    refused(lambda: s.alice.write(s.mine, s.theirs), RegionStale)
    s.theirs = s.alice.peer("bob")["theirs"]
    assert s.theirs.generation == 2
    s.check_unharmed()


def test_a_region_looked_up_and_never_used_is_found_anew_after_it_was_registered_again(scene: Scene) -> None:
    s = scene
    first = s.bob.empty(N, name="other")
    old = s.alice.peer("bob")["other"]
    s.bob.deregister(first)
    s.bob.empty(N, name="other")
    refused(lambda: s.alice.write(s.mine, old), RegionStale)
    new = s.alice.peer("bob")["other"]
    assert new.generation == 2
    s.alice.write(s.mine, new).wait(PATIENCE)
    s.check_unharmed()


@pytest.mark.parametrize("source", [bytes(N), np.frombuffer(bytes(N), np.uint8), memoryview(bytearray(N)).toreadonly()])
def test_read_only_memory_is_no_destination_and_a_fine_source(scene: Scene, source: Any) -> None:
    s = scene
    mine, bobs = s.alice.register(source), s.bob.register(source, name="read-only")
    assert "read-only" in refused(lambda: s.alice.read(s.theirs, mine), RegionReadOnly).message
    assert "read-only" in refused(lambda: s.alice.write(s.mine, bobs.describe()), RegionReadOnly).message
    refused(lambda: s.alice.write(s.mine, s.alice.peer("bob")["read-only"]), RegionReadOnly)
    refused(lambda: s.alice.write(s.mine, changed(bobs.describe(), writable=True)), IntegrityError)
    s.mine.array()[:] = 1
    s.alice.read(bobs.describe(), s.mine).wait(PATIENCE)
    assert not s.mine.array().any()
    assert not np.frombuffer(source, np.uint8).any()
    scene.check_unharmed()

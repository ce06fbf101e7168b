"""A closed agent refuses everything; a peer that closed is lost."""

from __future__ import annotations

import numpy as np
from agent_scenes import Scene, refused
from agent_tools import PATIENCE

from raynixl import AgentClosed, ConfigError, PeerLost, PeerUnknown


def test_a_closed_agent_refuses_everything(scene: Scene) -> None:
    s = scene
    plan = s.alice.prepare("write", s.mine, s.theirs)
    plan.post().wait(PATIENCE)
    s.alice.close()
    s.alice.close()
    for action in (
        lambda: s.alice.write(s.mine, s.theirs),
        lambda: s.alice.read(s.theirs, s.mine),
        lambda: s.alice.prepare("write", s.mine, s.theirs),
        lambda: s.alice.explain(s.mine, s.theirs),
        plan.post,
        lambda: plan.post(notify=b"x"),
        lambda: s.alice.register(bytearray(8)),
        lambda: s.alice.empty(8),
        lambda: s.alice.deregister(s.mine),
        lambda: s.alice.peer("bob"),
        lambda: s.alice.notify("bob", b""),
        lambda: s.alice.send("bob", "x", b""),
        lambda: s.alice.ask("bob", "x"),
        lambda: s.alice.wait_notification(1.0),
    ):
        refused(action, AgentClosed)
    assert s.alice.notifications() == []
    assert s.alice.statistics().peers == 0
    assert "closed" in repr(s.alice)


def test_a_peer_that_closed_is_lost(scene: Scene) -> None:
    s = scene
    plan = s.alice.prepare("write", s.mine, s.theirs)
    plan.post().wait(PATIENCE)
    s.bob.close()
    after = s.around.copy()
    for action in (lambda: s.alice.write(s.mine, s.theirs), lambda: s.alice.read(s.theirs, s.mine), plan.post):
        refused(action, PeerLost)
    refused(lambda: s.alice.notify("bob", b""), (PeerLost, PeerUnknown))
    assert np.array_equal(s.around, after)


def test_a_peer_that_is_gone_is_told_of_with_one_remedy(scene: Scene) -> None:
    scene.bob.close()
    error = refused(lambda: scene.alice.write(scene.mine, scene.theirs).wait(PATIENCE), PeerLost)
    error = refused(lambda: scene.alice.write(scene.mine, scene.theirs).wait(PATIENCE), PeerLost)
    assert "try again" not in error.message


def test_an_array_that_is_no_region_is_to_be_registered(scene: Scene) -> None:
    error = refused(lambda: scene.alice.write(np.zeros(8, np.uint8), scene.theirs), ConfigError)
    assert "agent.register" in error.hint

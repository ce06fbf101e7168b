"""A closed agent refuses everything; a peer that closed is lost."""

from __future__ import annotations

import numpy as np
from agent_scenes import Scene, refused
from agent_tools import PATIENCE

from raynixl import AgentClosed, PeerLost, PeerUnknown


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

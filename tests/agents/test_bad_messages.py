"""Timeouts that are none, and messages of wrong types, are refused before anything is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
from agent_scenes import Scene, refused

from raynixl import ConfigError, PeerUnknown, RangeError, RegionUnknown, TransferTimeout

TIMEOUTS = {"0": 0, "0.0": 0.0, "negative": -1.0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
            "huge": 1e300, "text": "5", "list": [5], "complex": 5j}  # fmt: skip


def test_timeouts_that_are_no_deadline_are_refused(scene: Scene) -> None:
    s, peer = scene, scene.alice.peer("bob")
    plan = s.alice.prepare("write", s.mine, s.theirs)
    s.bob.serve("echo", lambda _peer, payload: payload, threaded=False)
    for timeout in TIMEOUTS.values():
        t: Any = timeout
        for action in (
            lambda: s.alice.write(s.mine, s.theirs, timeout=t),  # noqa: B023 - called at once
            lambda: s.alice.read(s.theirs, s.mine, timeout=t),  # noqa: B023
            lambda: plan.post(timeout=t),  # noqa: B023
            lambda: s.alice.ask("bob", "echo", b"", timeout=t),  # noqa: B023
            lambda: s.alice.notify("bob", b"", timeout=t),  # noqa: B023
            lambda: s.alice.send("bob", "topic", b"", timeout=t),  # noqa: B023
            lambda: peer.connect(timeout=t),  # noqa: B023
        ):
            refused(action, ConfigError)
    assert s.bob.notifications() == []
    scene.check_unharmed()


def test_waits_take_zero_as_a_look_and_refuse_what_is_no_time(scene: Scene) -> None:
    s, peer = scene, scene.alice.peer("bob")
    with pytest.raises(TransferTimeout):
        s.alice.wait_notification(0)
    assert s.alice.peer("bob", timeout=0).name == "bob"
    with pytest.raises(PeerUnknown):
        s.alice.peer("nobody", timeout=0)
    with pytest.raises(RegionUnknown):
        peer.region("nothing", timeout=2.0)  # once connected, time for an answer, also on a busy machine
    for name, timeout in TIMEOUTS.items():
        if name in ("0", "0.0"):
            continue
        t: Any = timeout
        refused(lambda: s.alice.wait_notification(t), ConfigError)  # noqa: B023 - called at once
        refused(lambda: s.alice.peer("nobody", timeout=t), ConfigError)  # noqa: B023
        refused(lambda: peer.region("nothing", timeout=t), ConfigError)  # noqa: B023
    scene.check_unharmed()


async def test_asynchronous_waits_refuse_what_is_no_time(scene: Scene) -> None:
    for name, timeout in TIMEOUTS.items():
        if name not in ("0", "0.0"):
            with pytest.raises(ConfigError):
                await scene.alice.next_notification(timeout)  # type: ignore[arg-type]
    with pytest.raises(TransferTimeout):
        await scene.alice.next_notification(0)
    scene.check_unharmed()


def test_messages_of_wrong_types_are_refused(scene: Scene) -> None:
    s: Any = scene
    for action in (
        lambda: s.alice.notify("bob", "text"),
        lambda: s.alice.notify("bob", None),
        lambda: s.alice.send("bob", "topic", "text"),
        lambda: s.alice.send("bob", 5, b""),
        lambda: s.alice.send("bob", "t" * 2000, b""),
        lambda: s.alice.send("bob", "\ud800", b""),
        lambda: s.alice.ask("bob", "topic", 5),
        lambda: s.alice.ask("bob", None, b""),
        lambda: s.alice.ask("bob", "t" * 70_000, b""),
        lambda: s.alice.notify(5, b""),
        lambda: s.alice.notify([], b""),
        lambda: s.alice.lost(5),
        lambda: s.alice.peer(5),
        lambda: s.alice.peer(None),
        lambda: s.alice.peer("bob")[5],
        lambda: s.alice.peer("bob").region(None),
        lambda: s.alice.deregister(None),
        lambda: s.alice.deregister(s.theirs),
        lambda: s.alice.serve(5, lambda _peer, payload: payload),
        lambda: s.alice.serve("topic", None),
        lambda: s.alice.inbox(5),
    ):
        refused(action, ConfigError)
    for action in (
        lambda: s.alice.notify("bob", bytes(65 << 20)),
        lambda: s.alice.send("bob", "topic", bytes(65 << 20)),
        lambda: s.alice.ask("bob", "topic", bytes(65 << 20)),
    ):
        refused(action, RangeError)
    assert s.bob.notifications() == []
    assert not s.bob.statistics().dropped
    scene.check_unharmed()

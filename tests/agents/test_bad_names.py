"""Names that cannot be published are refused; odd ones that people use work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from agent_scenes import Scene, naming, refused
from agent_tools import PATIENCE

from raynixl import Agent, ConfigError, PeerUnknown, RegionUnknown

GOOD_NAMES = [
    "a", "trainer-0", "Rollout 3", "数据", "ñandú", "😀🎉", "a/b:c.d#e%20", "x" * 200, "'\"\\", "{0}%s", "e\u0301",
    "null", "-", "..", "shm",
]  # fmt: skip
BAD_NAMES: list[Any] = [
    "", " ", "\t", "a ", " a", "a\n", "a\nb", "a\x00b", "\x00", "\x1b[31m", "a\x7f", "\x85a", "a\u2028b", "\ud800",
    "a\ud800b", "a\udfff", "x" * 201, "x" * 10_000, None, 5, b"bytes", ["a"], 1.5,
]  # fmt: skip


def test_names_that_people_use_work(new_agent: Callable[..., Agent], backend: str) -> None:
    for name in GOOD_NAMES:
        one, other = (
            new_agent(name, backends=(backend,)),
            new_agent(name + "'" if len(name) < 200 else "y" * 200, backends=(backend,)),
        )
        region = one.empty(8, name=name)
        region.array()[:] = 3
        peer = other.peer(one.record())
        mine = other.empty(8)
        other.read(peer[name], mine).wait(PATIENCE)
        assert mine.array().tolist() == [3] * 8
        with pytest.raises(PeerUnknown):
            one.peer("nobody")


def test_names_that_cannot_be_published_are_refused(scene: Scene) -> None:
    for name in BAD_NAMES:
        with naming(ascii(name)[:40]):
            _check_unusable(name, scene)
    scene.check_unharmed()


def _check_unusable(name: Any, scene: Scene) -> None:
    refused(lambda: Agent(name), ConfigError)
    if name != "":  # no name at all
        refused(lambda: scene.alice.register(bytearray(8), name=name), ConfigError)
        refused(lambda: scene.alice.empty(8, name=name), ConfigError)
    if not isinstance(name, bytes):  # the bytes of a record
        refused(lambda: scene.alice.peer(name), ConfigError)
    refused(lambda: scene.alice.peer("bob")[name], ConfigError)


def test_labels_that_do_not_fit_a_record_are_refused() -> None:
    for labels in ({"x": "y" * 300}, {str(i): "" for i in range(20)}, {"x": 5}, {5: "x"}):
        refused(lambda: Agent("alice", labels=labels), ConfigError)  # type: ignore[arg-type]  # noqa: B023


def test_a_name_taken_is_refused(scene: Scene) -> None:
    refused(lambda: scene.alice.register(bytearray(8), name="mine"), ConfigError)
    assert "mine" in refused(lambda: scene.alice.empty(8, name="mine"), ConfigError).message
    scene.check_unharmed()


def test_an_unknown_region_or_peer_is_refused(scene: Scene) -> None:
    error = refused(lambda: scene.alice.peer("bob")["nothing"], RegionUnknown)
    assert "'nothing'" in error.message
    assert "theirs" in error.hint
    refused(lambda: scene.alice.peer("carol"), PeerUnknown)
    refused(lambda: scene.alice.notify("carol", b""), PeerUnknown)
    refused(lambda: scene.alice.ask("bob", "nothing").wait(PATIENCE), RegionUnknown)
    scene.check_unharmed()

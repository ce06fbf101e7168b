"""Checks of notifications and messages: after the data, in order, whole, and of any size."""

from __future__ import annotations

from raynixl.testing.contents import put
from raynixl.testing.far import PATIENCE, pattern
from raynixl.testing.scene import Scene, Unreached, expect, expect_equal

_MIB = 1 << 20


def notifies_after_the_data(scene: Scene) -> None:
    """Whoever gets a transfer's notification sees all of its bytes."""
    _need_messages(scene)
    for memory in scene.memories:
        for nbytes, turns in ((4096, 20), (6 * _MIB, 3)):
            mine, theirs = scene.pair(nbytes, memory)
            for turn in range(turns):
                sent = pattern(nbytes, turn + 10)
                put(mine.memory, sent)
                transfer = scene.near.write(mine, theirs, notify=b"%d" % turn)
                payload, seen = scene.far.ask("hear_and_look", theirs.name)
                expect(payload == b"%d" % turn, f"notification {payload!r} came instead of {turn}")
                expect_equal(memoryview(seen), sent, f"{nbytes} bytes of {memory} memory at their notification")
                transfer.wait(PATIENCE)


def keeps_messages_in_order(scene: Scene) -> None:
    """Many messages, none lost or twice or out of turn, both ways."""
    _need_messages(scene)
    _exchange(scene, [b"%d" % number for number in range(1000)], "messages")


def carries_large_messages(scene: Scene) -> None:
    """Messages of any size up to the configured one, among small ones."""
    _need_messages(scene)
    sizes = (0, 1, 59_999, 60_000, 60_001, 5 * _MIB + 1, 3, 0)
    _exchange(scene, [pattern(nbytes, nbytes).tobytes() for nbytes in sizes], "large messages")


def _exchange(scene: Scene, sent: list[bytes], what: str) -> None:
    """Send messages both ways; each side must hear just these, in this order."""
    for payload in sent:
        scene.near.notify("far", payload)
    expect(scene.far.ask("hear", len(sent)) == sent, f"{what} to the far side are not those sent, or out of order")
    scene.far.ask("notify", "near", sent)
    heard = [scene.near.wait_notification(PATIENCE).payload for _ in sent]
    expect(heard == sent, f"{what} from the far side are not those sent, or out of order")


def answers_requests(scene: Scene) -> None:
    """Requests are answered, from either side, by the agent's own threads."""
    _need_messages(scene)
    for number in range(50):
        expect(scene.near.ask("far", "echo", b"%d" % number).wait() == b"%d" % number, "the far side's answer is wrong")
    expect(scene.far.ask("ask", "near", b"who?") == b"who?", "the near side's answer is wrong")


def _need_messages(scene: Scene) -> None:
    if not scene.backend.capabilities.messages:
        raise Unreached("it carries no messages")


CHECKS = (notifies_after_the_data, keeps_messages_in_order, carries_large_messages, answers_requests)

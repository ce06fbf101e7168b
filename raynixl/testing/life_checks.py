"""Checks of ends: deadlines, cancelling, withdrawn regions, lost and returned peers. Each is typed and in time."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np

from raynixl.agents import Transfer
from raynixl.errors import (
    PeerLost,
    PeerRestarted,
    PeerUnknown,
    RaynixlError,
    RegionStale,
    TransferCancelled,
    TransferTimeout,
)
from raynixl.memory import Memory
from raynixl.testing.contents import get, put
from raynixl.testing.far import PATIENCE, pattern
from raynixl.testing.scene import Scene, expect, expect_equal, expect_error

_MIB = 1 << 20


def keeps_deadlines(scene: Scene) -> None:
    """A transfer whose deadline passes ends with TransferTimeout, and touches its memory no more."""
    for memory in scene.memories:
        mine, theirs = scene.pair(16 * _MIB, memory)
        scene.near.read(theirs, mine).wait(PATIENCE)
        for timeout in (0.0002, 0.001):
            transfer = scene.near.read(theirs, mine, timeout=timeout)
            _expect_end(transfer, TransferTimeout)
            if transfer.error is not None:
                _expect_still(mine.memory, f"{memory} memory after a deadline")


def cancels(scene: Scene) -> None:
    """A cancelled transfer ends with TransferCancelled, and touches its memory no more."""
    for memory in scene.memories:
        mine, theirs = scene.pair(16 * _MIB, memory)
        for _ in range(3):
            transfer = scene.near.read(theirs, mine)
            was_cancelled = transfer.cancel()
            _expect_end(transfer, TransferCancelled)
            expect(was_cancelled == (transfer.error is not None), "cancel() does not say whether it cancelled")
            if was_cancelled:
                _expect_still(mine.memory, f"{memory} memory after cancel()")
        scene.near.read(theirs, mine).wait(PATIENCE)
        expect_equal(get(mine.memory), pattern(mine.nbytes, 1), "a read after cancelled ones")


def refuses_stale_regions(scene: Scene) -> None:
    """Nothing reaches memory that its owner has withdrawn; its next registration is found by name."""
    for memory in scene.memories:
        mine, theirs = scene.pair(4096, memory)
        operations = [scene.near.prepare("write", mine, theirs), scene.near.prepare("read", theirs, mine)]
        for operation in operations:
            operation.post().wait(PATIENCE)
        expect(scene.far.ask("withdraw", theirs.name), "bytes of a withdrawn region were written")
        for operation in operations:
            expect_error(operation.post, RegionStale, what=f"a prepared {operation.op.value} of a withdrawn region")
        new_read = partial(scene.near.read, theirs, mine)
        expect_error(new_read, RegionStale, what="a read of a withdrawn region")
        scene.far.ask("make", theirs.name, 4096, memory, 7)
        again = scene.near.peer("far")[theirs.name]
        expect(again.generation != theirs.generation, "two registrations of one name have the same generation")
        scene.near.read(again, mine).wait(PATIENCE)
        expect_equal(get(mine.memory), pattern(4096, 7), "a region registered anew")
        expect_error(new_read, RegionStale, what="a read by the old descriptor")


def deregister_waits_for_transfers(scene: Scene) -> None:
    """When deregister has returned, no transfer of a peer writes there any more, however many are posted."""
    for memory in scene.memories:
        mine, theirs = scene.pair(2 * _MIB, memory)
        put(mine.memory, np.full(mine.nbytes, 255, np.uint8))
        write = scene.near.prepare("write", mine, theirs)
        write.post().wait(PATIENCE)
        ends: list[RaynixlError] = []
        poster = threading.Thread(target=_post_until_refused, args=(write, ends))
        poster.start()
        try:
            is_still = scene.far.ask("withdraw", theirs.name)
        finally:
            poster.join(PATIENCE)
        expect(is_still, f"{memory} memory was written after deregister had returned")
        expect(not poster.is_alive() and ends, "posts to a withdrawn region do not end")
        expect(isinstance(ends[0], RegionStale), f"posts to a withdrawn region end with {ends[0]!r}")


def loses_peers(scene: Scene) -> None:
    """The end of a peer ends every transfer, request and wait with it, by a typed error in time."""
    mine, theirs = scene.pair(4096, scene.memories[0])
    operation = scene.near.prepare("write", mine, theirs)
    operation.post().wait(PATIENCE)
    request = scene.near.ask("far", "silence", timeout=PATIENCE) if scene.backend.capabilities.messages else None
    scene.far.vanish()
    if request is not None:
        expect_error(request.wait, PeerLost, what="a request to a peer that ended")
    else:
        _expect_soon_refused(operation)  # nothing has told us yet
    expect_error(operation.post, PeerLost, PeerUnknown, what="a prepared write to a peer that ended")
    expect_error(lambda: scene.near.read(theirs, mine), PeerLost, PeerUnknown, what="a read of a peer that ended")


def finds_restarted_peers(scene: Scene) -> None:
    """A peer that lives again is used by name; what named its earlier incarnation says PeerRestarted."""
    memory = scene.memories[0]
    mine, theirs = scene.pair(4096, memory)
    operation = scene.near.prepare("read", theirs, mine)
    operation.post().wait(PATIENCE)
    scene.far.vanish()
    scene.open_far()
    scene.far.ask("make", theirs.name, 4096, memory, 9)
    again = scene.near.peer("far")[theirs.name]
    scene.near.read(again, mine).wait(PATIENCE)
    expect_equal(get(mine.memory), pattern(4096, 9), "a read of a peer that lives again")
    expect_error(operation.post, PeerRestarted, what="a prepared read of an earlier incarnation")
    expect_error(lambda: scene.near.read(theirs, mine), PeerRestarted, what="a read of an earlier incarnation")


def reconnects(scene: Scene) -> None:
    """A link that went down is made again at the next use, and prepared operations go on."""
    mine, theirs = scene.pair(4096, scene.memories[0])
    operation = scene.near.prepare("read", theirs, mine)
    operation.post().wait(PATIENCE)
    connection = scene.near.connector.current("far")
    expect(connection is not None, "there is no connection after a transfer")
    assert connection is not None
    connection.lose(PeerLost("cut by the check", peer="far"))
    put(mine.memory, np.full(mine.nbytes, 0, np.uint8))
    operation.post().wait(PATIENCE)
    expect_equal(get(mine.memory), pattern(4096, 1), "a prepared read after the link was cut")


def _post_until_refused(operation: Any, ends: list[RaynixlError]) -> None:
    while not ends:
        try:
            operation.post().wait(PATIENCE)
        except RaynixlError as exc:
            ends.append(exc)


def _expect_soon_refused(operation: Any) -> None:
    """Fail the check unless the end of the peer is known before long: until then posts may go on, or be lost."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            operation.post().wait(PATIENCE)
        except (PeerLost, PeerUnknown):
            return
        expect(time.monotonic() < deadline, "writes to a peer that ended go on")
        threading.Event().wait(0.001)


def _expect_end(transfer: Transfer, kind: type[RaynixlError]) -> None:
    """Fail the check unless the transfer ends in time: well, since it was faster, or with this error."""
    try:
        transfer.wait(PATIENCE)
    except kind:
        expect(transfer.done, "a transfer that raised its end is not done")
    except RaynixlError as exc:
        raise AssertionError(f"it ended with {exc!r}, not {kind.__name__}") from exc


def _expect_still(memory: Memory, what: str) -> None:
    put(memory, np.zeros(memory.nbytes, np.uint8))
    threading.Event().wait(0.02)
    expect(not get(memory).any(), f"{what} is still written")


CHECKS = (
    keeps_deadlines,
    cancels,
    refuses_stale_regions,
    deregister_waits_for_transfers,
    loses_peers,
    finds_restarted_peers,
    reconnects,
)

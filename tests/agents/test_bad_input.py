"""Bad input: each is refused with its own error, which says what to do, and the peer is unharmed."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from agent_tools import PATIENCE, error_of, random_bytes

from raynixl import (
    Agent,
    AgentClosed,
    BackendUnavailable,
    ConfigError,
    IntegrityError,
    MemoryKind,
    MemorySpan,
    PeerLost,
    PeerRestarted,
    PeerUnknown,
    RangeError,
    RaynixlError,
    Region,
    RegionReadOnly,
    RegionStale,
    RegionUnknown,
    RemoteRegion,
    Transfer,
    TransferTimeout,
)
from raynixl.blocks import Blocks

N = 4096
HUGE = (2**63, 2**64 - 1, 2**64, 10**30)


@dataclass
class Scene:
    """Alice, Bob, and a region of each; Bob's lies between bytes that nobody may touch."""

    alice: Agent
    bob: Agent
    mine: Region
    theirs: RemoteRegion
    bobs: Region
    around: np.ndarray
    before: np.ndarray

    def check_unharmed(self) -> None:
        """Bob's bytes are what they were, and the next correct transfers in both directions work."""
        assert np.array_equal(self.around, self.before)
        sent = random_bytes(N, seed=7)
        self.mine.array()[:] = sent
        self.alice.write(self.mine, self.theirs).wait(PATIENCE)
        assert np.array_equal(self.bobs.array(), sent)
        self.mine.array()[:] = 0
        self.alice.read(self.theirs, self.mine).wait(PATIENCE)
        assert np.array_equal(self.mine.array(), sent)
        assert np.array_equal(self.around[:N], self.before[:N])
        assert np.array_equal(self.around[2 * N :], self.before[2 * N :])


@pytest.fixture(params=["user", "arena"])
def scene(pair: tuple[Agent, Agent], request: pytest.FixtureRequest) -> Scene:
    """A pair that has moved bytes already, so that what follows meets bound regions too."""
    alice, bob = pair
    around = random_bytes(3 * N, seed=1)
    if request.param == "arena":
        mine, bobs = alice.empty(N, name="mine"), bob.empty(N, name="theirs")
        bobs.array()[:] = around[N : 2 * N]
    else:
        mine = alice.register(np.zeros(N, np.uint8), name="mine")
        bobs = bob.register(around[N : 2 * N], name="theirs")
    theirs = alice.peer("bob")["theirs"]
    alice.read(theirs, mine).wait(PATIENCE)
    return Scene(alice, bob, mine, theirs, bobs, around, around.copy())


def refused(action: Callable[[], Any], kind: type[RaynixlError] | tuple[type[RaynixlError], ...]) -> RaynixlError:
    """Have something refused at once or by the handle it returns; check that the error helps."""
    try:
        result = action()
    except RaynixlError as exc:
        error: RaynixlError = exc
    else:
        assert isinstance(result, Transfer), f"accepted: {result!r}"
        error = error_of(result)
    assert isinstance(error, kind), repr(error)
    assert error.hint, f"no remedy: {error}"
    assert len(str(error)) < 2000
    return error


# Ranges

Select = Callable[[Any], Any]

OUTSIDE: dict[str, Select] = {
    "one byte too long": lambda r: r.span(0, N + 1),
    "one byte too far": lambda r: r.span(1, N),
    "the byte behind the last": lambda r: r.span(N, 1),
    "an offset behind the end": lambda r: r.span(N + 1),
    "a block of many": lambda r: r.blocks([0, N - 63, 64], [64, 64, 64]),
    "a page behind the last": lambda r: r.pages([0, 4], 1024),
    "a page larger than the region": lambda r: r.pages([0], N + 1),
    "raw, by one byte": lambda r: Blocks(r, np.array([[N - 1, 2, 0]], np.uint64)),
    "raw, sum wraps": lambda r: Blocks(r, np.array([[1, 2**64 - 1, 0]], np.uint64)),
    "raw, offset wraps": lambda r: Blocks(r, np.array([[2**64 - 1, 2, 0]], np.uint64)),
    "raw, 2^63 each": lambda r: Blocks(r, np.array([[2**63, 2**63, 0]], np.uint64)),
    "raw, second of two": lambda r: Blocks(r, np.array([[0, 1, 0], [N, 1, 0]], np.uint64)),
} | {
    f"{what} of {number}": select
    for number in HUGE
    for what, select in {
        "offset": lambda r, n=number: r.span(n),
        "length": lambda r, n=number: r.span(0, n),
        "length behind an offset": lambda r, n=number: r.span(8, n - 8),
        "block offset": lambda r, n=number: r.blocks([0, n], [8, 8]),
        "block length": lambda r, n=number: r.blocks([0, 8], [8, n]),
        "page id": lambda r, n=number: r.pages([n], 64),
        "page size": lambda r, n=number: r.pages([0], n),
    }.items()
}  # fmt: skip

NOT_NUMBERS: dict[str, Select] = {
    "negative offset": lambda r: r.span(-1),
    "negative length": lambda r: r.span(0, -1),
    "negative block offset": lambda r: r.blocks([-1], [8]),
    "negative block length": lambda r: r.blocks([0], [-8]),
    "negative page": lambda r: r.pages([-1], 64),
    "negative page size": lambda r: r.pages([0], -64),
    "page size 0": lambda r: r.pages([0], 0),
    "most negative": lambda r: r.span(-(2**63)),
    "negative array": lambda r: r.blocks(np.array([-8, 0]), 8),
    "float offset": lambda r: r.span(0.5),
    "float length": lambda r: r.span(0, 8.0),
    "float blocks": lambda r: r.blocks([0.0], [8]),
    "float lengths": lambda r: r.blocks([0], [8.5]),
    "floats as objects": lambda r: r.blocks(np.array([0.5], object), 8),
    "nan": lambda r: r.span(math.nan),
    "nan blocks": lambda r: r.blocks([math.nan], [8]),
    "infinity": lambda r: r.span(0, math.inf),
    "float page": lambda r: r.pages([0.0], 64),
    "float page size": lambda r: r.pages([0], 64.0),
    "text offset": lambda r: r.span("0"),
    "text length": lambda r: r.span(0, "8"),
    "text blocks": lambda r: r.blocks(["0"], ["8"]),
    "text page size": lambda r: r.pages([0], "64"),
    "nothing as offset": lambda r: r.span(None),
    "nothing as blocks": lambda r: r.blocks(None, None),
    "nothing as page size": lambda r: r.pages([0], None),
    "booleans": lambda r: r.blocks([True], [True]),
    "ragged": lambda r: r.blocks([[1, 2], [3]], [8]),
    "more offsets than lengths": lambda r: r.blocks([0, 8, 16], [8, 8]),
    "a step": lambda r: r[0:8:2],
    "an index": lambda r: r[5],
    "a text index": lambda r: r["5"],
    "a float slice": lambda r: r[0.5:8],
    "a text slice": lambda r: r["0":"8"],
    "a raw list": lambda r: Blocks(r, [[0, 8, 0]]),
    "raw signed": lambda r: Blocks(r, np.array([[0, 8, 0]], np.int64)),
    "raw floats": lambda r: Blocks(r, np.array([[0, 8, 0]], np.float64)),
    "raw of two columns": lambda r: Blocks(r, np.array([[0, 8]], np.uint64)),
    "raw flat": lambda r: Blocks(r, np.array([0, 8, 0], np.uint64)),
    "raw nothing": lambda r: Blocks(r, None),
}


def test_ranges_outside_a_region_are_refused(scene: Scene) -> None:
    for region in (scene.mine, scene.theirs):
        for name, select in OUTSIDE.items():
            error = refused(lambda: select(region), RangeError)  # noqa: B023 - called at once
            assert str(N) in error.message or "64-bit" in error.message, (name, str(error))
    scene.check_unharmed()


def test_the_message_names_region_range_and_remedy(scene: Scene) -> None:
    error = refused(lambda: scene.theirs.blocks([0, N - 7], [8, 8]), RangeError)
    assert "block 1 [4089, 4097)" in error.message
    assert "region 'theirs' of 'bob' of 4096 bytes" in error.message
    error = refused(lambda: scene.mine.span(N + 1), RangeError)
    assert "region 'mine' of 'alice' of 4096 bytes" in error.message
    assert "4097" in error.message


def test_what_is_not_a_number_of_bytes_is_refused(scene: Scene) -> None:
    for region in (scene.mine, scene.theirs):
        for name, select in NOT_NUMBERS.items():
            try:
                refused(lambda: select(region), RangeError)  # noqa: B023 - called at once
            except AssertionError as exc:
                raise AssertionError(f"{name}: {exc}") from exc
    scene.check_unharmed()


def test_blocks_cannot_be_changed_after_they_were_checked(scene: Scene) -> None:
    table = np.array([[0, 8, 0]], np.uint64)
    blocks = Blocks(scene.theirs, table)
    table[0, 0] = N  # would reach behind the region
    assert blocks.table[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        scene.theirs.span(0, 8).table[0, 0] = N
    scene.alice.write(scene.mine[:8], blocks).wait(PATIENCE)
    scene.before[N : N + 8] = scene.around[N : N + 8]
    scene.check_unharmed()


# Operations

Case = tuple[Callable[[Scene], Any], Any]


def changed(remote: RemoteRegion, **fields: Any) -> RemoteRegion:
    """A descriptor that says something else than its owner."""
    return replace(remote, record=remote.record.model_copy(update=fields))


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
    # Descriptors that are not the owner's
    "a larger region": (lambda s: s.alice.read(changed(s.theirs, nbytes=2 * N)[N:], s.mine), IntegrityError),
    "write behind the region": (lambda s: s.alice.write(s.mine, changed(s.theirs, nbytes=2 * N)[N:]), IntegrityError),
    "one byte larger": (lambda s: s.alice.write(s.mine[:1], changed(s.theirs, nbytes=N + 1)[N:]), IntegrityError),
    "2^62 bytes": (lambda s: s.alice.write(s.mine[:1], changed(s.theirs, nbytes=1 << 62)[-1:]), IntegrityError),
    "sums that wrap": (
        lambda s: s.alice.read(changed(s.theirs, nbytes=1 << 62).blocks([0] * 4 + [0], [1 << 62] * 4 + [8]), s.mine[:8]),
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


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_wrong_operation_is_refused(pair: tuple[Agent, Agent], name: str, scene: Scene) -> None:
    action, kind = OPERATIONS[name]
    refused(lambda: action(scene), kind)
    scene.check_unharmed()


TIMEOUTS = {"0": 0, "0.0": 0.0, "negative": -1.0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
            "huge": 1e300, "text": "5", "list": [5], "complex": 5j}  # fmt: skip


def test_timeouts_that_are_no_deadline_are_refused(scene: Scene) -> None:
    s, peer = scene, scene.alice.peer("bob")
    plan = s.alice.prepare("write", s.mine, s.theirs)
    s.bob.serve("echo", lambda _peer, payload: payload)
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
        peer.region("nothing", timeout=0.001)
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


# Regions that are gone, foreign or read-only


def test_a_deregistered_region_of_ours_is_stale(scene: Scene) -> None:
    gone = scene.alice.register(np.zeros(N, np.uint8))
    plan = scene.alice.prepare("write", gone, scene.theirs)
    scene.alice.deregister(gone)
    refused(lambda: scene.alice.write(gone, scene.theirs), RegionStale)
    refused(lambda: plan.post(), RegionStale)
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


# Memory


class _Lying:
    """Says that it has memory, by more than one protocol, and has none."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("nothing here")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


MEMORY: dict[str, tuple[Callable[[], Any], Any]] = {
    "nothing": (lambda: None, ConfigError),
    "a number": (lambda: 5, ConfigError),
    "text": (lambda: "text", ConfigError),
    "a list": (lambda: [1, 2], ConfigError),
    "an object": (object, ConfigError),
    "a class": (lambda: bytearray, ConfigError),
    "a failing protocol": (_Lying, ConfigError),
    "a module of torch": (lambda: torch.nn.Linear(2, 2), ConfigError),
    "a dtype of torch": (lambda: torch.float32, ConfigError),
    "a meta tensor": (lambda: torch.empty(8, device="meta"), ConfigError),
    "a sparse tensor": (lambda: torch.eye(4).to_sparse(), ConfigError),
    "a strided tensor": (lambda: torch.zeros(8, 8)[:, :4], ConfigError),
    "a transposed tensor": (lambda: torch.zeros(4, 8).T, ConfigError),
    "an empty tensor": (lambda: torch.empty(0), RangeError),
    "a strided array": (lambda: np.zeros((8, 8))[:, :4], ConfigError),
    "a reversed array": (lambda: np.zeros(8)[::-1], ConfigError),
    "an array of objects": (lambda: np.array([None, "x"]), ConfigError),
    "an empty array": (lambda: np.zeros(0), RangeError),
    "empty bytes": (lambda: b"", RangeError),
    "a strided view": (lambda: memoryview(bytearray(16))[::2], ConfigError),
    "unmapped memory": (lambda: MemorySpan(4096, 8192), RangeError),
    "memory that ends unmapped": (lambda: MemorySpan(*_half_unmapped()), RangeError),
    "the null address": (lambda: MemorySpan(0, 8), RangeError),
    "a negative address": (lambda: MemorySpan(-4096, 8), RangeError),
    "an address of 2^64": (lambda: MemorySpan(2**64, 8), RangeError),
    "memory that wraps": (lambda: MemorySpan(2**64 - 8, 16), RangeError),
    "memory of 2^63 bytes": (lambda: MemorySpan(4096, 2**63), RangeError),
    "memory of 2^64-1 bytes": (lambda: MemorySpan(4096, 2**64 - 1), RangeError),
    "memory of no bytes": (lambda: MemorySpan(4096, 0), RangeError),
    "memory of negative bytes": (lambda: MemorySpan(4096, -8), RangeError),
    "a float address": (lambda: MemorySpan(4096.0, 8), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "a float length": (lambda: MemorySpan(4096, 8.5), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "a text address": (lambda: MemorySpan("4096", 8), (RangeError, ConfigError)),  # type: ignore[arg-type]
    "no length": (lambda: MemorySpan(4096, None), (RangeError, ConfigError)),  # type: ignore[arg-type]
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE


def _map(pages: int) -> int:
    address = _libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def _half_unmapped() -> tuple[int, int]:
    address = _map(2)
    assert _libc.munmap(address + PAGE, PAGE) == 0
    return address, 2 * PAGE


def test_what_is_not_memory_is_refused(scene: Scene) -> None:
    regions = scene.alice.statistics().regions
    for name, (make, kind) in MEMORY.items():
        try:
            refused(lambda: scene.alice.register(make()), kind)  # noqa: B023 - called at once
        except AssertionError as exc:
            raise AssertionError(f"{name}: {exc}") from exc
    assert scene.alice.statistics().regions == regions
    scene.check_unharmed()


@pytest.mark.parametrize(
    "nbytes", [0, -1, -(2**63), 2**62, 2**63, 2**64, 10**30, 1.5, 4096.0, math.nan, "4096", None, []]
)
def test_arenas_of_impossible_sizes_are_refused(scene: Scene, nbytes: Any) -> None:
    refused(lambda: scene.alice.empty(nbytes), (RangeError, ConfigError))
    scene.check_unharmed()


@pytest.mark.parametrize("kind", ["vram", "", None, 5, MemoryKind.DRAM, "DRAM"])
def test_arenas_of_other_kinds_are_refused(scene: Scene, kind: Any) -> None:
    refused(lambda: scene.alice.empty(N, kind=kind), (ConfigError, BackendUnavailable))
    scene.check_unharmed()


def test_memory_unmapped_after_registration_ends_in_an_error(new_agent: Callable[..., Agent]) -> None:
    """Only process_vm asks the kernel; a plain copy of memory that its owner unmapped ends the process, as in C."""
    alice, bob = new_agent("alice", backends=("shm",)), new_agent("bob", backends=("shm",))
    alice.peer(bob.record())
    kept, address = random_bytes(4 * PAGE), _map(4)
    mine, kept_region = alice.register(np.zeros(4 * PAGE, np.uint8)), bob.register(kept)
    theirs = bob.register(MemorySpan(address, 4 * PAGE)).describe()
    alice.write(mine, theirs).wait(PATIENCE)
    assert _libc.munmap(address + PAGE, 3 * PAGE) == 0
    for action in (lambda: alice.write(mine, theirs), lambda: alice.read(theirs, mine)):
        error = refused(action, RangeError)
        assert "not mapped" in error.message
    alice.write(mine[:PAGE], theirs[:PAGE]).wait(PATIENCE)
    alice.read(kept_region.describe(), mine).wait(PATIENCE)
    assert np.array_equal(mine.array(), kept)
    assert _libc.munmap(address, PAGE) == 0


# Names

GOOD_NAMES = ["a", "trainer-0", "Rollout 3", "数据", "ñandú", "😀🎉", "a/b:c.d#e%20", "x" * 200, "'\"\\", "{0}%s", "e\u0301",
              "null", "-", "..", "shm"]  # fmt: skip
BAD_NAMES: list[Any] = [
    "", " ", "\t", "a ", " a", "a\n", "a\nb", "a\x00b", "\x00", "\x1b[31m", "a\x7f", "\x85a", "a\u2028b", "\ud800", "a\ud800b",
    "a\udfff", "x" * 201, "x" * 10_000, None, 5, b"bytes", ["a"], 1.5,
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


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_names_that_cannot_be_published_are_refused(name: Any, scene: Scene) -> None:
    refused(lambda: Agent(name), ConfigError)
    if name != "":  # no name at all
        refused(lambda: scene.alice.register(bytearray(8), name=name), ConfigError)
        refused(lambda: scene.alice.empty(8, name=name), ConfigError)
    if not isinstance(name, bytes):  # the bytes of a record
        refused(lambda: scene.alice.peer(name), ConfigError)
    refused(lambda: scene.alice.peer("bob")[name], ConfigError)
    scene.check_unharmed()


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


# Closed agents


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

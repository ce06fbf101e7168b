"""Rows put into memory that is not mapped: every byte in its place, lines behind them, failures by the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from agent_scenes import naming
from agent_tools import MIB, PATIENCE, eventually, introduce, make_agent
from lane_tools import TCP
from liveness_tools import pattern
from window_tools import Couple

from raynixl import Agent, AgentClosed, PeerLost, PeerRestarted, RangeError, RegionStale, TransferTimeout
from raynixl.moe.channel import Source
from raynixl.moe.remote_channel import RemoteRows

TOPIC = "lines"
WAYS = ("process_vm", "ucx", "mapped")


@pytest.fixture(autouse=True)
def _leaves_nothing(nothing_left: Callable[[], list[str]]) -> None:
    """Every test of this file is held to it."""


@dataclass
class Peers:
    """A rank that puts, and two that are put to."""

    near: Agent
    others: list[Agent]
    is_arena: bool

    def slot(self, number: int, nbytes: int) -> Any:
        """Make a slot of one of the others; return the window to it and its bytes."""
        other = self.others[number]
        region = other.empty(nbytes) if self.is_arena else other.register(np.zeros(nbytes, np.uint8))
        return self.near.window(region.describe()), region.array()


@pytest.fixture(params=WAYS)
def peers(request: pytest.FixtureRequest, _leaves_nothing: None) -> Iterator[Peers]:
    """Three agents of this process."""
    backend = "ucx" if request.param == "ucx" else "shm"
    with ExitStack() as stack:
        agents = [stack.enter_context(make_agent(name, backends=(backend,))) for name in ("near", "one", "two")]
        introduce(*agents)
        yield Peers(agents[0], agents[1:], request.param == "mapped")


@pytest.fixture
def rows(peers: Peers) -> Iterator[RemoteRows]:
    """What the near rank puts by, with a small outbox at first."""
    made = RemoteRows(peers.near, 4096)
    yield made
    made.close()


def soon() -> float:
    """A deadline that holds on a busy machine."""
    return time.monotonic() + PATIENCE


def source(array: np.ndarray, index: list[int] | None = None) -> Source:
    """Rows of an array, those of an index or all."""
    chosen = None if index is None else np.array(index, np.int32)
    return Source(array.ctypes.data, array.strides[0], array.shape[1] * array.itemsize, chosen)


def matrix(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of random bytes."""
    return pattern(count * width, seed).reshape(count, width)


@pytest.mark.parametrize("widths", [(16,), (1, 7, 4), (14336, 224, 32, 32)])
def test_rows_of_every_field_lie_end_to_end_at_their_places(
    peers: Peers, rows: RemoteRows, widths: tuple[int, ...]
) -> None:
    index = [5, 0, 5, 19, 3]
    starts = np.cumsum([3, *(len(index) * width + 13 for width in widths)])[:-1].tolist()
    window, theirs = peers.slot(0, starts[-1] + len(index) * widths[-1] + 9)
    fields = [matrix(20, width, seed) for seed, width in enumerate(widths)]
    put = rows.start(window, [source(field, index) for field in fields], starts, len(index), deadline=soon())
    assert rows.finish(soon()) == []
    assert (put.error, put.is_under_way, put.is_settled) == (None, False, True)
    wanted = np.zeros(theirs.size, np.uint8)
    for start, field in zip(starts, fields, strict=True):
        chosen = field[index].reshape(-1)
        wanted[start : start + chosen.size] = chosen
    assert np.array_equal(theirs, wanted)
    assert sum(route.transfers for route in peers.near.statistics().routes) == 1


def test_wide_strides_and_rows_without_an_index(peers: Peers, rows: RemoteRows) -> None:
    window, theirs = peers.slot(0, 4096)
    padded = matrix(10, 100)
    narrow = Source(padded.ctypes.data + 20, 100, 30)
    rows.start(window, [narrow], [64], 10, deadline=soon())
    assert rows.finish(soon()) == []
    assert np.array_equal(theirs[64:364].reshape(10, 30), padded[:, 20:50])
    assert not theirs[:64].any()
    assert not theirs[364:].any()


def test_all_puts_start_before_the_first_is_waited_for_and_sources_may_change_then(
    peers: Peers, rows: RemoteRows
) -> None:
    slots = [peers.slot(number % 2, 200_000) for number in range(6)]
    x = matrix(50, 4000)
    puts = []
    for number, (window, _) in enumerate(slots):
        x[:] = number + 1
        puts.append(rows.start(window, [source(x)], [0], 50, deadline=soon()))
    x[:] = 99
    assert rows.finish(soon(), puts[3:4]) == []
    assert not puts[3].is_under_way
    assert rows.finish(soon()) == []
    for number, (_, theirs) in enumerate(slots):
        assert (theirs == number + 1).all()


def test_a_line_is_there_after_the_rows_that_it_follows(peers: Peers, rows: RemoteRows) -> None:
    slots = [peers.slot(number, 300_000) for number in range(2)]
    seen: list[tuple[int, int, bool]] = []

    def hears(number: int, theirs: np.ndarray) -> Callable[[str, bytes], None]:
        return lambda _peer, line: seen.append((number, line[0], bool((theirs == line[0]).all())))

    for number, (_, theirs) in enumerate(slots):
        peers.others[number].deliver(TOPIC, hears(number, theirs))
    x = np.empty((30, 10_000), np.uint8)
    for turn in range(1, 51):
        x[:] = turn
        for window, _ in slots:
            put = rows.start(window, [source(x)], [0], 30, deadline=soon())
            rows.follow(put, TOPIC, bytes([turn]))
        assert rows.finish(soon()) == []
        eventually(lambda: len(seen) == 2 * turn, "both lines")  # noqa: B023
    assert sorted(seen) == [(number, turn, True) for number in range(2) for turn in range(1, 51)]


def test_lines_keep_their_order_and_go_without_rows(peers: Peers, rows: RemoteRows) -> None:
    window, theirs = peers.slot(0, 64)
    x, none = matrix(1, 8), matrix(1, 0)
    empty = rows.start(window, [source(x)], [0], 0, deadline=soon())
    nothing = rows.start(window, [], [], 5, deadline=soon())
    full = rows.start(window, [source(none), source(x)], [0, 8], 1, deadline=soon())
    for number, put in enumerate((empty, nothing, full, full, empty)):
        rows.follow(put, TOPIC, str(number).encode())
    assert rows.finish(soon()) == []
    inbox = peers.others[0].inbox(TOPIC)
    came = [inbox.wait(PATIENCE).payload for _ in range(5)]
    assert [one for one in came if one in {b"2", b"3"}] == [b"2", b"3"]
    assert sorted(came) == [b"0", b"1", b"2", b"3", b"4"]
    assert np.array_equal(theirs[8:16], x[0])
    assert not theirs[:8].any()


def test_a_line_waits_for_all_rows_that_were_put_to_its_peer_before(peers: Peers, rows: RemoteRows) -> None:
    large, small = peers.slot(0, 8 * MIB), peers.slot(0, 64)
    seen: list[tuple[bytes, bool]] = []
    peers.others[0].deliver(TOPIC, lambda _peer, line: seen.append((line, bool((large[1] == 7).all()))))
    x, y = np.full((8, MIB), 7, np.uint8), np.full((1, 64), 8, np.uint8)
    first = rows.start(large[0], [source(x)], [0], 8, deadline=soon())
    second = rows.start(small[0], [source(y)], [0], 1, deadline=soon())
    nothing = rows.start(small[0], [], [], 0, deadline=soon())
    for put, line in ((second, b"1"), (nothing, b"2"), (first, b"3")):
        rows.follow(put, TOPIC, line)
    assert rows.finish(soon(), [nothing, second, first]) == []
    eventually(lambda: len(seen) == 3, "three lines")
    assert all(is_whole for _, is_whole in seen)
    peers.others[0].undeliver(TOPIC)
    broken = rows.start(large[0], [source(x)], [0], 8, deadline=soon())
    behind = rows.start(small[0], [source(y)], [0], 1, deadline=soon())
    broken.fail(TransferTimeout("as if it had been too late"))
    if broken.error is not None:  # a path that copies within `start` is not late
        rows.follow(behind, TOPIC, b"4")
        assert rows.finish(soon(), [behind]) == [behind]
        assert len(seen) == 3
        eventually(lambda: broken.is_settled, "the memory to be let go of")


def test_the_outbox_grows_when_it_must_and_is_used_again(peers: Peers, rows: RemoteRows) -> None:
    slots = [peers.slot(number % 2, MIB) for number in range(4)]
    x = matrix(64, MIB // 64)
    sizes, regions = [], []
    for turn in range(12):
        for window, _ in slots:
            rows.start(window, [source(x)], [0], 1 if turn < 2 else 64, deadline=soon())
        assert rows.finish(soon()) == []
        sizes.append(rows.outbox_nbytes)
        regions.append(peers.near.statistics().regions)
        x += 1
    assert max(sizes) <= 8 * MIB
    assert sizes == sorted(sizes)
    assert set(regions) == {1}
    for _, theirs in slots:
        assert np.array_equal(theirs, (x - 1).reshape(-1))
    rows.close()
    assert rows.outbox_nbytes == 0
    assert peers.near.statistics().regions == 0


def test_rows_that_do_not_fit_are_refused_and_write_nothing(peers: Peers, rows: RemoteRows) -> None:
    window, theirs = peers.slot(0, 100)
    x = matrix(10, 10)
    cases: dict[str, tuple[list[int], int]] = {
        "past the end": ([0], 11), "past the end by one": ([1], 10), "far away": ([1 << 63], 1), "negative": ([-1], 1),
        "too many": ([0], -1), "a place too many": ([0, 50], 1), "no place": ([], 1), "2^64": ([1 << 64], 1),
    }  # fmt: skip
    for case, (places, count) in cases.items():
        with naming(case), pytest.raises(RangeError):
            rows.start(window, [source(x)], places, count, deadline=soon())
    with pytest.raises(RangeError, match="overlap"):
        rows.start(window, [source(x), source(x)], [0, 5], 1, deadline=soon())
    assert rows.finish(soon()) == []
    assert not theirs.any()
    rows.start(window, [source(x)], [0], 10, deadline=soon())
    assert rows.finish(soon()) == []
    assert np.array_equal(theirs, x.reshape(-1))


def test_a_slot_that_is_withdrawn_or_a_peer_that_ends_is_told_by_the_handle(peers: Peers, rows: RemoteRows) -> None:
    region = peers.others[0].empty(100)
    gone = peers.near.window(region.describe())
    kept, theirs = peers.slot(1, 100)
    peers.others[0].deregister(region)
    x = matrix(10, 10)
    puts = [rows.start(window, [source(x)], [0], 10, deadline=soon()) for window in (gone, kept)]
    for put in puts:
        rows.follow(put, TOPIC, b"line")
    rows.finish(soon())
    assert isinstance(puts[0].error, RegionStale)
    assert puts[1].error is None
    assert np.array_equal(theirs, x.reshape(-1))
    assert peers.others[1].inbox(TOPIC).wait(PATIENCE).payload == b"line"
    assert len(peers.others[0].inbox(TOPIC)) == 0
    peers.others[1].close()
    eventually(lambda: not kept.is_usable, "the end of the peer")
    late = rows.start(kept, [source(x)], [0], 10, deadline=soon())
    assert isinstance(late.error, PeerLost)
    rows.follow(late, TOPIC, b"line")
    assert rows.finish(soon(), [late]) == [late]
    peers.near.close()
    with pytest.raises(AgentClosed):
        rows.start(kept, [source(x)], [0], 10, deadline=soon())


@pytest.fixture(params=["shm", "ucx"])
def couple(request: pytest.FixtureRequest, _leaves_nothing: None) -> Iterator[Couple]:
    """A rank here, and one in another process in memory that is not mapped here."""
    with Couple(str(request.param)) as couple:
        yield couple


def test_rows_reach_another_process_and_its_next_life(couple: Couple) -> None:
    rows, x = RemoteRows(couple.near), matrix(100, 1000)
    for seed in (1, 2):
        window = couple.near.window(couple.theirs("user", nbytes=100_000))
        put = rows.start(window, [source(x)], [0], 100, deadline=soon())
        assert rows.finish(soon()) == []
        assert np.array_equal(couple.content("theirs"), x.reshape(-1))
        couple.victim.vanish()
        eventually(lambda: not window.is_usable, "the loss of the peer")  # noqa: B023
        put = rows.start(window, [source(x)], [0], 100, deadline=soon())
        rows.follow(put, TOPIC, b"line")
        assert rows.finish(soon(), [put]) == [put]
        assert isinstance(put.error, PeerLost | PeerRestarted)
        if seed == 1:
            couple.open(couple.victim, "victim")
    rows.close()


def test_a_peer_that_is_killed_amid_rows_fails_its_put_at_once(couple: Couple) -> None:
    rows, x = RemoteRows(couple.near), matrix(64, MIB)
    window = couple.near.window(couple.theirs("user", nbytes=64 * MIB))
    rows.start(window, [source(x)], [0], 64, deadline=soon())
    assert rows.finish(soon()) == []
    killed = threading.Timer(0.01, couple.victim.vanish)
    killed.start()
    began = time.monotonic()
    while True:
        put = rows.start(window, [source(x)], [0], 64, deadline=soon())
        rows.follow(put, TOPIC, b"line")
        if rows.finish(soon(), [put]):
            break
    killed.join(PATIENCE)
    assert isinstance(put.error, PeerLost)
    assert time.monotonic() - began < PATIENCE / 2
    eventually(lambda: put.is_settled, "the memory to be let go of")
    rows.close()


def test_a_frozen_peer_costs_no_more_than_the_deadline_and_gets_no_later_bytes() -> None:
    """Over TCP, where the peer's UCX takes part. The outbox that may still be read is not filled with other rows."""
    with Couple("ucx", TCP, heartbeat_timeout=PATIENCE) as couple, make_agent("two", backends=("ucx",)) as two:
        introduce(couple.near, two)
        nbytes = 16 * MIB
        rows, x = RemoteRows(couple.near, nbytes), np.full((16, MIB), 1, np.uint8)
        frozen = couple.near.window(couple.theirs("user", nbytes=nbytes))
        kept = two.register(np.zeros(nbytes, np.uint8))
        others = couple.near.window(kept.describe())
        rows.start(frozen, [source(x)], [0], 16, deadline=soon())
        assert rows.finish(soon()) == []
        couple.stop()
        began = time.monotonic()
        x[:] = 2
        late = rows.start(frozen, [source(x)], [0], 16, deadline=began + 0.5)
        well = rows.start(others, [source(x)], [0], 16, deadline=soon())
        for put in (late, well):
            rows.follow(put, TOPIC, b"line")
        assert rows.finish(began + 0.5) in ([late], [late, well])
        assert time.monotonic() - began < 3.0
        assert isinstance(late.error, TransferTimeout)
        if well.error is None:
            assert two.inbox(TOPIC).wait(PATIENCE).payload == b"line"
            assert (kept.array() == 2).all()
        for value in (3, 4):
            x[:] = value
            rows.start(others, [source(x)], [0], 16, deadline=soon())
            assert rows.finish(soon()) == []
            assert (kept.array() == value).all()
        couple.resume()
        eventually(lambda: late.is_settled, "UCX to let go of the memory")
        assert set(np.unique(couple.content("theirs")).tolist()) <= {1, 2}
        x[:] = 5
        rows.start(frozen, [source(x)], [0], 16, deadline=soon())
        assert rows.finish(soon()) == []
        assert (couple.content("theirs") == 5).all()
        rows.close()

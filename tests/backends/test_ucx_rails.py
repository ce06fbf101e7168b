"""Several rails: which of them carry a transfer, how it is cut over them, and which of the peer's they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynixl import BackendUnavailable, MemoryKind
from raynixl.backends import ucx_rails
from raynixl.backends.ucx_lane import Lane
from raynixl.backends.ucx_rails import STRIPE_ALIGN, STRIPE_NBYTES, RailChoice, cut
from raynixl.memory import Memory
from raynixl.native import LOST
from raynixl.topology import Nic, NicKind, Place

BASE = 1 << 40


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """Rows of (our region, the peer's, our address, the peer's, nbytes): blocks that do not overlap."""
    sizes = draw(st.lists(st.integers(1, 4 * STRIPE_NBYTES), min_size=1, max_size=12))
    regions = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in sizes]
    starts = np.cumsum([0, *sizes[:-1]]) + draw(st.integers(0, 1 << 20))
    apart = draw(st.integers(-(1 << 30), 1 << 30))
    rows = [
        (ours, theirs, BASE + start, BASE + start + apart, nbytes)
        for (ours, theirs), start, nbytes in zip(regions, starts.tolist(), sizes, strict=True)
    ]
    return np.array(rows, np.uint64)


def whole(rows: np.ndarray, paths: np.ndarray) -> list[tuple[int, ...]]:
    """Put pieces together again that adjoin on both sides and lie in the same regions, whatever their rail."""
    joined: list[list[int]] = []
    for path, ours, theirs, nbytes in rows.tolist():
        mine, far, _ = paths[path].tolist()
        last = joined[-1] if joined else None
        if last and last[:2] == [mine, far] and (last[2] + last[4], last[3] + last[4]) == (ours, theirs):
            last[4] += nbytes
        else:
            joined.append([mine, far, ours, theirs, nbytes])
    return [tuple(one) for one in joined]


@settings(deadline=None)
@given(tables(), st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True))
def test_every_byte_is_cut_once_with_the_same_place_on_both_sides(table: np.ndarray, rails: list[int]) -> None:
    before = table.copy()
    rows, paths = cut(table, rails)
    assert (table == before).all()
    assert rows[:, 3].min() > 0
    one, only = cut(before, rails[:1])
    assert whole(rows, paths) == whole(one, only)
    assert len(rows) <= len(table) + len(rails) - 1
    assert set(rows[:, 0].tolist()) == set(range(len(paths))), "each path is used, and no other"
    assert len({tuple(path) for path in paths.tolist()}) == len(paths)
    assert set(paths[:, 2].tolist()) <= set(rails)


@settings(deadline=None)
@given(tables(), st.lists(st.integers(0, 15), min_size=2, max_size=6, unique=True))
def test_rails_share_what_is_large_and_what_is_small_stays_together(table: np.ndarray, rails: list[int]) -> None:
    rows, paths = cut(table, rails)
    total = int(table[:, 4].sum())
    rail_of = paths[rows[:, 0].astype(np.int64), 2]
    share = {rail: int(rows[rail_of == rail, 3].sum()) for rail in set(rail_of.tolist())}
    assert len(share) == max(1, min(len(rails), total // STRIPE_NBYTES))
    assert max(share.values()) - min(share.values()) <= 2 * STRIPE_ALIGN + len(rails)


def test_one_large_block_on_two_rails_is_two_halves() -> None:
    table = np.array([(0, 0, BASE, 2 * BASE, 8 * STRIPE_NBYTES)], np.uint64)
    rows, paths = cut(table, (3, 5))
    half = 4 * STRIPE_NBYTES
    assert sorted(paths[:, 2].tolist()) == [3, 5]
    assert rows[:, 1:].tolist() == [[BASE, 2 * BASE, half], [BASE + half, 2 * BASE + half, half]]


def test_small_transfers_of_different_memory_are_spread_over_the_rails() -> None:
    used = set()
    for turn in range(8):
        rows, paths = cut(np.array([(0, 0, BASE + turn * STRIPE_ALIGN, BASE, 4096)], np.uint64), (0, 1))
        assert (len(rows), len(paths)) == (1, 1)
        used.add(int(paths[0, 2]))
    assert used == {0, 1}


def nic(device: str, *, node: int = -1, path: str = "", speed: float = 400.0) -> Nic:
    """An active RDMA port."""
    return Nic(device, NicKind.RDMA, is_active=True, numa_node=node, pci_path=path, speed_gbps=speed)


NICS = [nic(f"mlx5_{i}:1", node=i // 2, path=f"pci0000:{i}0/0000:{i}0:01.0/0000:{i}1:00.0") for i in range(4)]
DEVICES = [one.device for one in NICS]
ALL = range(len(NICS))
MEMORY = Memory(MemoryKind.DRAM, 0, BASE, 1 << 20, True, None)


def at(monkeypatch: pytest.MonkeyPatch, **place: Any) -> None:
    """Have memory lie at a place."""
    monkeypatch.setattr(ucx_rails, "memory_place", lambda *_: Place(**place))
    monkeypatch.setattr(ucx_rails, "gpu_place", lambda *_, name: Place(name, **place))


def test_rails_at_the_node_of_the_memory_carry_it(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, numa_node=1)
    choice = RailChoice(())
    assert choice.rails_for(MEMORY, DEVICES, NICS, connected=ALL) == (2, 3)
    said = choice.describe(MEMORY, DEVICES, NICS, connected=ALL)
    assert said == "rails mlx5_2:1, mlx5_3:1: NUMA node 1 as the memory"


def test_the_rail_behind_the_switch_of_a_gpu_carries_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, numa_node=0, pci_path="pci0000:10/0000:10:01.0/0000:12:00.0")
    memory = Memory(MemoryKind.VRAM, 3, BASE, 1 << 20, True, None)
    choice = RailChoice(())
    assert choice.rails_for(memory, DEVICES, NICS, connected=ALL) == (1,)
    said = choice.describe(memory, DEVICES, NICS, connected=ALL)
    assert said == "rail mlx5_1:1: behind the same PCIe switch as GPU 3"


def test_rails_that_the_user_names_are_taken_wherever_the_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, numa_node=1)
    choice = RailChoice(("mlx5_0:1", "mlx5_2:1"))
    assert choice.rails_for(MEMORY, ["mlx5_0:1", "mlx5_2:1"], NICS, connected=(0, 1)) == (0, 1)
    said = choice.describe(MEMORY, ["mlx5_0:1", "mlx5_2:1"], NICS, connected=(0, 1))
    assert said == "rails mlx5_0:1, mlx5_2:1: named in AgentConfig.rails"


def test_one_rail_leaves_the_devices_to_ucx() -> None:
    choice = RailChoice(())
    assert choice.rails_for(MEMORY, [""], NICS, connected=(0,)) == (0,)
    assert choice.describe(MEMORY, [""], NICS, connected=(0,)) == "one rail, whose devices UCX chooses"


def test_all_rails_carry_memory_whose_place_is_not_known_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch)
    choice = RailChoice(())
    assert choice.rails_for(MEMORY, DEVICES, NICS, connected=ALL) == (0, 1, 2, 3)
    assert "none is known to be nearer" in choice.describe(MEMORY, DEVICES, NICS, connected=ALL)
    at(monkeypatch, numa_node=0)
    assert choice.rails_for(MEMORY, DEVICES, NICS, connected=ALL) == (0, 1)


def test_near_rails_that_do_not_reach_the_peer_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, numa_node=1)
    choice = RailChoice(())
    assert choice.rails_for(MEMORY, DEVICES, NICS, connected=(0, 3)) == (3,)
    said = choice.describe(MEMORY, DEVICES, NICS, connected=(0, 3))
    assert said == "rail mlx5_3:1: NUMA node 1 as the memory; mlx5_2:1 reaches no rail of the peer"
    assert choice.rails_for(MEMORY, DEVICES, NICS, connected=(0, 1)) == (0, 1)


def test_the_place_of_memory_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(ucx_rails, "memory_place", lambda *where: looked.append(where) or Place(numa_node=0))
    choice = RailChoice(())
    for _ in range(3):
        choice.rails_for(MEMORY, DEVICES, NICS, connected=ALL)
    assert looked == [(MEMORY.address, MEMORY.nbytes)]


# Which of the peer's rails ours lead to


class FakeEndpoint:
    """An endpoint to a worker."""

    def __init__(self, worker: bytes, transport: str) -> None:
        self.worker = worker
        self.code, self.status = 0, ""
        self.transports = [transport]
        self.window = 0
        self.keys: list[FakeKey] = []

    def unpack(self, key: bytes, _address: int, _nbytes: int) -> FakeKey:
        """Take a key, unless it is a bad one."""
        if key == b"bad":
            raise RuntimeError("bad key")
        self.keys.append(FakeKey(key))
        return self.keys[-1]

    def limit_reads(self, nbytes: int) -> None:
        """Note it."""
        self.window = nbytes

    def close(self, code: int) -> None:
        """Note it."""
        self.code = self.code or code


class FakeKey:
    """A remote key."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.is_destroyed = False

    def destroy(self) -> None:
        """Note it."""
        self.is_destroyed = True


class Reaching:
    """A rail that reaches some workers, over RDMA or over what UCX emulates reads with."""

    def __init__(self, *workers: bytes, over: str = "rc_mlx5/mlx5_0:1") -> None:
        self.workers = workers
        self.over = over
        self.endpoints: list[FakeEndpoint] = []

    def connect(self, worker: bytes) -> FakeEndpoint:
        """Make an endpoint, or say that the worker is out of reach."""
        if worker not in self.workers:
            raise RuntimeError("Destination is unreachable")
        self.endpoints.append(FakeEndpoint(worker, self.over))
        return self.endpoints[-1]


def over_tcp(*workers: bytes) -> Reaching:
    """A rail over which UCX emulates reads."""
    return Reaching(*workers, over="tcp/eth0")


def make_lane(rails: Sequence[Any], workers: Sequence[bytes], readers: Sequence[Any] = ()) -> Lane:
    """A lane to bob; without readers for one that needs none."""
    return Lane("bob", rails, workers, readers.__getitem__)


@pytest.mark.parametrize(
    ("rails", "workers", "ways"),
    [
        ([Reaching(b"a", b"b"), Reaching(b"a", b"b")], [b"a", b"b"], [(0, 0), (1, 1)]),
        ([Reaching(b"a"), Reaching(b"a")], [b"a"], [(0, 0), (1, 0)]),
        ([Reaching(b"a", b"b")], [b"a", b"b"], [(0, 0)]),
        ([Reaching(b"b"), Reaching(b"a")], [b"a", b"b"], [(0, 1), (1, 0)]),
        ([Reaching(b"a"), Reaching(b"b")], [b"b"], [(1, 0)]),
        ([Reaching(), Reaching(b"c"), Reaching(b"c")], [b"a", b"b", b"c"], [(1, 2), (2, 2)]),
    ],
    ids=["pairs", "two to one", "one to two", "in another order", "one reaches nobody", "only the last"],
)
def test_each_rail_leads_to_the_next_of_the_peers_that_it_reaches(
    rails: Sequence[Any], workers: list[bytes], ways: list[tuple[int, int]]
) -> None:
    lane = make_lane(rails, workers)
    assert [(way.rail, way.partner) for way in lane.ways] == ways
    assert all(one.worker == workers[way.partner] for way in lane.ways for one in way.endpoints)  # type: ignore[attr-defined]


def test_a_peer_that_no_rail_reaches_is_unavailable_and_what_to_look_at_is_said() -> None:
    with pytest.raises(BackendUnavailable, match="Destination is unreachable") as caught:
        make_lane([Reaching(), over_tcp()], [b"a"])
    assert "NET_DEVICES" in caught.value.hint


class SomeKeys:
    """Keys of a region at a peer with two rails."""

    address, nbytes = BASE, 4096

    def __init__(self, *packed: bytes) -> None:
        self.packed = packed


def taken(rails: Sequence[Reaching]) -> list[FakeKey]:
    """The keys that endpoints of rails have taken."""
    return [key for rail in rails for one in rail.endpoints for key in one.keys]


def test_keys_are_those_of_the_rails_that_the_endpoints_lead_to() -> None:
    rails = [Reaching(), Reaching(b"a"), Reaching(b"b")]
    keys: dict[int, Any] = make_lane(rails, [b"a", b"b"]).unpack(SomeKeys(b"key of a", b"key of b"))  # type: ignore[assignment, arg-type]
    assert {rail: key.write.packed for rail, key in keys.items()} == {1: b"key of a", 2: b"key of b"}
    assert all(key.read is key.write for key in keys.values())


@pytest.mark.parametrize("packed", [(b"good", b"bad"), (b"good",)], ids=["not taken", "too few"])
@pytest.mark.parametrize("over", ["rc_mlx5/mlx5_0:1", "tcp/eth0"])
def test_keys_that_ucx_does_not_take_leave_nothing_behind(packed: tuple[bytes, ...], over: str) -> None:
    rails = [Reaching(b"a", b"b", over=over) for _ in range(4)]
    lane = make_lane(rails[:2], [b"a", b"b"], rails[2:])
    with pytest.raises(BackendUnavailable, match="keys of 'bob'"):
        lane.unpack(SomeKeys(*packed))  # type: ignore[arg-type]
    assert taken(rails), "those of the first way"
    assert all(key.is_destroyed for key in taken(rails))


def test_an_endpoint_that_fails_takes_the_whole_lane_with_it() -> None:
    rails = [Reaching(b"a"), Reaching(b"a")]
    lane = make_lane(rails, [b"a"])
    assert (lane.is_usable, lane.needs_care) == (True, False)
    rails[1].endpoints[0].status = "Connection reset"
    assert lane.needs_care
    lane.fail()
    assert (lane.is_usable, lane.needs_care) == (False, False)
    assert all(one.code for rail in rails for one in rail.endpoints)


# Where UCX emulates reads, an endpoint of its own posts them


def test_only_emulated_reads_have_an_endpoint_of_their_own_to_the_same_worker_and_a_limit() -> None:
    rails = [Reaching(b"a", b"b"), over_tcp(b"a", b"b")]
    readers = [over_tcp(b"a", b"b"), over_tcp(b"a", b"b")]
    lane = make_lane(rails, [b"a", b"b"], readers)
    rdma, tcp = lane.ways
    assert not readers[0].endpoints
    assert rdma.reader is rdma.writer is rails[0].endpoints[0]
    assert (tcp.writer, tcp.reader) == (rails[1].endpoints[0], readers[1].endpoints[0])
    assert readers[1].endpoints[0].worker == b"b"
    lane.limit_reads(4096)
    assert [one.window for rail in (*rails, *readers) for one in rail.endpoints] == [0, 0, 4096]


def test_writers_and_readers_take_keys_of_their_own_and_all_are_given_back() -> None:
    rails, readers = [over_tcp(b"a")], [over_tcp(b"a")]
    key = make_lane(rails, [b"a"], readers).unpack(SomeKeys(b"key of a"))[0]  # type: ignore[arg-type]
    assert ([key.write], [key.read]) == (taken(rails), taken(readers))
    assert key.write.packed == key.read.packed == b"key of a"  # type: ignore[attr-defined]
    key.destroy()
    assert all(one.is_destroyed for one in taken([*rails, *readers]))


@pytest.mark.parametrize("failing", ["writer", "reader"])
def test_a_lane_of_writers_and_readers_ends_as_one(failing: str) -> None:
    lane = make_lane([over_tcp(b"a"), over_tcp(b"a")], [b"a"], [over_tcp(b"a"), over_tcp(b"a")])
    getattr(lane.ways[1], failing).status = "Connection reset"
    assert lane.needs_care
    lane.fail()
    assert not lane.is_usable
    assert [bool(one.code) for one in lane.endpoints] == [True] * 4


def test_a_worker_that_the_reader_does_not_reach_is_passed_over_and_its_writer_closed() -> None:
    rail, reader = over_tcp(b"a", b"b"), over_tcp(b"b")
    (way,) = make_lane([rail], [b"a", b"b"], [reader]).ways
    assert way.partner == 1
    assert [one.code for one in rail.endpoints] == [LOST, 0]


def test_a_reader_that_cannot_be_made_leaves_no_endpoint_behind() -> None:
    rails, reader = [over_tcp(b"a"), over_tcp(b"a")], over_tcp(b"a")

    def readers(number: int) -> Any:
        if number:
            raise BackendUnavailable("no free port")
        return reader

    with pytest.raises(BackendUnavailable, match="no free port"):
        Lane("bob", rails, [b"a"], readers)  # type: ignore[arg-type]
    assert [one.code for rail in (*rails, reader) for one in rail.endpoints] == [LOST] * 3

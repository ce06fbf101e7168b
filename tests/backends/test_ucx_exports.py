"""What network peers may reach: mapped once and when needed, unmapped for good, and kept for as long as it must be."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from rail_fakes import INCARNATION, FakeLink, FakeRail, FakeReactor, fake_local

from raynixl import BackendUnavailable, MemoryKind, RegionStale
from raynixl.backends.ucx_exports import LINGER_SECONDS, Exports
from raynixl.backends.ucx_key import Keys
from raynixl.memory import Memory
from raynixl.native.ucx import CUDA_MEMORY, HOST_MEMORY

N = 4096
ONE = 7


class Buffer(np.ndarray):
    """Memory of which can be told whether somebody still holds on to it."""


def make_memory(kind: MemoryKind = MemoryKind.DRAM) -> tuple[Memory, weakref.ref[Any]]:
    """Memory to register, and whether it is still there."""
    buffer = np.zeros(N, np.uint8).view(Buffer)
    return Memory(kind, 0, buffer.ctypes.data, N, True, buffer), weakref.ref(buffer)


class Stand:
    """Exports over two fake rails."""

    def __init__(self) -> None:
        self.rails = [FakeRail("first"), FakeRail("second")]
        self.starts = 0
        self.reactor = FakeReactor()
        self.exports = Exports(fake_local(self.reactor), self._start)

    def _start(self) -> Any:
        self.starts += 1
        return self.rails

    def seal(self, link: FakeLink | None = None) -> bytes:
        """The sealed keys of the region, for a peer."""
        return self.exports.sealed(ONE, FakeLink() if link is None else link)  # type: ignore[arg-type]

    @property
    def mapped(self) -> list[int]:
        """How many mappings each rail has."""
        return [rail.mapped for rail in self.rails]


@pytest.fixture
def stand() -> Stand:
    """Exports with one region, which nobody has asked for."""
    made = Stand()
    memory, _ = make_memory()
    made.exports.add(ONE, memory)
    return made


def test_a_region_costs_nothing_until_it_is_needed(stand: Stand) -> None:
    assert (stand.starts, stand.mapped, stand.exports.is_mapped(ONE)) == (0, [0, 0], False)
    stand.seal()
    assert (stand.mapped, stand.exports.is_mapped(ONE)) == ([1, 1], True)
    stand.exports.mappings(ONE)
    stand.seal()
    assert [len(rail.made) for rail in stand.rails] == [1, 1]


def test_the_keys_are_those_of_each_rail_in_order(stand: Stand) -> None:
    keys = Keys.unseal(stand.seal(), incarnation=INCARNATION, region=ONE, nbytes=N)
    assert keys.packed == (f"first:{keys.address}".encode(), f"second:{keys.address}".encode())
    assert [one.span for one in stand.exports.mappings(ONE)] == [(keys.address, N, HOST_MEMORY)] * 2  # type: ignore[attr-defined]


def test_memory_of_a_gpu_is_mapped_as_such(stand: Stand) -> None:
    stand.exports.add(8, make_memory(MemoryKind.VRAM)[0])
    stand.exports.mappings(8)
    assert stand.rails[0].made[0].span[2] == CUDA_MEMORY


def test_threads_that_need_it_at_once_get_the_same_mapping(stand: Stand) -> None:
    stand.rails[0].may_go_on.clear()
    with ThreadPoolExecutor(16) as pool:
        found = [pool.submit(stand.exports.mappings, ONE) for _ in range(8)]
        sealed = [pool.submit(stand.seal) for _ in range(8)]
        assert stand.rails[0].entered.wait(20.0)
        stand.rails[0].may_go_on.set()
        assert len({one.result(20.0) for one in found}) == 1
        assert len({one.result(20.0) for one in sealed}) == 1
    assert [len(rail.made) for rail in stand.rails] == [1, 1]


def test_a_region_that_is_gone_or_never_was_is_stale_and_unmapped(stand: Stand) -> None:
    stand.seal()
    stand.exports.remove(ONE)
    stand.exports.remove(ONE)
    assert stand.mapped == [0, 0]
    for number in (ONE, 99):
        assert stand.exports.is_mapped(number), "to refuse it needs no work"
        with pytest.raises(RegionStale, match=f"region {number} of 'alice'"):
            stand.exports.mappings(number)
        with pytest.raises(RegionStale):
            stand.exports.sealed(number, FakeLink())  # type: ignore[arg-type]


def test_a_region_that_nobody_needed_is_removed_without_a_start(stand: Stand) -> None:
    stand.exports.remove(ONE)
    assert stand.starts == 0


def test_a_region_that_goes_while_it_is_mapped_is_stale_and_leaves_nothing_mapped(stand: Stand) -> None:
    stand.rails[1].may_go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        mapping, waiting = pool.submit(stand.exports.mappings, ONE), None
        assert stand.rails[1].entered.wait(20.0)
        waiting = pool.submit(stand.seal)
        removal = pool.submit(stand.exports.remove, ONE)
        stand.rails[1].may_go_on.set()
        removal.result(20.0)
        for one in (mapping, waiting):
            if one.exception(20.0) is not None:
                assert isinstance(one.exception(), RegionStale)
    assert stand.mapped == [0, 0]


@pytest.mark.parametrize("need", ["mappings", "sealed"])
def test_a_region_that_goes_just_after_it_was_mapped_is_stale(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, need: str
) -> None:
    real = stand.exports._map

    def map_and_lose(*arguments: Any) -> None:
        real(*arguments)
        stand.exports.remove(ONE)

    monkeypatch.setattr(stand.exports, "_map", map_and_lose)
    with pytest.raises(RegionStale):
        stand.exports.mappings(ONE) if need == "mappings" else stand.seal()
    assert stand.mapped == [0, 0]


def test_a_region_that_goes_while_ucx_starts_is_never_mapped(stand: Stand) -> None:
    exports = Exports(fake_local(stand.reactor), lambda: (exports.remove(ONE), stand.rails)[1])  # type: ignore[arg-type,return-value]
    exports.add(ONE, make_memory()[0])
    with pytest.raises(RegionStale, match="meanwhile"):
        exports.mappings(ONE)
    assert stand.mapped == [0, 0]


def test_a_rail_that_fails_leaves_nothing_mapped_and_may_work_the_next_time(stand: Stand) -> None:
    stand.rails[1].fails = True
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="Cannot allocate memory") as caught:
            stand.seal()
        assert "ulimit -l" in caught.value.hint
        assert (stand.mapped, stand.exports.is_mapped(ONE)) == ([0, 0], False)
    stand.rails[1].fails = False
    stand.seal()
    assert stand.mapped == [1, 1]


def test_a_rail_that_packs_no_key_leaves_nothing_mapped(stand: Stand) -> None:
    stand.rails[1].packs_no_key = True
    with pytest.raises(BackendUnavailable, match="no key"):
        stand.seal()
    assert stand.mapped == [0, 0]


def test_when_the_rails_are_closed_every_region_is_unmapped_and_none_is_there(stand: Stand) -> None:
    stand.exports.add(8, make_memory()[0])
    stand.seal()
    stand.exports.mappings(8)
    stand.exports.unmap_all()
    stand.exports.unmap_all()
    assert stand.mapped == [0, 0]
    with pytest.raises(RegionStale):
        stand.seal()


# Memory that is kept after its region has gone


@pytest.fixture
def kept() -> tuple[Stand, weakref.ref[Any]]:
    """Exports of one region, and whether its memory is still held."""
    made = Stand()
    memory, ref = make_memory()
    made.exports.add(ONE, memory)
    return made, ref


def is_held(ref: weakref.ref[Any]) -> bool:
    """Whether somebody holds on to memory."""
    gc.collect()
    return ref() is not None


def test_memory_is_let_go_at_once_when_every_peer_has_let_go_of_it(kept: tuple[Stand, weakref.ref[Any]]) -> None:
    stand, ref = kept
    stand.seal(FakeLink())
    assert is_held(ref)
    stand.exports.remove(ONE)
    assert not is_held(ref)


def test_memory_is_kept_for_a_while_after_a_peer_of_another_host_died(kept: tuple[Stand, weakref.ref[Any]]) -> None:
    stand, ref = kept
    link = FakeLink()
    stand.seal(link)
    link.die(has_hung_up=True)
    stand.exports.remove(ONE)
    stand.reactor.pass_seconds(LINGER_SECONDS - 0.01)
    assert is_held(ref)
    stand.reactor.pass_seconds(0.02)
    assert not is_held(ref)


@pytest.mark.parametrize("was_long_ago", [False, True])
def test_a_peer_that_died_just_now_counts_although_another_has_asked_since(
    kept: tuple[Stand, weakref.ref[Any]], was_long_ago: bool
) -> None:
    stand, ref = kept
    link = FakeLink()
    stand.seal(link)
    link.die(has_hung_up=True)
    stand.seal(FakeLink("later"))
    if was_long_ago:
        stand.exports._exports[ONE].died_at -= LINGER_SECONDS
    stand.exports.remove(ONE)
    assert is_held(ref) == (not was_long_ago)
    stand.reactor.pass_seconds(LINGER_SECONDS + 0.01)
    assert not is_held(ref)


def test_memory_is_kept_until_the_end_after_a_peer_that_was_given_up_alive(
    kept: tuple[Stand, weakref.ref[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    stand, ref = kept
    frozen, dead = FakeLink("frozen"), FakeLink("dead")
    for link, has_hung_up in ((frozen, False), (dead, True)):
        stand.seal(link)
        link.die(has_hung_up=has_hung_up)
    with caplog.at_level(logging.WARNING):
        stand.exports.remove(ONE)
    assert "frozen did not let go of memory of 'alice'" in caplog.text
    stand.reactor.pass_seconds(1e6)
    stand.exports.unmap_all()
    assert is_held(ref)
    stand.exports.forget_all()
    assert not is_held(ref)


def test_a_peer_that_was_given_up_is_not_forgotten_for_those_who_came_after(
    kept: tuple[Stand, weakref.ref[Any]],
) -> None:
    stand, ref = kept
    frozen = FakeLink("frozen")
    stand.seal(frozen)
    frozen.die(has_hung_up=False)
    for _ in range(3):
        stand.seal(FakeLink("later"))
    stand.exports.remove(ONE)
    stand.reactor.pass_seconds(1e6)
    assert is_held(ref)


def test_a_process_of_this_host_is_no_reason_to_keep_memory(kept: tuple[Stand, weakref.ref[Any]]) -> None:
    stand, ref = kept
    link = FakeLink(pid=1234)
    stand.seal(link)
    link.die(has_hung_up=False)
    stand.exports.remove(ONE)
    assert not is_held(ref)


def test_peers_that_come_and_die_are_not_all_remembered(kept: tuple[Stand, weakref.ref[Any]]) -> None:
    stand, _ = kept
    for _ in range(100):
        link = FakeLink()
        stand.seal(link)
        link.die(has_hung_up=True)
    stand.seal(FakeLink())
    assert len(stand.exports._exports[ONE].links) == 1


def test_regions_of_many_threads_come_and_go_without_a_mapping_left(stand: Stand) -> None:
    def churn(first: int) -> None:
        for number in range(first, first + 50):
            stand.exports.add(number, make_memory()[0])
            stand.exports.mappings(number)
            stand.exports.remove(number)

    threads = [threading.Thread(target=churn, args=(1000 * turn,)) for turn in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert stand.mapped == [0, 0]
    assert all(len(rail.made) == 200 for rail in stand.rails)

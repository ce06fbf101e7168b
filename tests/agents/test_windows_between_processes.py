"""Windows to another process, mapped (shm) or not (ucx): killed, frozen, withdrawn and restarted peers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from agent_tools import PATIENCE, error_of, eventually, random_bytes
from conftest import mapped_arenas
from lane_tools import TCP
from window_tools import Couple, store, table

from raynixl import PeerLost, PeerRestarted, RegionStale, TransferTimeout
from raynixl.native import LOST

N = 8192


@pytest.fixture(params=["shm", "ucx"])
def couple(request: pytest.FixtureRequest, _leaves_nothing: None) -> Iterator[Couple]:
    """Two processes over one backend."""
    with Couple(str(request.param)) as couple:
        yield couple


def check_bytes(couple: Couple, name: str, seed: int) -> None:
    """A window opened now carries bytes to a region of the victim."""
    window = couple.near.window(couple.near.peer("victim")[name], timeout=PATIENCE)
    sent = random_bytes(N, seed)
    mine = couple.near.register(sent)
    if window.is_mapped:
        assert store(couple.near, window, 0, sent) == 0
    else:
        half = N // 2
        window.write(mine, table((0, half, half), (half, 0, half)), timeout=PATIENCE).wait(PATIENCE)
        sent = np.roll(sent, half)
    assert np.array_equal(couple.content(name), sent)
    couple.near.deregister(mine)


def test_bytes_arrive_mapped_or_not(couple: Couple) -> None:
    window = couple.near.window(couple.theirs())
    assert window.is_mapped == (couple.backend == "shm")
    assert (window.address != 0) == window.is_mapped
    check_bytes(couple, "theirs", 1)
    mine = couple.near.empty(N)
    mine.array()[:] = 3
    window.write(mine, table((0, 5, 10), (20, 100, 7))).wait(PATIENCE)  # any path writes
    seen = couple.content("theirs")
    assert (seen[5:15] == 3).all()
    assert (seen[100:107] == 3).all()
    assert int((seen == 3).sum()) < 200


def test_a_window_of_a_killed_peer_says_so_and_nothing_of_it_stays_mapped(couple: Couple) -> None:
    mapped = mapped_arenas()
    window = couple.near.window(couple.theirs())
    couple.victim.vanish()
    eventually(lambda: window.error is not None, "the loss of the peer")
    assert isinstance(window.error, PeerLost)
    assert window.error.peer == "victim"
    assert not window.is_usable
    if window.is_mapped:
        assert store(couple.near, window, 0, np.zeros(8, np.uint8)) == LOST
    mine = couple.near.register(np.zeros(N, np.uint8))
    with pytest.raises(PeerLost):
        window.write(mine, table((0, 0, 8)))
    with pytest.raises(PeerLost):
        couple.near.window(window.remote, timeout=1.0)
    eventually(lambda: mapped_arenas() == mapped, "the arena of the dead to be unmapped")


def test_a_restarted_peer_is_another_one(couple: Couple) -> None:
    old = couple.near.window(couple.theirs())
    couple.victim.vanish()
    couple.open(couple.victim, "victim")
    couple.theirs()
    check_bytes(couple, "theirs", 2)
    assert isinstance(old.error, PeerLost | PeerRestarted)
    with pytest.raises(PeerRestarted):
        couple.near.window(old.remote)


def test_a_window_of_a_withdrawn_region_is_stale(couple: Couple) -> None:
    window = couple.near.window(couple.theirs())
    assert couple.victim.ask("withdraw", "theirs"), "memory was written after deregister"
    assert isinstance(window.error, RegionStale)
    with pytest.raises(RegionStale):
        window.write(couple.near.register(np.zeros(8, np.uint8)), table((0, 0, 8)))
    with pytest.raises(RegionStale):
        couple.near.window(window.remote)
    couple.theirs(name="next")
    check_bytes(couple, "next", 3)


def test_a_window_of_a_frozen_peer_serves_until_it_is_given_up_and_a_new_one_after_that(couple: Couple) -> None:
    window = couple.near.window(couple.theirs())
    mine = couple.near.register(np.full(N, 7, np.uint8))
    window.write(mine, table((0, 50, 50))).wait(PATIENCE)
    couple.stop()
    began = time.monotonic()
    window.write(mine, table((0, 0, 50))).wait(PATIENCE)  # the kernel copies: it needs nothing of the frozen
    eventually(lambda: window.error is not None, "the frozen peer to be given up")
    assert time.monotonic() - began > 0.5 * couple.near.config.heartbeat_timeout
    assert isinstance(window.error, PeerLost)
    with pytest.raises(PeerLost):
        window.write(mine, table((0, 100, 100)))
    couple.resume()
    seen = couple.content("theirs")
    assert (seen[:100] == 7).all()
    assert not (seen[100:200] == 7).all()
    check_bytes(couple, "theirs", 4)
    assert not window.is_usable


def test_a_frozen_peer_has_no_window_by_the_deadline(couple: Couple) -> None:
    theirs = couple.theirs()
    couple.near.notify("victim", b"connected")
    couple.stop()
    began = time.monotonic()
    with pytest.raises((TransferTimeout, PeerLost)):
        couple.near.window(theirs, timeout=0.3)
    assert time.monotonic() - began < PATIENCE / 2
    couple.resume()
    check_bytes(couple, "theirs", 5)


def test_a_wait_for_a_window_that_is_interrupted_leaves_nothing_behind(couple: Couple) -> None:
    """The consent comes later, with a descriptor that nobody waits for."""
    theirs = couple.theirs()
    couple.near.notify("victim", b"connected")
    couple.stop()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            couple.near.window(theirs, timeout=PATIENCE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    couple.resume()
    check_bytes(couple, "theirs", 6)


def test_a_path_that_was_reset_is_made_anew_by_the_next_write() -> None:
    with Couple("ucx", TCP, heartbeat_timeout=PATIENCE) as couple:
        window = couple.near.window(couple.theirs(nbytes=8 << 20))
        mine = couple.near.register(np.full(8 << 20, 7, np.uint8))
        couple.stop()
        late = window.write(mine, table((0, 0, 8 << 20)), timeout=0.2)
        assert isinstance(error_of(late), TransferTimeout)
        couple.resume()
        eventually(lambda: window._binding.gate.code == LOST, "the path to be reset")
        assert window.is_usable
        mine.array()[:] = 9
        window.write(mine, table((0, 0, 8 << 20)), timeout=PATIENCE).wait(PATIENCE)
        assert (couple.content("theirs") == 9).all()
        assert couple.victim.ask("withdraw", "theirs")
        assert isinstance(error_of(window.write(mine, table((0, 0, 8)))), RegionStale)

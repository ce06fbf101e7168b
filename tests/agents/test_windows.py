"""Windows within one process: addresses where memory is mapped, writes anywhere, and an end with its region."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from agent_scenes import changed, naming, refused
from agent_tools import PATIENCE, error_of, eventually, introduce, random_bytes
from conftest import mapped_arenas
from window_tools import store, table

from raynixl import (
    Agent,
    AgentClosed,
    ConfigError,
    IntegrityError,
    PeerUnknown,
    RangeError,
    RaynixlError,
    RegionReadOnly,
    RegionStale,
    RegionUnknown,
)
from raynixl.agents.window import Window
from raynixl.native import STALE

N = 4096


def open_pair(pair: tuple[Agent, Agent]) -> tuple[Window, Any]:
    """A window of Alice to an arena of Bob, and Bob's bytes."""
    alice, bob = pair
    region = bob.empty(N, name="theirs")
    return alice.window(alice.peer("bob")["theirs"]), region.array()


def test_what_is_stored_at_the_address_is_there_for_the_peer(pair: tuple[Agent, Agent]) -> None:
    window, theirs = open_pair(pair)
    assert (window.is_mapped, window.is_usable, window.error) == (True, True, None)
    sent = random_bytes(1000, seed=3)
    assert store(pair[0], window, 17, sent) == 0
    assert np.array_equal(theirs[17:1017], sent)
    assert not theirs[:17].any()
    assert not theirs[1017:].any()
    theirs[:] = 5
    seen = np.empty(N, np.uint8)
    pair[0].native.copy(seen.ctypes.data, window.address, N)
    assert (seen == 5).all()


def test_a_table_of_blocks_is_written_and_nothing_else(pair: tuple[Agent, Agent]) -> None:
    window, theirs = open_pair(pair)
    mine = pair[0].register(random_bytes(N, seed=4))
    order = np.random.default_rng(0).permutation(N // 16)[:100]
    rows = np.stack([np.arange(100) * 16 + 3, order * 16, np.arange(100) % 16], axis=1).astype(np.uint64)
    window.write(mine, rows).wait(PATIENCE)
    wanted = np.zeros(N, np.uint8)
    for ours, there, nbytes in rows.astype(int).tolist():
        wanted[there : there + nbytes] = mine.array()[ours : ours + nbytes]
    assert np.array_equal(theirs, wanted)


def test_memory_that_is_no_arena_is_mapped_only_within_the_process(pair: tuple[Agent, Agent], backend: str) -> None:
    alice, bob = pair
    theirs = bob.register(np.zeros(N, np.uint8), name="plain")
    window = alice.window(alice.peer("bob")["plain"])
    assert window.is_mapped == (backend == "loopback")
    assert (window.address != 0) == window.is_mapped
    assert window.path == {"loopback": "memory", "shm": "process_vm"}[backend]
    mine = alice.register(random_bytes(N))
    window.write(mine, table((0, 10, 100)), timeout=PATIENCE).wait(PATIENCE)
    assert np.array_equal(theirs.array()[10:110], mine.array()[:100])


def test_an_agent_has_a_window_to_its_own_region(pair: tuple[Agent, Agent]) -> None:
    alice, _ = pair
    mine = alice.empty(N, name="mine")
    window = alice.window(mine.describe())
    assert window.is_mapped
    assert store(alice, window, 0, random_bytes(N, seed=5)) == 0
    assert np.array_equal(mine.array(), random_bytes(N, seed=5))
    alice.deregister(mine)
    assert isinstance(window.error, RegionStale)


def test_windows_opened_by_many_threads_share_one_mapping(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.empty(64 * N, name="theirs")
    theirs = alice.peer("bob")["theirs"]
    before = mapped_arenas()
    with ThreadPoolExecutor(8) as pool:
        windows = list(pool.map(lambda _: alice.window(theirs, timeout=PATIENCE), range(32)))
    assert len({window.address for window in windows}) == 1
    assert mapped_arenas() - before <= 64 * N


def test_its_owner_waits_for_those_inside_and_then_nothing_is_mapped(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    region = bob.empty(64 * N, name="theirs")
    window = alice.window(alice.peer("bob")["theirs"])
    held, mapped, nines = region.array(), mapped_arenas(), np.full(N, 9, np.uint8)
    (gate,) = window.gates
    assert gate.enter() == 0
    ending = threading.Thread(target=bob.deregister, args=(region,))
    ending.start()
    try:
        eventually(lambda: window.error is not None, "the withdrawal to arrive")
        assert ending.is_alive()
        alice.native.copy(window.address, nines.ctypes.data, N)  # still mapped
    finally:
        gate.leave()
        ending.join(PATIENCE)
    assert not ending.is_alive()
    assert (held[:N] == 9).all()
    assert isinstance(window.error, RegionStale)
    assert "look it up again" in window.error.hint
    assert window.error.peer == "bob"
    assert store(alice, window, 0, np.zeros(8, np.uint8)) == STALE
    assert isinstance(window.translate(STALE), RegionStale)
    mine = alice.empty(N)
    with pytest.raises(RegionStale, match="'theirs'"):
        window.write(mine, table((0, 0, 8)))
    del held
    shared = 64 * N if window.path == "mapped" else 0
    eventually(lambda: mapped_arenas() <= mapped - shared + N, "the peer's arena to be unmapped")
    with pytest.raises(RegionStale):
        alice.window(window.remote)


def test_a_region_under_the_same_name_is_another_window(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    first = bob.empty(N, name="again")
    old = alice.window(alice.peer("bob")["again"])
    bob.deregister(first)
    second = bob.empty(N, name="again")
    new = alice.window(alice.peer("bob")["again"])
    assert (old.is_usable, new.is_usable) == (False, True)
    assert store(alice, new, 0, random_bytes(N)) == 0
    assert np.array_equal(second.array(), random_bytes(N))


def test_a_window_of_a_closed_agent_says_which_was_closed(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    window, _ = open_pair(pair)
    back = bob.window(alice.empty(N, name="back").describe())
    alice.close()
    assert isinstance(window.error, AgentClosed)
    eventually(lambda: back.error is not None, "the end of the peer")
    assert not isinstance(back.error, AgentClosed)
    assert back.error is not None
    assert back.error.peer == "alice"
    with pytest.raises(AgentClosed):
        alice.window(window.remote)
    assert "closed" in repr(window)


def test_tables_that_do_not_fit_are_refused_and_write_nothing(pair: tuple[Agent, Agent]) -> None:
    window, theirs = open_pair(pair)
    mine = pair[0].register(np.full(N, 7, np.uint8))
    tables: dict[str, Any] = {
        "past the end here": table((N - 7, 0, 8)),
        "past the end there": table((0, N - 7, 8)),
        "far past the end": table((0, 2**63, 8)),
        "wrapping around": table((0, 2**64 - 4, 8)),
        "a good row and a bad": table((0, 0, 8), (0, N, 1)),
        "overlapping": table((0, 0, 8), (8, 4, 8)),
        "without bytes": table((0, 0, 0)),
        "without rows": table(),
        "two columns": np.zeros((3, 2), np.uint64),
        "flat": np.zeros(3, np.uint64),
        "negative": np.array([[0, -1, 8]]),
        "fractions": np.array([[0, 0.5, 8]]),
        "text": "abc",
        "nothing": None,
    }
    for case, rows in tables.items():
        with naming(case):
            refused(lambda: window.write(mine, rows), RangeError)  # noqa: B023 - called at once
    assert not theirs.any()
    window.write(mine, np.array([[0, 0, 8]])).wait(PATIENCE)
    assert theirs.sum() == 56


def test_wrong_regions_are_refused(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    window, theirs = open_pair(pair)
    gone = alice.empty(N)
    alice.deregister(gone)
    rows = table((0, 0, 8))
    refused(lambda: window.write(gone, rows), RegionStale)
    refused(lambda: window.write(bob.empty(N), rows), RegionUnknown)
    refused(lambda: window.write(window.remote, rows), ConfigError)  # type: ignore[arg-type]
    refused(lambda: window.write(None, rows), ConfigError)  # type: ignore[arg-type]
    frozen = np.zeros(N, np.uint8)
    frozen.flags.writeable = False
    bob.register(frozen, name="frozen")
    refused(lambda: alice.window(alice.peer("bob")["frozen"]).write(alice.empty(N), rows), RegionReadOnly)
    assert not theirs.any()


def test_descriptors_that_lie_give_no_window(pair: tuple[Agent, Agent], new_agent: Callable[..., Agent]) -> None:
    alice, bob = pair
    theirs = bob.empty(N, name="theirs").describe()
    cases: dict[str, tuple[Any, type[RaynixlError]]] = {
        "ours": (alice.empty(N), ConfigError),
        "nothing": (None, ConfigError),
        "blocks": (theirs[:8], ConfigError),
        "a name": ("theirs", ConfigError),
        "larger": (changed(theirs, nbytes=1 << 40), IntegrityError),
        "another generation": (changed(theirs, generation=theirs.generation + 1), RegionStale),
        "another number": (changed(theirs, id=theirs.id + 1000), RaynixlError),
    }
    for case, (remote, kind) in cases.items():
        with naming(case), pytest.raises(kind):
            alice.window(remote)
    carol = new_agent("carol", backends=alice.config.backends)
    with pytest.raises(PeerUnknown):
        bob.window(changed(carol.empty(N).describe()))
    with pytest.raises(ConfigError):
        alice.window(theirs, timeout=-1)
    assert alice.window(theirs).is_usable


def test_the_polling_thread_must_not_wait_for_a_window(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    theirs = bob.empty(N, name="theirs").describe()

    def opens(_peer: str, _payload: bytes) -> bytes:
        alice.window(theirs)
        return b""

    alice.serve("open", opens, threaded=False)
    with pytest.raises(ConfigError, match="must not wait"):
        bob.ask("alice", "open").wait(PATIENCE)
    alice.window(theirs)
    assert bob.ask("alice", "open").wait(PATIENCE) == b""  # bound by now: nothing is waited for


def test_a_write_in_flight_ends_with_its_region(new_agent: Callable[..., Agent]) -> None:
    """Separate words over process_vm take long enough to be ended by force."""
    alice, bob = (new_agent(n, backends=("shm",), inline_nbytes=0, deregister_timeout=0.05) for n in ("alice", "bob"))
    introduce(alice, bob)
    words = 300_000
    theirs = bob.register(np.zeros(words * 16, np.uint8))
    mine = alice.register(np.ones(words * 16, np.uint8))
    window = alice.window(theirs.describe())
    starts = np.arange(words, dtype=np.uint64) * 16
    transfer = window.write(mine, np.stack([starts, starts, np.full(words, 8, np.uint64)], axis=1))
    assert not transfer.done
    bob.deregister(theirs)
    assert isinstance(error_of(transfer), RaynixlError)
    assert not window.is_usable

"""Deregistering: transfers in flight end first, peers let go, and the name may be given again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from agent_process import far_agent
from agent_tools import PATIENCE, error_of, eventually, random_bytes

from raynixl import Agent, BackendUnavailable, PeerLost, RegionStale, RegionUnknown
from raynixl.native import STALE

N = 4096
WORDS = 300_000


def test_transfers_in_flight_end_before_deregister_returns(new_agent: Callable[..., Agent]) -> None:
    """Half a second of separate words over process_vm: deregister waits for them, and all are there."""
    alice, bob = (
        new_agent(n, backends=("shm",), inline_nbytes=0, deregister_timeout=PATIENCE) for n in ("alice", "bob")
    )
    alice.peer(bob.record())
    source = np.ones(WORDS * 16, np.uint8)
    region, near = bob.register(source), alice.register(np.zeros(WORDS * 16, np.uint8))
    starts = np.arange(WORDS) * 16
    alice.read(region.describe()[:1], near[:1]).wait(PATIENCE)
    transfer = alice.read(region.describe().blocks(starts, 8), near.blocks(starts, 8))
    assert not transfer.done
    bob.deregister(region)
    source[:] = 77  # ours again
    transfer.wait(PATIENCE)
    assert int(near.array().sum()) == WORDS * 8
    assert isinstance(error_of(alice.read(region.describe(), near)), RegionStale)


def test_a_transfer_that_outlasts_the_deadline_is_ended_by_force(new_agent: Callable[..., Agent]) -> None:
    alice, bob = (new_agent(n, backends=("shm",), inline_nbytes=0, deregister_timeout=0.05) for n in ("alice", "bob"))
    alice.peer(bob.record())
    region, near = bob.register(np.ones(WORDS * 64, np.uint8)), alice.register(np.zeros(WORDS * 64, np.uint8))
    starts = np.arange(WORDS * 4) * 16
    alice.read(region.describe()[:1], near[:1]).wait(PATIENCE)
    transfer = alice.read(region.describe().blocks(starts, 8), near.blocks(starts, 8))
    assert not transfer.done
    bob.deregister(region)
    assert isinstance(error_of(transfer), RegionStale | PeerLost)


def test_a_frozen_peer_loses_its_connection_and_holds_nobody_up_for_long(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",), deregister_timeout=0.3)
    with far_agent("bob") as far:
        bob = alice.peer(far.record)
        alice.register(bytearray(N), name="kept")
        region = alice.empty(N, name="gone")
        alice.control.ask(
            alice.connector.connect("bob", time.monotonic() + PATIENCE), "raynixl.record", b"", 5.0
        ).wait()
        alice.regions.add_importer(region.id, alice.connector.current("bob").link)  # type: ignore[union-attr]
        far.stop()
        began = time.monotonic()
        alice.deregister(region)
        assert 0.25 < time.monotonic() - began < PATIENCE
        assert isinstance(alice.lost("bob"), PeerLost)
        assert "did not let go" in str(alice.lost("bob"))
        far.resume()
        bob.connect()
        assert bob.is_connected


def test_a_name_is_given_again_with_a_higher_generation(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine = alice.register(np.zeros(N, np.uint8))
    for generation in range(1, 6):
        region = bob.empty(N, name="again")
        region.array()[:] = generation
        found = alice.peer("bob")["again"]
        assert found.generation == generation
        alice.read(found, mine).wait(PATIENCE)
        assert mine.array()[-1] == generation
        bob.deregister(region)
        assert not region.is_registered
        with pytest.raises(RegionUnknown):
            alice.peer("bob").region("again")


def test_regions_without_names_come_and_go_while_others_are_used(pair: tuple[Agent, Agent]) -> None:
    """Every transfer either moves the bytes of the region that it names, or says that it is stale."""
    alice, bob = pair
    mine = alice.register(np.zeros(N, np.uint8))
    stop = threading.Event()
    failures: list[object] = []
    current: list[object] = [None]

    def churn() -> None:
        try:
            for value in range(1, 151):
                region = bob.empty(N) if value % 2 else bob.register(bytearray(N))
                region.array()[:] = value
                current[0] = (value, region.describe())
                bob.deregister(region) if value % 3 else None
        except BaseException as exc:  # noqa: BLE001 - told to the test
            failures.append(exc)
        finally:
            stop.set()

    thread = threading.Thread(target=churn)
    thread.start()
    moved = 0
    while not stop.is_set() or moved == 0:
        if current[0] is None:
            continue
        value, region = current[0]  # type: ignore[misc]
        transfer = alice.read(region, mine)
        try:
            transfer.wait(PATIENCE)
            moved += 1
            assert mine.array()[0] == mine.array()[-1] == value
        except RegionStale:
            continue
    thread.join(PATIENCE)
    assert not failures, failures


def test_a_region_withdrawn_between_consent_and_binding_is_never_used(pair: tuple[Agent, Agent]) -> None:
    """The owner withdraws right after its consent, before the asker has noted the binding."""
    alice, bob = pair
    mine = alice.register(random_bytes(N))
    alice.peer("bob").connect()
    region = bob.register(bytearray(N))
    backend = alice.backends[0]
    bind = backend.bind

    def withdraw_first(link: object, remote: object, fds: object) -> object:
        if region.is_registered:
            thread = threading.Thread(target=bob.deregister, args=(region,))
            thread.start()
            thread.join(PATIENCE)
        return bind(link, remote, fds)  # type: ignore[arg-type]

    backend.bind = withdraw_first  # type: ignore[assignment,method-assign]
    assert isinstance(error_of(alice.write(mine, region.describe())), RegionStale | BackendUnavailable)
    assert not region.array().any()
    connection = alice.connector.current("bob")
    assert connection is not None
    assert not connection.bindings


def test_a_region_withdrawn_while_it_is_looked_up_is_not_remembered(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    connection = alice.connector.connect("bob", time.monotonic() + PATIENCE)
    region = bob.empty(N, name="far")
    remember = connection.remember

    def late(*args: object) -> None:
        bob.deregister(region)
        remember(*args)  # type: ignore[arg-type]

    connection.remember = late  # type: ignore[method-assign]
    alice.peer("bob").region("far")
    assert connection.regions == {}
    del connection.remember  # it holds on to the region


def test_deregistering_ours_ends_our_own_transfers_first(new_agent: Callable[..., Agent]) -> None:
    alice, bob = (
        new_agent(n, backends=("shm",), inline_nbytes=0, deregister_timeout=PATIENCE) for n in ("alice", "bob")
    )
    alice.peer(bob.record())
    region, near = bob.register(np.ones(WORDS * 16, np.uint8)), alice.register(np.zeros(WORDS * 16, np.uint8))
    starts = np.arange(WORDS) * 16
    alice.read(region.describe()[:1], near[:1]).wait(PATIENCE)
    transfer = alice.read(region.describe().blocks(starts, 8), near.blocks(starts, 8))
    alice.deregister(near)
    transfer.wait(PATIENCE)
    assert near.gate.code == STALE
    assert near.gate.inflight == 0
    eventually(lambda: alice.statistics().regions == 0, "it is gone")

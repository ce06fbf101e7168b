"""Backends without messages, beside one that has them: what is bound over which, and what ends with the connection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from agent_tools import KIB, PATIENCE, error_of, eventually, random_bytes
from silent_tools import OnGpu, SilentBackend, silent_agents

from raynixl import Agent, BackendUnavailable, PeerLost, Region, RegionStale

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def agents() -> Iterator[Any]:
    """Alice and Bob over shm and two silent backends."""
    with silent_agents("alice", "bob") as made:
        yield made


def silent(agent: Agent, name: str = "silent") -> SilentBackend:
    """An agent's silent backend."""
    found = agent.backend(name)
    assert isinstance(found, SilentBackend)
    return found


def host_region(agent: Agent, nbytes: int, name: str) -> Region:
    """A region of an arena that holds random bytes."""
    region = agent.empty(nbytes, name=name)
    region.array()[:] = random_bytes(nbytes, seed=len(name))
    return region


def test_a_region_is_bound_over_one_backend_for_each_kind_on_our_side(agents: Any) -> None:
    alice, bob = agents
    theirs = host_region(bob, 64 * KIB, "theirs")
    on_gpu = OnGpu(64 * KIB)
    on_host, on_device = alice.empty(64 * KIB), alice.register(on_gpu)
    remote = alice.peer("bob")["theirs"]
    alice.read(remote, on_host).wait(PATIENCE)
    alice.read(remote, on_device).wait(PATIENCE)
    assert np.array_equal(on_host.array(), theirs.array())
    assert np.array_equal(on_gpu.bytes, theirs.array())
    assert alice.explain(remote, on_host).backend == "shm"
    assert alice.explain(remote, on_device).backend == "silent"
    assert len(silent(alice).bound) == 1


def test_deregister_closes_every_binding_of_a_region(agents: Any) -> None:
    alice, bob = agents
    theirs = host_region(bob, 4 * KIB, "theirs")
    on_host, on_device = alice.empty(4 * KIB), alice.register(OnGpu(4 * KIB))
    remote = alice.peer("bob")["theirs"]
    plans = [alice.prepare("read", remote, mine) for mine in (on_host, on_device)]
    for plan in plans:
        plan.post().wait(PATIENCE)
    bob.deregister(theirs)
    assert all(binding.gate.code for binding in silent(alice).bound)
    for plan in plans:
        assert isinstance(error_of(plan.post()), RegionStale)


def test_notifications_come_after_the_bytes_over_the_link_that_has_messages(agents: Any) -> None:
    alice, bob = agents
    target = OnGpu(4 * KIB)
    bob.register(target, name="target")
    mine = host_region(alice, 4 * KIB, "mine")
    alice.write(mine, alice.peer("bob")["target"], notify=b"landed").wait(PATIENCE)
    assert bob.wait_notification(PATIENCE).payload == b"landed"
    assert np.array_equal(target.bytes, mine.array())


def test_messages_go_on_when_the_silent_link_is_the_first_that_stands(agents: Any) -> None:
    alice, bob = agents
    bob.register(OnGpu(4 * KIB), name="target")
    alice.write(host_region(alice, 4 * KIB, "mine"), alice.peer("bob")["target"]).wait(PATIENCE)
    connection = alice.connector.current("bob")
    assert {link.backend for link in connection.links} == {"shm", "silent"}
    connection.links.reverse()
    alice.notify("bob", b"still")
    assert bob.wait_notification(PATIENCE).payload == b"still"


def test_silent_links_end_with_the_connection(agents: Any) -> None:
    alice, bob = agents
    bob.register(OnGpu(4 * KIB), name="target")
    plan = alice.prepare("write", host_region(alice, 4 * KIB, "mine"), alice.peer("bob")["target"])
    plan.post().wait(PATIENCE)
    bob.close()
    eventually(lambda: silent(alice).links[0].lost is not None, "the silent link is closed")
    assert isinstance(silent(alice).links[0].lost, PeerLost)
    assert isinstance(error_of(plan.post()), PeerLost)
    assert all(binding.gate.code for binding in silent(alice).bound)


def test_all_regions_of_a_transfer_go_over_one_backend_that_binds_them_all(agents: Any) -> None:
    alice, bob = agents
    silent(alice).refuses = {12 * KIB}
    small, large = OnGpu(4 * KIB), OnGpu(12 * KIB)
    bob.register(small, name="small")
    bob.register(large, name="large")
    mine = host_region(alice, 16 * KIB, "mine")
    peer = alice.peer("bob")
    alice.write(mine[: 4 * KIB], peer["small"]).wait(PATIENCE)
    transfer = alice.write(mine, [peer["small"], peer["large"]])
    transfer.wait(PATIENCE)
    assert transfer.stats.backend == "other"
    assert np.array_equal(np.concatenate([small.bytes, large.bytes]), mine.array())
    assert alice.explain(mine[: 4 * KIB], peer["small"]).backend == "silent"


def test_a_backend_that_cannot_compile_a_request_is_passed_over(agents: Any) -> None:
    alice, bob = agents
    silent(alice).cannot_prepare = True
    target = OnGpu(4 * KIB)
    bob.register(target, name="target")
    mine = host_region(alice, 4 * KIB, "mine")
    for _ in range(2):
        transfer = alice.write(mine, alice.peer("bob")["target"])
        transfer.wait(PATIENCE)
        assert transfer.stats.backend == "other"
    assert np.array_equal(target.bytes, mine.array())


def test_a_refusal_is_remembered_and_later_posts_do_not_wait(agents: Any) -> None:
    alice, bob = agents
    silent(alice).refuses = {4 * KIB}
    bob.register(OnGpu(4 * KIB), name="target")
    mine, remote = host_region(alice, 4 * KIB, "mine"), alice.peer("bob")["target"]
    alice.write(mine, remote).wait(PATIENCE)
    for _ in range(3):
        assert alice.write(mine, remote).done
    assert silent(alice).tries == 1


def test_what_no_backend_carries_is_refused_with_the_reasons_of_all() -> None:
    with silent_agents("alice", "bob", backends=("shm", "silent")) as (alice, bob):
        silent(alice).refuses = {4 * KIB}
        bob.register(OnGpu(4 * KIB), name="target")
        error = error_of(alice.write(alice.empty(4 * KIB), alice.peer("bob")["target"]))
        assert isinstance(error, BackendUnavailable)
        assert "shm: does not carry dram-vram" in str(error)
        assert "is refused" in str(error)


def test_agents_with_silent_backends_only_say_that_nothing_carries_messages() -> None:
    with silent_agents("alice", "bob", backends=("silent",)) as (alice, bob):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match="carries no messages"):
            alice.notify("bob", b"hello")
        assert time.monotonic() - began < PATIENCE
        del bob

"""What an agent says of itself: which path a transfer takes and why, and exact counts of what it did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from agent_process import far_agent
from agent_tools import PATIENCE, error_of, eventually, introduce

from raynixl import Agent, PeerUnknown, RangeError, RemoteRegion
from raynixl.telemetry import RouteStatistics

N = 4096


def test_explain_names_path_core_and_the_backends_not_taken(new_agent: Callable[..., Agent]) -> None:
    alice, bob = new_agent("alice", backends=("loopback", "shm")), new_agent("bob", backends=("loopback", "shm"))
    introduce(alice, bob)
    mine, theirs = alice.empty(N), bob.empty(N).describe()
    said = alice.explain(mine[:64], theirs[:64])
    assert (said.op, said.peer, said.nbytes, said.blocks, said.kinds) == ("write", "bob", 64, 1, "dram-dram")
    assert (said.backend, said.paths, said.core) == ("loopback", ("memory",), alice.native_name)
    assert said.rejected == (("shm", "comes later in preference"),)
    text = str(said)
    assert text.splitlines()[0] == "write of 64 bytes in 1 blocks with 'bob' (dram-dram)"
    assert f"taken: loopback, path memory, {alice.native_name} core" in text
    assert "not shm: comes later in preference" in text
    assert alice.explain(theirs, mine).op == "read"
    assert alice.statistics().transfers == 0


@pytest.mark.parametrize(("memory", "path"), [("arena", "mapped"), ("user", "process_vm")])
def test_explain_tells_apart_the_paths_of_shm(new_agent: Callable[..., Agent], memory: str, path: str) -> None:
    alice = new_agent("alice", backends=("loopback", "shm"))
    with far_agent("bob") as far:
        far.ask("region", name="far", nbytes=N, memory=memory)
        theirs = alice.peer(far.record)["far"]
        said = alice.explain(theirs, alice.empty(N))
    assert (said.backend, said.paths) == ("shm", (path,))
    assert said.rejected == (("loopback", "'bob' does not offer the region over it"),)


def test_explain_raises_what_stands_in_the_way(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    mine, theirs = alice.empty(N), bob.empty(N).describe()
    with pytest.raises(RangeError):
        alice.explain(mine[:8], theirs[:9])
    with pytest.raises(PeerUnknown):
        alice.explain(mine, RemoteRegion("nobody", theirs.incarnation, theirs.record))


def test_counts_are_exact(pair: tuple[Agent, Agent], backend: str) -> None:
    alice, bob = pair
    mine, bobs = alice.register(np.zeros(N, np.uint8)), bob.empty(N, name="far")
    theirs = alice.peer("bob")["far"]
    for turn in range(1, 11):
        alice.write(mine[: turn * 10], theirs[: turn * 10]).wait(PATIENCE)
    for _ in range(5):
        alice.read(theirs, mine).wait(PATIENCE)
    alice.write(mine, theirs, notify=b"1").wait(PATIENCE)
    alice.notify("bob", b"2")
    bob.deregister(bobs)
    error_of(alice.write(mine, theirs))
    found = alice.statistics()
    assert (found.name, found.regions, found.peers) == ("alice", 1, 1)
    assert (found.transfers, found.nbytes, found.failures) == (16, 550 + 6 * N, 1)
    routes = {route.backend: route for route in found.routes}
    assert routes[backend].transfers == 16
    assert sum(route.failures for route in found.routes) == 1
    assert (found.notifications_sent, found.notifications_received, dict(found.dropped)) == (2, 0, {})
    eventually(lambda: bob.statistics().notifications_received == 2, "both came")
    assert bob.statistics().transfers == 0
    assert found.uptime > 0


def test_statistics_are_a_snapshot(pair: tuple[Agent, Agent], backend: str) -> None:
    alice, bob = pair
    mine, theirs = alice.empty(8), bob.empty(8).describe()
    before = alice.statistics()
    alice.write(mine, theirs).wait(PATIENCE)
    assert before.transfers == 0
    assert before.routes == ()
    assert alice.statistics().routes == (RouteStatistics(backend, "bob", 1, 8, 0),)
    with pytest.raises(TypeError):
        before.dropped["x"] = 1  # type: ignore[index]


def test_a_transfer_that_was_never_bound_is_counted_as_a_failure(new_agent: Callable[..., Agent]) -> None:
    alice = new_agent("alice", backends=("shm",))
    with far_agent("bob") as far:
        far.ask("region", name="far", nbytes=8)
        theirs = alice.peer(far.record)["far"]
    error_of(alice.write(alice.empty(8), theirs))
    assert alice.statistics().failures == 1

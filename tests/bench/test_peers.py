"""The peers benchmark: every peer is met, its bytes are right, and what it has cost is told."""

import pytest

from raynixl.bench.peers import PeersSpec, run_peers
from raynixl.config import AgentConfig


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("backend", [name for name in AgentConfig().backends if name != "loopback"])
def test_every_peer_is_met_and_counted(backend):
    steps = []
    (row,) = run_peers(PeersSpec(7, 3, backend), lambda: steps.append(1))
    assert len(steps) == row["peers"] == 7
    assert row["verified"] is True
    assert 0 < row["p50_ms"] <= row["max_ms"] <= row["seconds"] * 1e3
    assert row["descriptors"] >= 7, "each peer takes a socket at least"
    assert row["mib"] >= 0


@pytest.mark.usefixtures("nothing_left")
def test_bytes_of_another_peer_are_noticed(monkeypatch):
    monkeypatch.setattr("raynixl.bench.peers.digest", lambda _: "another's")
    (row,) = run_peers(PeersSpec(peers=2, processes=1))
    assert row["verified"] is False

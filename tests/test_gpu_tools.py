"""The harness of the GPU tests, on host memory: what it asks is done, its errors are told, and nothing is left."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from gpu_far import PATIENCE, World, digest, registered
from gpu_tools import Far, FarError, Fars

from raynixl import Agent, AgentConfig, PeerLost

pytestmark = pytest.mark.usefixtures("nothing_left")
KINDS = ["host", "arena"]


def count_regions(world: World, *, more: int) -> int:
    """What a test has the far process call."""
    return len(world.regions) + more


def make_near() -> Agent:
    return Agent("near", config=AgentConfig(backends=("shm",)))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_go_there_and_back_and_digests_tell(kind: str) -> None:
    with Far(backends=["shm"]) as far, make_near() as near:
        peer = near.peer(far.record)
        made = far.ask("make", name="theirs", kind=kind, nbytes=1001, seed=5)
        ours = registered(near, kind, 1001, 0, name="ours")
        near.read(peer["theirs"], ours).wait(PATIENCE)
        assert digest(ours) == made
        assert far.ask("fill", name="theirs", seed=6) != made
        assert far.ask("meet", record=base64.b64encode(near.record()).decode()) == "near"
        far.ask("read", peer="near", ours="theirs", theirs="ours")
        assert far.ask("digest", name="theirs") == made
        far.ask("drop", name="theirs")


def test_a_function_of_a_test_is_called_there() -> None:
    with Far(backends=["shm"]) as far:
        far.ask("make", name="one", kind="host", nbytes=1)
        assert far.ask("test_gpu_tools:count_regions", more=2) == 3


def test_what_goes_wrong_there_is_raised_here_and_it_goes_on() -> None:
    with Far(backends=["shm"]) as far:
        with pytest.raises(FarError, match="KeyError") as found:
            far.ask("digest", name="nothing")
        assert found.value.kind == "KeyError"
        assert far.ask("make", name="one", kind="host", nbytes=1)


def test_a_killed_one_is_lost_to_its_peers_and_to_the_asker() -> None:
    with Far(backends=["shm"]) as far, make_near() as near:
        far.ask("make", name="theirs", kind="arena", nbytes=8)
        theirs = near.peer(far.record)["theirs"]
        ours = registered(near, "arena", 8, 1)
        near.write(ours, theirs).wait(PATIENCE)
        far.kill()
        with pytest.raises(PeerLost):
            near.write(ours, theirs).wait(PATIENCE)
        assert not far.is_alive


def test_tests_share_a_far_process_by_its_settings_and_get_another_once_it_has_ended() -> None:
    fars = Fars()
    try:
        first = fars(backends=["shm"])
        assert fars(backends=["shm"]) is first
        first.kill()
        second: Any = fars(backends=["shm"])
        assert second is not first
        assert second.is_alive
        assert fars.name() != fars.name()
    finally:
        fars.close()


def test_a_far_process_that_does_not_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="the far process ended"):
        Far(backends=["no such backend"])
    assert "no such backend" in capfd.readouterr().err

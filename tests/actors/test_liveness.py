"""Liveness in Ray: whatever ends an actor in the middle of transfers ends them on every survivor, typed and in time."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from actor_tools import Plain, get, kill_process, mapped_arenas
from agent_tools import eventually

import raynixl as rx

pytestmark = pytest.mark.ray
Make = Callable[..., Any]
NBYTES = 8 << 20
CONFIG = rx.AgentConfig(heartbeat_interval=0.2, heartbeat_timeout=1.0, transfer_timeout=5.0)


@ray.remote(num_cpus=0)
@rx.worker(config=CONFIG)
class Member(Plain):
    """Reads a peer again and again."""

    def begin(self, peer: str) -> None:
        """Read the peer's memory once."""
        self.theirs = rx.agent().peer(peer, timeout=20.0)["memory"]
        rx.agent().read(self.theirs, self.region).wait()

    def go_on(self, peer: str, seconds: float) -> tuple[str, str, float]:
        """Read and write until it fails; return the error, its text, and the longest that one transfer took."""
        agent, longest, until = rx.agent(), 0.0, time.monotonic() + seconds
        while time.monotonic() < until:
            begun = time.monotonic()
            try:
                agent.write(self.region, self.theirs, notify=b"more").wait()
                agent.read(self.theirs, self.region).wait()
            except rx.RaynixlError as exc:
                return type(exc).__name__, str(exc), max(longest, time.monotonic() - begun)
            longest = max(longest, time.monotonic() - begun)
        return "", "", longest

    def read_again(self, peer: str) -> int:
        """Read by name, whoever bears it now."""
        theirs = rx.agent().peer(peer, timeout=20.0).region("memory", timeout=20.0)
        rx.agent().read(theirs, self.region).wait()
        return int(self.region.array()[0])


@pytest.fixture
def scene(make: Make) -> Iterator[tuple[Any, int, list[Any], list[int]]]:
    """A victim that restarts, its process, two survivors that have read it, and their processes."""
    options = {"max_restarts": -1, "max_task_retries": -1}
    victim = make(Member, NBYTES, fill=3, options={"name": "victim", **options})
    survivors = [make(Member, NBYTES, options={"name": f"survivor-{number}"}) for number in range(2)]
    _, _, pid = get(victim.who.remote())
    pids = [pid for _, _, pid in get([one.who.remote() for one in survivors])]
    get([one.begin.remote("victim") for one in survivors])
    assert [mapped_arenas(one) for one in pids] == [2 * NBYTES] * 2
    yield victim, pid, survivors, pids
    with contextlib.suppress(ProcessLookupError):
        kill_process(pid, signal.SIGKILL)


def _fail_all(survivors: list[Any], act: Callable[[], None]) -> list[tuple[str, str, float]]:
    """Act in the middle of the survivors' transfers; return how these ended."""
    running = [one.go_on.remote("victim", 30.0) for one in survivors]
    done, _ = ray.wait(running, timeout=0.3)
    assert not done
    act()
    ended: list[tuple[str, str, float]] = get(running)
    return ended


@pytest.mark.parametrize("end", ["kill -9", "ray.kill", "restart", "terminate"])
def test_an_actor_that_dies_amid_transfers_is_lost_to_all_and_unmapped(scene: Any, end: str) -> None:
    victim, pid, survivors, pids = scene
    act = {
        "kill -9": lambda: kill_process(pid, signal.SIGKILL),
        "ray.kill": lambda: ray.kill(victim),
        "restart": lambda: ray.kill(victim, no_restart=False),
        "terminate": victim.__ray_terminate__.remote,
    }[end]
    for name, text, longest in _fail_all(survivors, act):
        assert name in ("PeerLost", "PeerRestarted"), text
        assert "victim" in text
        assert longest < CONFIG.transfer_timeout + 1.0
    restarts = end in ("kill -9", "restart")
    if restarts:
        assert get([one.read_again.remote("victim") for one in survivors]) == [3, 3]
    for one in pids:
        eventually(lambda one=one: mapped_arenas(one) == (2 if restarts else 1) * NBYTES, "the dead are unmapped")


def test_a_frozen_actor_is_lost_by_its_silence_and_used_again_when_it_thaws(scene: Any) -> None:
    _, pid, survivors, pids = scene
    for name, text, longest in _fail_all(survivors, lambda: kill_process(pid, signal.SIGSTOP)):
        # in flight when the silence was noticed: lost; posted later: nobody answers
        assert (name, "frozen" in text) == ("PeerLost", True) or name == "TransferTimeout", text
        assert "victim" in text
        assert longest < CONFIG.transfer_timeout + 1.0
    for one in pids:
        eventually(lambda one=one: mapped_arenas(one) == NBYTES, "the frozen are unmapped")
    kill_process(pid, signal.SIGCONT)
    assert get([one.read_again.remote("victim") for one in survivors]) == [3, 3]

"""Agents on different hosts, over UCX and TCP: what they promise holds across cables, and when these are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agent_tools import make_config
from hosts_tools import Bed, Host

from raynixl import BackendUnavailable
from raynixl.backends.shm import ShmBackend
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess

N = 1 << 20
Put = Callable[..., FarProcess]


@pytest.fixture
def put(bed: Bed, nothing_left: Callable[[], list[str]]) -> Iterator[Put]:
    """Put agents on hosts, each with a region 'arena' and a region 'user': put(host, name, factory, **settings)."""
    made: list[FarProcess] = []

    def start(host: Host, name: str, factory: Any, **settings: Any) -> FarProcess:
        far = FarProcess(factory, make_config(**settings), is_busy=False, launch=host.run)
        made.append(far)
        far.open(name)
        for seed, memory in enumerate(("arena", "user")):
            far.ask("make", memory, N, memory, seed)
        return far

    yield start
    for far in made:
        far.close()


def meet(*agents: FarProcess) -> None:
    """Make every agent known to every other."""
    for one in agents:
        for other in agents:
            if one is not other:
                one.ask("meet", other.ask("record"))


def test_shm_serves_one_host_and_says_why_it_reaches_no_other(bed: Bed, put: Put) -> None:
    first, second = bed
    alice, bob, carol = (
        put(host, name, ShmBackend) for host, name in ((first, "alice"), (first, "bob"), (second, "carol"))
    )
    meet(alice, bob, carol)
    alice.ask("copy", "read", "arena", "bob", "user")
    assert alice.ask("content", "arena") == pattern(N, 1).tobytes()
    with pytest.raises(BackendUnavailable, match="host") as caught:
        alice.ask("copy", "read", "arena", "carol", "user")
    assert caught.value.hint

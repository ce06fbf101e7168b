"""What a backend may say of itself in an explanation; ucx: its rails, whether it emulates, and all transports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from agent_tools import introduce

from raynixl import Agent, BackendUnavailable, RemoteRegion
from raynixl.backends.base import Binding, Describes, Link
from raynixl.backends.loopback import LoopbackBackend
from raynixl.backends.table import offered
from raynixl.region import Region

N = 4096


class Talkative(LoopbackBackend):
    """A backend that has something to say."""

    name = "talkative"

    def describe(self, local: Region, binding: Binding) -> str:
        """Say how long the regions are, of long ones only."""
        return f"{local.nbytes} to {binding.remote.nbytes} bytes" if local.nbytes > 8 else ""


def pair_over(new_agent: Callable[..., Agent], backend: str, **settings: object) -> tuple[Agent, Agent]:
    """Two agents that know each other, over one backend."""
    alice, bob = (new_agent(name, backends=(backend,), **settings) for name in ("alice", "bob"))
    introduce(alice, bob)
    return alice, bob


def test_what_a_backend_says_of_each_pair_of_regions_is_told_once(new_agent: Callable[..., Agent]) -> None:
    with offered("talkative", Talkative):
        alice, bob = pair_over(new_agent, "talkative")
    mine, tiny = [alice.empty(N) for _ in range(3)], alice.empty(8)
    theirs = [bob.empty(nbytes).describe() for nbytes in (N, 2 * N, 8)]
    said = alice.explain([*mine, tiny], theirs)
    assert said.detail.splitlines() == [f"{N} to {N} bytes", f"{N} to {2 * N} bytes", f"{N} to 8 bytes"]
    assert [line for line in str(said).splitlines() if "to 8 bytes" in line] == [f"  {N} to 8 bytes"]


class Reluctant(LoopbackBackend):
    """A backend that binds nothing."""

    name = "reluctant"

    def bind(self, link: Link, remote: RemoteRegion, fds: Sequence[int]) -> Binding:
        """Refuse."""
        raise BackendUnavailable("not on a Sunday", hint="ask on Monday")


class Exact(LoopbackBackend):
    """A backend whose path depends on both ends."""

    name = "exact"

    def path(self, local: Region, binding: Binding) -> str:
        """Name the lengths."""
        return f"{local.nbytes}-{binding.remote.nbytes}"


def test_why_a_backend_refused_to_bind_is_told(new_agent: Callable[..., Agent]) -> None:
    with offered("reluctant", Reluctant):
        alice, bob = (new_agent(name, backends=("reluctant", "loopback")) for name in ("alice", "bob"))
    introduce(alice, bob)
    mine, theirs = alice.empty(N), bob.empty(N).describe()
    for _ in range(2):  # also once it is not tried any more
        said = alice.explain(mine, theirs)
        assert (said.backend, said.rejected) == ("loopback", (("reluctant", "not on a Sunday; ask on Monday"),))


def test_a_path_that_depends_on_both_ends_is_told_of_each_pair(new_agent: Callable[..., Agent]) -> None:
    with offered("exact", Exact):
        alice, bob = pair_over(new_agent, "exact")
    said = alice.explain([alice.empty(N), alice.empty(8)], bob.empty(N + 8).describe())
    assert said.paths == (f"{N}-{N + 8}", f"8-{N + 8}")


def test_a_backend_that_says_nothing_is_explained_without_a_detail(pair: tuple[Agent, Agent], backend: str) -> None:
    alice, bob = pair
    assert not isinstance(alice.backend(backend), Describes)
    said = alice.explain(alice.empty(N), bob.empty(N).describe())
    assert said.detail == ""
    assert len(str(said).splitlines()) == 2


@pytest.fixture
def explained(new_agent: Callable[..., Agent]) -> Callable[..., str]:
    """What is said of a write between two agents over ucx with some settings."""
    pytest.importorskip("ucxx", reason="the ucx backend needs ucxx")

    def explain(**settings: object) -> str:
        alice, bob = pair_over(new_agent, "ucx", **settings)
        theirs: RemoteRegion = bob.register(np.zeros(N, np.uint8)).describe()
        said = alice.explain(alice.empty(N), theirs)
        assert said.detail in str(said)
        return said.detail

    return explain


def test_ucx_says_that_it_chooses_devices_and_reaches_memory_by_itself_over_cma(explained: Callable[..., str]) -> None:
    said = explained(ucx={"TLS": "cma,tcp"})
    assert said == (
        "one rail, whose devices UCX chooses; cma: without the peer's help; all transports: cma/memory, tcp/lo"
    )


def test_ucx_says_that_it_emulates_over_tcp(explained: Callable[..., str]) -> None:
    said = explained(ucx={"TLS": "tcp"})
    assert said == (
        "one rail, whose devices UCX chooses; tcp/lo (software emulation): the peer's UCX takes part in each operation;"
        " all transports: tcp/lo"
    )


def test_ucx_names_the_rails_that_were_named(explained: Callable[..., str]) -> None:
    said = explained(ucx={"TLS": "tcp"}, rails=("lo",), secret=b"of this job")
    assert said.startswith("rail lo: named in AgentConfig.rails; tcp/lo (software emulation)")

"""A peer that is lost just while an operation is compiled for it: the transfer tells, the call does not raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from agent_tools import PATIENCE, error_of, introduce, random_bytes

from raynixl import Agent, PeerLost
from raynixl.backends.base import Request
from raynixl.backends.loopback import LoopbackBackend
from raynixl.backends.table import offered
from raynixl.native import Program

N = 4096


class Fickle(LoopbackBackend):
    """A backend that loses the peer while it compiles, as often as it is told."""

    name = "fickle"
    losses = 0

    def prepare(self, request: Request) -> list[Program]:
        """Compile, or lose the peer."""
        if self.losses:
            self.losses -= 1
            raise PeerLost("lost meanwhile", peer="bob")
        return super().prepare(request)


@pytest.fixture
def fickle(new_agent: Callable[..., Agent]) -> tuple[Agent, Agent, Fickle]:
    """A pair over it that has met already, and the near side's backend."""
    with offered("fickle", Fickle):
        alice, bob = (new_agent(name, backends=("fickle",)) for name in ("alice", "bob"))
    introduce(alice, bob)
    backend = alice.backend("fickle")
    assert isinstance(backend, Fickle)
    return alice, bob, backend


def test_it_is_bound_anew_and_arrives(fickle: tuple[Agent, Agent, Fickle]) -> None:
    alice, bob, backend = fickle
    mine, theirs = alice.empty(N), bob.empty(N)
    alice.write(mine, theirs.describe()).wait(PATIENCE)
    mine.array()[:] = random_bytes(N)
    backend.losses = 1
    alice.write(mine, theirs.describe()).wait(PATIENCE)
    assert backend.losses == 0
    assert theirs.array().tobytes() == random_bytes(N).tobytes()


def test_what_is_lost_every_time_fails_by_its_handle(fickle: tuple[Agent, Agent, Fickle]) -> None:
    alice, bob, backend = fickle
    mine, theirs = alice.empty(N), bob.empty(N).describe()
    alice.write(mine, theirs).wait(PATIENCE)
    backend.losses = 2
    assert isinstance(error_of(alice.write(mine, theirs)), PeerLost)
    alice.write(mine, theirs).wait(PATIENCE)

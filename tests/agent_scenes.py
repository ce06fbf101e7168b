"""Scenes of the tests of bad input: two agents whose memory lies between bytes that nobody may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from agent_tools import PATIENCE, error_of, random_bytes

from raynixl import Agent, RaynixlError, Region, RemoteRegion, Transfer

N = 4096
HUGE = (2**63, 2**64 - 1, 2**64, 10**30)


@dataclass
class Scene:
    """Alice, Bob, and a region of each; Bob's lies between bytes that nobody may touch."""

    alice: Agent
    bob: Agent
    mine: Region
    theirs: RemoteRegion
    bobs: Region
    around: np.ndarray
    before: np.ndarray

    def forget(self) -> None:
        """Let go of the memory: pytest holds on to what a fixture gave until every other one is torn down."""
        vars(self).clear()

    def check_unharmed(self) -> None:
        """Bob's bytes are what they were, and the next correct transfers in both directions work."""
        assert np.array_equal(self.around, self.before)
        sent = random_bytes(N, seed=7)
        self.mine.array()[:] = sent
        self.alice.write(self.mine, self.theirs).wait(PATIENCE)
        assert np.array_equal(self.bobs.array(), sent)
        self.mine.array()[:] = 0
        self.alice.read(self.theirs, self.mine).wait(PATIENCE)
        assert np.array_equal(self.mine.array(), sent)
        assert np.array_equal(self.around[:N], self.before[:N])
        assert np.array_equal(self.around[2 * N :], self.before[2 * N :])
        self.before[:] = self.around


@contextmanager
def naming(case: str) -> Iterator[None]:
    """Say which case of a table failed."""
    try:
        yield
    except BaseException as exc:
        exc.add_note(f"case: {case}")
        raise


def refused(action: Callable[[], Any], kind: type[RaynixlError] | tuple[type[RaynixlError], ...]) -> RaynixlError:
    """Have something refused at once or by the handle it returns; check that the error helps."""
    try:
        result = action()
    except RaynixlError as exc:
        error: RaynixlError = exc
    else:
        assert isinstance(result, Transfer), f"accepted: {result!r}"
        error = error_of(result)
    assert isinstance(error, kind), repr(error)
    assert error.hint, f"no remedy: {error}"
    assert len(str(error)) < 2000
    return error


def changed(remote: RemoteRegion, **fields: Any) -> RemoteRegion:
    """A descriptor that says something else than its owner."""
    return replace(remote, record=remote.record.model_copy(update=fields))

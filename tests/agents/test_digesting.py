"""A read digests what it brings where the path can; elsewhere it says that it has not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from agent_tools import PATIENCE, introduce, random_bytes

from raynixl import Agent, ConfigError
from raynixl.weights.digest import digest_rows

N = 3 << 20


def digest_of(data: np.ndarray, position: int, seed: int) -> tuple[int, ...]:
    """The digest of bytes that lie one after the other."""
    out = np.zeros((1, 2), np.uint64)
    digest_rows(np.array([[data.ctypes.data, data.nbytes, position, 0]], np.uint64), out, seed=seed)
    return tuple(out[0].tolist())


@pytest.mark.parametrize("offset", [0, 4097])
def test_bytes_from_mapped_memory_are_digested_at_their_place_in_the_region(
    pair: tuple[Agent, Agent], offset: int
) -> None:
    alice, bob = pair
    theirs, mine = bob.empty(N, name="far"), alice.empty(2 * N)
    theirs.array()[:] = random_bytes(N)
    transfer = alice.read(alice.peer("bob")["far"], mine.span(offset, N), digest=(1 << 48, 9))
    transfer.wait(PATIENCE)
    assert np.array_equal(mine.array()[offset : offset + N], theirs.array())
    assert transfer.digest == digest_of(theirs.array(), (1 << 48) + offset, 9)


def test_scattered_blocks_add_up(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    theirs, mine = bob.empty(N, name="far"), alice.empty(N)
    theirs.array()[:] = random_bytes(N)
    pages = np.arange(0, N // 4096, 2, dtype=np.uint64)
    remote = alice.peer("bob")["far"]
    found = []
    for some in (pages, pages + np.uint64(1)):
        transfer = alice.read(remote.pages(some, 4096), mine.pages(some, 4096), digest=(0, 5))
        transfer.wait(PATIENCE)
        found.append(transfer.digest)
    total = tuple(sum(one[lane] for one in found) % 2**64 for lane in (0, 1))
    assert total == digest_of(theirs.array(), 0, 5)


def test_nobody_digests_unasked(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.empty(N, name="far")
    transfer = alice.read(alice.peer("bob")["far"], alice.empty(N))
    transfer.wait(PATIENCE)
    assert transfer.digest is None


def test_digests_of_writes_and_of_several_regions_are_refused(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    bob.empty(8192, name="far")
    remote = alice.peer("bob")["far"]
    halves = [alice.empty(4096), alice.empty(4096)]
    with pytest.raises(ConfigError, match="digest"):
        alice.read(remote, halves, digest=(0, 1))
    with pytest.raises(ConfigError, match="digest"):
        alice.prepare("write", alice.empty(8192), remote).post(digest=(0, 1))


def test_what_the_kernel_moves_is_not_digested(new_agent: Callable[..., Agent]) -> None:
    alice, bob = new_agent("alice", backends=("shm",)), new_agent("bob", backends=("shm",))
    introduce(alice, bob)
    bob.register(random_bytes(N), name="far")
    mine = alice.empty(N)
    transfer = alice.read(alice.peer("bob")["far"], mine, digest=(0, 1))
    transfer.wait(PATIENCE)
    assert np.array_equal(mine.array(), random_bytes(N))
    assert transfer.digest is None

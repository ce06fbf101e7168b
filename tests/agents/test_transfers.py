"""Reads and writes move exactly the bytes that were selected: whole regions, spans, pages, blocks, many regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agent_tools import MIB, PATIENCE, random_bytes

from raynixl import Agent, Region, RemoteRegion

N = 64 << 10


@pytest.fixture(params=["user", "arena"])
def memory(request: pytest.FixtureRequest) -> str:
    """Where the bytes of both sides live."""
    return str(request.param)


def region_of(agent: Agent, data: np.ndarray, memory: str, name: str = "") -> Region:
    """Register a copy of data."""
    if memory == "user":
        return agent.register(data.copy(), name=name)
    region = agent.empty(data.nbytes, name=name)
    region.array()[:] = data
    return region


def two(pair: tuple[Agent, Agent], memory: str, nbytes: int = N) -> tuple[Region, Region, RemoteRegion]:
    """Random memory of Alice's, random memory of Bob's, and Bob's as Alice sees it."""
    alice, bob = pair
    mine = region_of(alice, random_bytes(nbytes, 1), memory)
    bobs = region_of(bob, random_bytes(nbytes, 2), memory, "far")
    return mine, bobs, alice.peer("bob")["far"]


@pytest.mark.parametrize("nbytes", [1, 7, 4096, N, 9 * MIB + 3])
def test_whole_regions_move_both_ways(pair: tuple[Agent, Agent], memory: str, nbytes: int) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory, nbytes)
    sent = mine.array().copy()
    alice.write(mine, theirs).wait(PATIENCE)
    assert np.array_equal(bobs.array(), sent)
    bobs.array()[:] = random_bytes(nbytes, 3)
    alice.read(theirs, mine).wait(PATIENCE)
    assert np.array_equal(mine.array(), random_bytes(nbytes, 3))


def test_a_span_leaves_its_neighbours_alone(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    expected = bobs.array().copy()
    expected[101:1124] = mine.array()[7:1030]
    alice.write(mine.span(7, 1023), theirs.span(101, 1023)).wait(PATIENCE)
    assert np.array_equal(bobs.array(), expected)
    expected[N - 5 :] = mine.array()[:5]
    alice.write(mine[:5], theirs[-5:]).wait(PATIENCE)
    assert np.array_equal(bobs.array(), expected)


def test_pages_land_in_the_order_of_their_numbers(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    ids, their_ids = np.array([5, 0, 63, 17]), np.array([1, 60, 2, 3])
    expected = bobs.array().reshape(64, 1024).copy()
    expected[their_ids] = mine.array().reshape(64, 1024)[ids]
    alice.write(mine.pages(ids, 1024), theirs.pages(their_ids, 1024)).wait(PATIENCE)
    assert np.array_equal(bobs.array(), expected.reshape(-1))


def test_one_source_page_may_be_read_many_times(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    alice.read(theirs.pages([3] * 64, 1024), mine).wait(PATIENCE)
    assert np.array_equal(mine.array().reshape(64, 1024), np.tile(bobs.array()[3072:4096], (64, 1)))


def test_blocks_of_any_cut_move_as_one_stream(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    random = np.random.default_rng(5)
    for _ in range(20):
        sizes = random.integers(1, 300, 40)
        starts = random.permutation(40) * 1000 + random.integers(0, 700, 40)
        total = int(sizes.sum())
        target = int(random.integers(0, N - total))
        stream = np.concatenate([mine.array()[a : a + n] for a, n in zip(starts, sizes, strict=True)])
        expected = bobs.array().copy()
        expected[target : target + total] = stream
        alice.write(mine.blocks(starts, sizes), theirs[target : target + total]).wait(PATIENCE)
        assert np.array_equal(bobs.array(), expected)
        alice.read(theirs[target : target + total], mine.blocks(starts, sizes)).wait(PATIENCE)


def test_many_regions_of_both_kinds_take_part_in_one_transfer(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    ours = [region_of(alice, random_bytes(1000, i), kind) for i, kind in enumerate(["user", "arena", "user", "arena"])]
    bobs = [bob.empty(1500), bob.register(bytearray(1000)), bob.empty(1500)]
    theirs = [region.describe() for region in bobs]
    stream = np.concatenate([region.array() for region in ours])
    alice.write(ours, theirs).wait(PATIENCE)
    assert np.array_equal(np.concatenate([region.array() for region in bobs]), stream)
    for region in ours:
        region.array()[:] = 0
    transfer = alice.read([theirs[2], theirs[0][:1000], theirs[1], theirs[0][1000:]], ours, notify=b"all")
    transfer.wait(PATIENCE)
    expected = np.concatenate([stream[2500:], stream[:1000], stream[1500:2500], stream[1000:1500]])
    assert np.array_equal(np.concatenate([region.array() for region in ours]), expected)
    assert bob.wait_notification(PATIENCE).payload == b"all"


def test_adjacent_blocks_are_merged(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    transfer = alice.write(mine.blocks(np.arange(64) * 1024, 1024), theirs.pages(np.arange(64), 1024))
    transfer.wait(PATIENCE)
    assert (transfer.stats.blocks, transfer.nbytes) == (1, N)
    assert np.array_equal(bobs.array(), mine.array())
    assert alice.prepare("read", theirs.pages([0, 1, 3], 1024), mine[: 3 * 1024]).count == 2


def test_empty_blocks_among_others_move_nothing(pair: tuple[Agent, Agent], memory: str) -> None:
    alice, _ = pair
    mine, bobs, theirs = two(pair, memory)
    expected = bobs.array().copy()
    expected[100:108] = mine.array()[:8]
    alice.write(mine.blocks([0, 50, 4], [4, 0, 4]), [theirs[9:9], theirs[100:108]]).wait(PATIENCE)
    assert np.array_equal(bobs.array(), expected)


MADE: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.arange(256, dtype=torch.int64),
    "bfloat16": lambda: torch.arange(256).to(torch.bfloat16),
    "a parameter": lambda: torch.nn.Parameter(torch.arange(256.0)),
    "numpy": lambda: np.arange(256, dtype=np.float32),
    "fortran": lambda: np.asfortranarray(np.arange(256, dtype=np.int16).reshape(16, 16)),
    "bytearray": lambda: bytearray(range(256)),
    "memoryview": lambda: memoryview(bytearray(range(256))),
    "0-d": lambda: torch.tensor(5.0),
}


@pytest.mark.parametrize("kind", MADE)
def test_all_sorts_of_memory_are_registered_in_place(pair: tuple[Agent, Agent], kind: str) -> None:
    alice, bob = pair
    source, target = MADE[kind](), MADE[kind]()
    bobs = bob.register(target)
    bobs.array()[:] = 0
    alice.write(alice.register(source), bobs.describe()).wait(PATIENCE)
    if isinstance(source, torch.Tensor):
        assert torch.equal(source, target)
    else:
        assert np.array_equal(np.asarray(source), np.asarray(target))


def test_an_arena_is_seen_as_arrays_and_tensors(pair: tuple[Agent, Agent]) -> None:
    alice, bob = pair
    near, far = alice.empty(1024), bob.empty(1024)
    near.tensor(torch.float32, (8, 32))[:] = torch.arange(256.0).reshape(8, 32)
    alice.write(near, far.describe()).wait(PATIENCE)
    assert far.array(np.float32).tolist() == list(range(256))
    assert far.array(np.float32, (2, 4), offset=32).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_read_may_span_a_thousand_regions_at_both_ends(pair: tuple[Agent, Agent]) -> None:
    """Meeting them took a time that grew with the cube of their number: half a minute for 300."""
    alice, bob = pair
    whole = random_bytes(1000 * 64, 3)
    theirs = [bob.register(piece.copy()) for piece in whole.reshape(1000, 64)]
    mine = [alice.register(np.zeros(64, np.uint8)) for _ in range(1000)]
    alice.read([region.describe() for region in theirs], mine).wait(PATIENCE)
    assert np.concatenate([region.array() for region in mine]).tobytes() == whole.tobytes()

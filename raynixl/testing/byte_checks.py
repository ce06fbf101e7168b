"""Checks of what reads and writes move: every byte of the blocks, and none beside them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from raynixl.region import Region, RemoteRegion
from raynixl.testing.contents import get, put
from raynixl.testing.far import PATIENCE, pattern
from raynixl.testing.scene import Scene, expect_equal

Table = list[tuple[int, int, int]]
"""Rows of (source offset, target offset, nbytes)."""
_MIB = 1 << 20


def moves_one_byte(scene: Scene) -> None:
    """A single byte, at an odd place."""
    _move(scene, 4099, [(1001, 37, 1)])


def moves_whole_regions(scene: Scene) -> None:
    """All of a region."""
    _move(scene, 100_003, [(0, 0, 100_003)])


def moves_odd_aligned_blocks(scene: Scene) -> None:
    """Blocks that begin and end anywhere."""
    _move(scene, 70_001, [(1, 3, 4097), (8191, 5003, 7), (65_537, 20_001, 4001), (30_001, 40_003, 11)])


def moves_adjacent_blocks(scene: Scene) -> None:
    """Blocks that adjoin on both sides, on one, and in the wrong order."""
    _move(scene, 8192, [(0, 0, 64), (64, 64, 64), (128, 256, 64), (256, 192, 64), (1024, 4096, 1), (1025, 4097, 1)])


def moves_many_random_blocks(scene: Scene) -> None:
    """More blocks than one system call takes, shuffled."""
    pages = np.random.default_rng(3).permutation(2100)
    _move(scene, 2100 * 512, [(int(page) * 512, index * 512, 500) for index, page in enumerate(pages)])


def moves_large_blocks(scene: Scene) -> None:
    """Many megabytes, which several threads carry together."""
    _move(scene, 12 * _MIB, [(3, 4097, 9 * _MIB + 1), (10 * _MIB, 11 * _MIB, _MIB - 5)])


def moves_several_regions(scene: Scene) -> None:
    """One transfer between several regions on both sides, cut differently."""
    for memory in scene.memories:
        mine = [scene.region(nbytes, memory, seed=nbytes) for nbytes in (1000, 5000, 3000)]
        theirs = [scene.remote(nbytes, memory, seed=nbytes + 1) for nbytes in (4096, 4904)]
        wanted = np.concatenate([get(region.memory) for region in mine])
        scene.near.write(mine, theirs).wait(PATIENCE)
        expect_equal(np.concatenate([scene.content(one) for one in theirs]), wanted, f"write of {memory} regions")
        for region in mine:
            put(region.memory, np.zeros(region.nbytes, np.uint8))
        scene.near.read(theirs, mine).wait(PATIENCE)
        expect_equal(np.concatenate([get(region.memory) for region in mine]), wanted, f"read of {memory} regions")


def moves_when_the_far_side_asks(scene: Scene) -> None:
    """The far agent reads and writes near memory too."""
    for memory in scene.mutual:
        mine, theirs = scene.pair(50_001, memory)
        wanted = pattern(mine.nbytes, 1)
        scene.far.ask("copy", "write", theirs.name, "near", mine.name)
        expect_equal(get(mine.memory), wanted, f"the far side's write of {memory} memory")
        put(mine.memory, pattern(mine.nbytes, 2))
        scene.far.ask("copy", "read", theirs.name, "near", mine.name)
        expect_equal(scene.content(theirs), get(mine.memory), f"the far side's read of {memory} memory")


def posts_prepared_operations_many_times(scene: Scene) -> None:
    """What was prepared once moves the present bytes at each post."""
    for memory in scene.memories:
        mine, theirs = scene.pair(4096, memory)
        write = scene.near.prepare("write", mine, theirs)
        read = scene.near.prepare("read", theirs, mine)
        for turn in range(100):
            sent = pattern(mine.nbytes, turn)
            put(mine.memory, sent)
            write.post().wait(PATIENCE)
            put(mine.memory, np.full(mine.nbytes, 0, np.uint8))
            read.post().wait(PATIENCE)
            expect_equal(get(mine.memory), sent, f"round {turn} of {memory} memory")


def carries_posts_of_many_threads(scene: Scene) -> None:
    """Threads that post at once do not disturb each other."""
    for memory in scene.memories:
        mine, theirs = scene.pair(8 * 65_536, memory)

        def work(part: int, mine: Region = mine, theirs: RemoteRegion = theirs) -> None:
            start = part * 65_536
            for turn in range(10):
                sent = pattern(65_536, 100 * part + turn)
                put(mine.memory, sent, start)
                scene.near.write(mine.span(start, 65_536), theirs.span(start, 65_536)).wait(PATIENCE)
                put(mine.memory, np.zeros(65_536, np.uint8), start)
                scene.near.read(theirs.span(start, 65_536), mine.span(start, 65_536)).wait(PATIENCE)
                expect_equal(get(mine.memory, start, 65_536), sent, f"thread {part}, round {turn}")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        expect_equal(scene.content(theirs), get(mine.memory), f"{memory} memory after all threads")


def _move(scene: Scene, nbytes: int, table: Table) -> None:
    """Write and read the same blocks between memory of each sort; compare every byte of both regions."""
    sources, targets, lengths = (np.array(column) for column in zip(*table, strict=True))
    for memory in scene.memories:
        mine, theirs = scene.pair(nbytes, memory)
        near, far = pattern(nbytes, 0), pattern(nbytes, 1)
        scene.near.write(mine.blocks(sources, lengths), theirs.blocks(targets, lengths)).wait(PATIENCE)
        _copy(near, far, table)
        expect_equal(scene.content(theirs), far, f"the destination of a write, {memory} memory")
        expect_equal(get(mine.memory), near, f"the source of a write, {memory} memory")
        near = pattern(nbytes, 2)
        put(mine.memory, near)
        scene.near.read(theirs.blocks(sources, lengths), mine.blocks(targets, lengths)).wait(PATIENCE)
        _copy(far, near, table)
        expect_equal(get(mine.memory), near, f"the destination of a read, {memory} memory")
        expect_equal(scene.content(theirs), far, f"the source of a read, {memory} memory")


def _copy(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], table: Table) -> None:
    for start, to, nbytes in table:
        target[to : to + nbytes] = source[start : start + nbytes]


CHECKS = (
    moves_one_byte,
    moves_whole_regions,
    moves_odd_aligned_blocks,
    moves_adjacent_blocks,
    moves_many_random_blocks,
    moves_large_blocks,
    moves_several_regions,
    moves_when_the_far_side_asks,
    posts_prepared_operations_many_times,
    carries_posts_of_many_threads,
)

"""Memory of GPUs between agents, on a made-up driver: kinds, blocks, allocations, two processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent
from agent_tools import KIB, MIB, PATIENCE, error_of, introduce, random_bytes
from vram_process import far_vram
from vram_tools import Piece, content, gpu_agent, make_region, move, some_blocks

from raynixl import (
    Agent,
    BackendUnavailable,
    ConfigError,
    MemoryKind,
    RangeError,
    RegionReadOnly,
)

SORTS = [("vram", "vram"), ("arena", "vram"), ("user", "vram"), ("vram", "arena")]


@pytest.fixture
def near(gpus: Any) -> Iterator[Agent]:
    """The agent of this process."""
    with gpu_agent("near") as agent:
        yield agent


@pytest.fixture(scope="module")
def process() -> Iterator[FarAgent]:
    """The process of the far agent, which outlives our made-up drivers."""
    with far_vram("far") as started:
        yield started


@pytest.fixture
def far(near: Agent, process: FarAgent) -> Iterator[FarAgent]:
    """The agent of another process."""
    near.peer(process.record)
    yield process
    process.ask("drop")


def seen(far: FarAgent, name: str) -> np.ndarray:
    """The bytes of a far region."""
    return np.frombuffer(bytes.fromhex(far.ask("content", name=name)), np.uint8)


@pytest.mark.parametrize(("ours", "theirs"), SORTS)
@pytest.mark.parametrize("nbytes", [1, 4095, 3 * MIB + 5])
def test_every_byte_arrives(near: Agent, far: FarAgent, ours: str, theirs: str, nbytes: int) -> None:
    mine = make_region(near, ours, nbytes, seed=1)
    far.ask("region", name="theirs", nbytes=nbytes, memory=theirs, seed=2)
    remote = near.peer("far")["theirs"]
    near.write(mine, remote).wait(PATIENCE)
    assert np.array_equal(seen(far, "theirs"), random_bytes(nbytes, 1))
    far.ask("fill", name="theirs", value=77)
    near.read(remote, mine).wait(PATIENCE)
    assert (content(mine) == 77).all()
    assert near.explain(mine, remote).backend == "nvlink"


@pytest.mark.parametrize(("ours", "theirs"), SORTS)
def test_blocks_land_whole_and_nothing_beside_them(near: Agent, far: FarAgent, ours: str, theirs: str) -> None:
    nbytes, (starts, ends, lengths) = 256 * KIB, some_blocks(256 * KIB, 5)
    mine = make_region(near, ours, nbytes, seed=1)
    far.ask("region", name="theirs", nbytes=nbytes, memory=theirs, seed=2)
    remote = near.peer("far")["theirs"]
    here, there = random_bytes(nbytes, 1), random_bytes(nbytes, 2)
    near.write(mine.blocks(starts, lengths), remote.blocks(ends, lengths)).wait(PATIENCE)
    move(here, there, (starts, ends, lengths))
    assert np.array_equal(seen(far, "theirs"), there)
    assert np.array_equal(content(mine), here)
    near.read(remote.blocks(starts, lengths), mine.blocks(ends, lengths)).wait(PATIENCE)
    move(there, here, (starts, ends, lengths))
    assert np.array_equal(content(mine), here)


@pytest.mark.parametrize(("ours", "theirs"), [*SORTS, ("vram", "user")])
def test_agents_of_one_process_reach_each_other_by_address(gpus: Any, ours: str, theirs: str) -> None:
    with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
        introduce(alice, bob)
        mine, other = make_region(alice, ours, 100_003, seed=1), make_region(bob, theirs, 100_003, name="theirs")
        remote = alice.peer("bob")["theirs"]
        alice.write(mine, remote).wait(PATIENCE)
        assert np.array_equal(content(other), random_bytes(100_003, 1))
        assert alice.explain(mine, remote).backend == "nvlink"


def test_the_far_side_reads_and_writes_our_memory(near: Agent, far: FarAgent) -> None:
    mine = make_region(near, "vram", 70_001, seed=1, name="mine")
    far.ask("region", name="theirs", nbytes=70_001, memory="vram")
    far.ask("copy", op="read", mine="theirs", record=near.record().decode(), theirs="mine")
    assert np.array_equal(seen(far, "theirs"), random_bytes(70_001, 1))
    far.ask("fill", name="theirs", value=9)
    far.ask("copy", op="write", mine="theirs", record=near.record().decode(), theirs="mine")
    assert (content(mine) == 9).all()


def test_regions_of_one_allocation_are_opened_once_and_found_each_at_its_offset(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="block", nbytes=4 * MIB, memory="vram", seed=3)
    whole = random_bytes(4 * MIB, 3)
    for number, offset in enumerate((0, 512, 3 * MIB + 7)):
        far.ask("carve", name=f"part-{number}", of="block", offset=offset, nbytes=5000)
        mine = make_region(near, "vram", 5000)
        near.read(near.peer("far")[f"part-{number}"], mine).wait(PATIENCE)
        assert np.array_equal(content(mine), whole[offset : offset + 5000])


def test_an_allocation_stays_open_until_the_last_region_in_it_goes(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="block", nbytes=MIB, memory="vram", seed=3)
    for number in range(2):
        far.ask("carve", name=f"part-{number}", of="block", offset=number * 4096, nbytes=4096)
    mine, peer = make_region(near, "vram", 4096), near.peer("far")
    remotes = [peer["part-0"], peer["part-1"]]
    for remote in remotes:
        near.read(remote, mine).wait(PATIENCE)
    far.ask("deregister", name="part-0")
    near.read(remotes[1], mine).wait(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(MIB, 3)[4096:8192])


def test_a_gpu_reaches_the_memory_of_another_one(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=MIB, memory="vram", seed=4, device=1)
    mine = make_region(near, "vram", MIB, device=0)
    remote = near.peer("far")["theirs"]
    near.read(remote, mine).wait(PATIENCE)
    assert np.array_equal(content(mine), random_bytes(MIB, 4))
    assert "GPU 0 reaches the memory of GPU 1" in str(near.explain(remote, mine))


def test_several_regions_of_ours_of_both_kinds_go_in_one_transfer(near: Agent, far: FarAgent) -> None:
    mine = [make_region(near, sort, 10_000 + 7 * n, seed=n + 1) for n, sort in enumerate(("vram", "arena", "user"))]
    total = sum(region.nbytes for region in mine)
    far.ask("region", name="theirs", nbytes=total, memory="vram")
    remote = near.peer("far")["theirs"]
    wanted = np.concatenate([content(region) for region in mine])
    near.write(mine, remote).wait(PATIENCE)
    assert np.array_equal(seen(far, "theirs"), wanted)
    far.ask("fill", name="theirs", value=3)
    near.read(remote, mine).wait(PATIENCE)
    assert all((content(region) == 3).all() for region in mine)


def test_a_notification_comes_after_the_bytes(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=MIB, memory="vram")
    near.write(make_region(near, "vram", MIB, seed=6), near.peer("far")["theirs"], notify=b"landed").wait(PATIENCE)
    assert far.ask("hear") == "landed"
    assert np.array_equal(seen(far, "theirs"), random_bytes(MIB, 6))


def test_a_prepared_operation_moves_the_present_bytes_at_each_post(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=8 * KIB, memory="vram")
    mine = make_region(near, "vram", 8 * KIB)
    theirs = near.peer("far")["theirs"]
    write, read = near.prepare("write", mine, theirs), near.prepare("read", theirs, mine)
    from raynixl.testing.contents import put

    for turn in range(20):
        put(mine.memory, random_bytes(8 * KIB, turn + 1))
        write.post().wait(PATIENCE)
        put(mine.memory, np.zeros(8 * KIB, np.uint8))
        read.post().wait(PATIENCE)
        assert np.array_equal(content(mine), random_bytes(8 * KIB, turn + 1))


def test_a_region_of_host_memory_goes_over_shm_and_nvlink_at_once(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=MIB, memory="arena", seed=8)
    remote = near.peer("far")["theirs"]
    on_host, on_gpu = make_region(near, "arena", MIB), make_region(near, "vram", MIB)
    for _ in range(2):
        for mine, backend in ((on_host, "shm"), (on_gpu, "nvlink")):
            near.read(remote, mine).wait(PATIENCE)
            assert near.explain(remote, mine).backend == backend
            assert np.array_equal(content(mine), random_bytes(MIB, 8))


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_peers_arena_that_cannot_be_pinned_is_staged(gpus: Any, near: Agent, far: FarAgent, op: str) -> None:
    far.ask("region", name="theirs", nbytes=20 * MIB, memory="arena", seed=4)
    mine, remote = make_region(near, "vram", 20 * MIB, seed=5), near.peer("far")["theirs"]
    gpus.fail("cuMemHostRegister_v2", 2)
    plan = near.prepare(op, *((remote, mine) if op == "read" else (mine, remote)))
    plan.post().wait(PATIENCE)
    wanted = random_bytes(20 * MIB, 4 if op == "read" else 5)
    assert np.array_equal(content(mine), wanted)
    assert np.array_equal(seen(far, "theirs"), wanted)
    assert "cannot be pinned here: staged" in str(near.explain(remote, mine))


def test_plain_memory_of_another_process_is_refused_with_the_remedy(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=4096, memory="user")
    error = error_of(near.write(make_region(near, "vram", 4096), near.peer("far")["theirs"]))
    assert isinstance(error, BackendUnavailable)
    assert "agent.empty" in str(error)


def test_our_plain_memory_is_staged_and_explain_says_so(near: Agent, far: FarAgent) -> None:
    far.ask("region", name="theirs", nbytes=4096, memory="vram")
    remote = near.peer("far")["theirs"]
    assert "staged" in str(near.explain(make_region(near, "user", 4096), remote))
    assert "staged" not in str(near.explain(make_region(near, "arena", 4096), remote))


def test_memory_that_is_only_read_is_written_by_nobody(near: Agent, far: FarAgent) -> None:
    block = make_region(near, "vram", 8192, seed=1)
    mine = near.register(Piece(block, 0, 4096, writable=False))
    far.ask("region", name="theirs", nbytes=4096, memory="vram")
    with pytest.raises(RegionReadOnly):
        near.read(near.peer("far")["theirs"], mine)


def test_arenas_of_gpus_are_zeroed_and_their_bounds_are_kept(near: Agent) -> None:
    region = near.empty(5000, kind="vram", device=1)
    assert (region.kind, region.device, region.nbytes) == (MemoryKind.VRAM, 1, 5000)
    assert not content(region).any()
    with pytest.raises(ConfigError, match="tensor"):
        region.array()
    with pytest.raises(ConfigError):
        near.empty(4096, kind="vram", device=7)
    for nbytes in (0, -1, 1 << 61, 2.5):
        with pytest.raises(RangeError):
            near.empty(nbytes, kind="vram")


def test_an_agent_without_nvlink_makes_no_memory_of_gpus(gpus: Any) -> None:
    with gpu_agent("near", backends=("shm",)) as agent, pytest.raises(BackendUnavailable):
        agent.empty(4096, kind="vram")

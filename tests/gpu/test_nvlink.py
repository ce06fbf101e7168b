"""Memory of GPUs over nvlink, between two plain processes on one host: every byte, whatever the blocks and kinds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from agent_tools import error_of
from gpu_far import PATIENCE, content, digest, filled, registered, some_bytes
from gpu_tools import Far, Fars, has_cuda_torch

from raynixl import Agent, BackendUnavailable, RangeError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

KIB, MIB = 1 << 10, 1 << 20
BACKENDS = ("nvlink", "shm")
PAIRS = [
    ("vram", "vram"), ("gpu", "gpu"), ("arena", "vram"), ("vram", "arena"), ("pinned", "gpu"), ("host", "gpu"),
]  # fmt: skip
SIZES = [1, 4 * KIB - 1, 64 * KIB, 9 * MIB + 3]  # the last takes more than one piece of staging


@pytest.fixture
def near(make_near: Callable[..., Agent]) -> Agent:
    """The agent of this process."""
    return make_near(backends=BACKENDS)


@pytest.fixture
def far(fars: Fars) -> Far:
    """The far process."""
    return fars(backends=list(BACKENDS))


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_byte_arrives(near: Agent, far: Far, fars: Fars, ours: str, theirs: str, nbytes: int) -> None:
    peer, name = near.peer(far.record), fars.name()
    mine = registered(near, ours, nbytes, 1)
    far.ask("make", name=name, kind=theirs, nbytes=nbytes)
    sent = digest(mine)
    near.write(mine, peer[name]).wait(PATIENCE)
    assert far.ask("digest", name=name) == sent
    there = far.ask("fill", name=name, seed=2)
    near.read(peer[name], mine).wait(PATIENCE)
    assert digest(mine) == there
    far.ask("drop", name=name)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(("ours", "theirs"), [("vram", "vram"), ("arena", "vram"), ("vram", "arena"), ("host", "vram")])
def test_blocks_that_begin_and_end_anywhere_land_whole_and_nothing_beside_them(
    near: Agent, far: Far, fars: Fars, ours: str, theirs: str, op: str
) -> None:
    peer, name, nbytes = near.peer(far.record), fars.name(), 4 * MIB
    draw = np.random.default_rng(17)
    mine = registered(near, ours, nbytes, 1)
    far.ask("make", name=name, kind=theirs, nbytes=nbytes, seed=2)
    source, target = (some_bytes(nbytes, 1), some_bytes(nbytes, 2))
    if op == "read":
        source, target = target, source
    cells = draw.permutation(nbytes // KIB)  # a block lies inside a cell at both ends, so that none overlap
    lengths = draw.integers(1, 700, len(cells))
    starts = np.arange(len(cells)) * KIB + draw.integers(0, 300, len(cells))
    ends = cells * KIB + draw.integers(0, 300, len(cells))
    for start, end, length in zip(starts, ends, lengths, strict=True):
        target[end : end + length] = source[start : start + length]
    remote = peer[name]
    if op == "write":
        near.write(mine.blocks(starts, lengths), remote.blocks(ends, lengths)).wait(PATIENCE)
        assert far.ask("digest", name=name) == digest(target)
        assert digest(mine) == digest(source)
    else:
        near.read(remote.blocks(starts, lengths), mine.blocks(ends, lengths)).wait(PATIENCE)
        assert digest(mine) == digest(target)
        assert far.ask("digest", name=name) == digest(source)
    far.ask("drop", name=name)


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB])
def test_a_prepared_list_of_many_blocks_moves_the_present_bytes_at_each_post(
    near: Agent, far: Far, fars: Fars, block: int
) -> None:
    count, name = 5000, fars.name()
    peer, order = near.peer(far.record), np.random.default_rng(3).permutation(count)
    mine = near.register(filled("gpu", count * block, 1))
    far.ask("make", name=name, kind="gpu", nbytes=count * block)
    plan = near.prepare("write", mine.pages(np.arange(count), block), peer[name].pages(order, block))
    for seed in (1, 2):
        mine.cupy()[:] = filled("gpu", count * block, seed)
        mine.cupy().device.synchronize()
        plan.post().wait(PATIENCE)
        wanted = np.empty((count, block), np.uint8)
        wanted[order] = some_bytes(count * block, seed).reshape(count, block)
        assert far.ask("digest", name=name) == digest(wanted)
    far.ask("drop", name=name)


def test_a_block_that_the_copy_engine_takes_arrives(near: Agent, far: Far, fars: Fars) -> None:
    peer, name, nbytes = near.peer(far.record), fars.name(), 100 * MIB + 13
    mine = registered(near, "vram", nbytes, 1)
    far.ask("make", name=name, kind="vram", nbytes=nbytes)
    near.write(mine, peer[name]).wait(PATIENCE)
    assert far.ask("digest", name=name) == digest(mine)
    far.ask("drop", name=name)


def test_blocks_of_very_unequal_sizes_go_in_one_transfer(near: Agent, far: Far, fars: Fars) -> None:
    peer, name = near.peer(far.record), fars.name()
    lengths = np.array([1, 48 * MIB + 7, 16, 3, 5 * MIB, 4096, 2])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    nbytes = int(lengths.sum()) + 100
    mine = registered(near, "vram", nbytes, 1)
    far.ask("make", name=name, kind="vram", nbytes=nbytes)
    wanted = np.zeros(nbytes, np.uint8)
    shifted = starts + np.arange(len(starts)) * 7  # so that no two blocks are merged
    for start, to, length in zip(starts, shifted, lengths, strict=True):
        wanted[to : to + length] = some_bytes(nbytes, 1)[start : start + length]
    near.write(mine.blocks(starts, lengths), peer[name].blocks(shifted, lengths)).wait(PATIENCE)
    assert far.ask("digest", name=name) == digest(wanted)
    far.ask("drop", name=name)


def test_two_agents_of_one_process_use_addresses(make_near: Callable[..., Agent]) -> None:
    one, other = make_near(backends=BACKENDS), make_near(backends=BACKENDS)
    mine = registered(one, "vram", MIB + 5, 1)
    theirs = registered(other, "vram", MIB + 5, 0, name="theirs")
    remote = one.peer(other.record())["theirs"]
    one.write(mine, remote).wait(PATIENCE)
    assert digest(theirs) == digest(mine)
    assert "memory" in str(one.explain(mine, remote))


def test_explain_says_that_the_peers_memory_is_opened_by_ipc(near: Agent, far: Far, fars: Fars) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="gpu", nbytes=MIB)
    told = near.explain(near.register(filled("gpu", MIB, 1)), near.peer(far.record)[name])
    assert (told.backend, told.paths) == ("nvlink", ("ipc",))
    far.ask("drop", name=name)


def test_views_of_an_arena_on_a_gpu_are_its_bytes(near: Agent) -> None:
    region = registered(near, "vram", 1 << 16, 5)
    wanted = some_bytes(1 << 16, 5)
    assert np.array_equal(region.cupy(np.float32, (128, 128)).get().view(np.uint8).ravel(), wanted)
    assert np.array_equal(region.cupy(np.uint8, (100,), offset=33).get(), wanted[33:133])
    with pytest.raises(RangeError):
        region.cupy(np.float32, (1,), offset=2)
    if has_cuda_torch():
        import torch

        view = region.tensor(torch.bfloat16, (256, 128))
        assert view.is_cuda
        assert np.array_equal(content(view), wanted)
        view.zero_()
        torch.cuda.current_stream().synchronize()
        assert not content(region).any()


def test_tensors_of_one_allocation_of_torch_arrive_each_where_it_belongs(near: Agent, far: Far, fars: Fars) -> None:
    if not has_cuda_torch():
        pytest.skip("needs torch with CUDA")
    peer, names = near.peer(far.record), [fars.name() for _ in range(8)]
    sums = [far.ask("make", name=name, kind="torch", nbytes=5000 + 512 * n, seed=n + 1) for n, name in enumerate(names)]
    for number, (name, wanted) in enumerate(zip(names, sums, strict=True)):
        mine = near.register(filled("torch", 5000 + 512 * number, 0))
        near.read(peer[name], mine).wait(PATIENCE)
        assert digest(mine) == wanted
    for name in names:
        far.ask("drop", name=name)


def test_expandable_segments_are_refused_and_the_setting_to_change_is_named(
    near: Agent, make_far: Callable[..., Far]
) -> None:
    if not has_cuda_torch():
        pytest.skip("needs torch with CUDA")
    far = make_far(backends=list(BACKENDS), environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    far.ask("make", name="into", kind="torch", nbytes=MIB)
    error = error_of(near.write(near.register(filled("gpu", MIB, 1)), near.peer(far.record)["into"]))
    assert isinstance(error, BackendUnavailable)
    assert "expandable_segments:False" in f"{error} {error.hint}"


def test_plain_memory_of_another_process_is_refused_with_the_remedy(near: Agent, far: Far, fars: Fars) -> None:
    name = fars.name()
    far.ask("make", name=name, kind="host", nbytes=MIB)
    error = error_of(near.write(near.register(filled("gpu", MIB, 1)), near.peer(far.record)[name]))
    assert isinstance(error, BackendUnavailable)
    assert "agent.empty" in f"{error} {error.hint}"
    far.ask("drop", name=name)


def test_doctor_finds_the_gpu_and_moves_bytes_over_nvlink() -> None:
    from raynixl.cli.gpu_checks import check_gpus
    from raynixl.cli.path_checks import try_backend

    assert "GPU 0" in {one.name for one in check_gpus()}
    (finding,) = try_backend("nvlink")
    assert finding.verdict == "works", finding
    assert "ipc" in finding.detail

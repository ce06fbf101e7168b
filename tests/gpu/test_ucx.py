"""Memory of GPUs over UCX, between two plain processes: every byte, scattered blocks, a peer that is killed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from agent_tools import error_of, eventually
from gpu_far import PATIENCE, content, digest, filled
from gpu_tools import Far, Fars, has_cuda_torch, skip_without_gpu

from raynixl import Agent, BackendUnavailable, PeerLost, Transfer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

KIB, MIB = 1 << 10, 1 << 20
PATHS = [("host", "gpu"), ("gpu", "host"), ("gpu", "gpu")]
LANES = {"any": {}, "staged": {"TLS": "tcp,cuda_copy"}}


def is_done(transfer: Transfer) -> bool:
    """Wait for a transfer to a peer that may be dead; False if it is. Any other error is none that may come."""
    try:
        transfer.wait(PATIENCE)
    except PeerLost:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def _needs_ucxx() -> None:
    skip_without_gpu("ucxx")


@pytest.fixture(params=LANES)
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    """Options of UCX: whatever it chooses, and all bytes through host memory."""
    return LANES[request.param]


@pytest.fixture
def near(options: dict[str, str], make_near: Callable[..., Agent]) -> Agent:
    """The agent of this process."""
    return make_near(backends=("ucx",), ucx=options)


@pytest.fixture
def far(options: dict[str, str], fars: Fars) -> Far:
    """The far process."""
    return fars(backends=["ucx"], ucx=options)


@pytest.mark.parametrize("nbytes", [1, 4 * KIB - 1, MIB + 3, 64 * MIB])
@pytest.mark.parametrize(("source", "target"), PATHS)
def test_every_byte_arrives(near: Agent, far: Far, fars: Fars, source: str, target: str, nbytes: int) -> None:
    peer, into, out_of = near.peer(far.record), fars.name(), fars.name()
    ours, empty = filled(source, nbytes, 1), filled(target, nbytes, 0)
    far.ask("make", name=into, kind=target, nbytes=nbytes)
    near.write(near.register(ours), peer[into]).wait(PATIENCE)
    assert far.ask("digest", name=into) == digest(ours)
    theirs = far.ask("make", name=out_of, kind=source, nbytes=nbytes, seed=2)
    near.read(peer[out_of], near.register(empty)).wait(PATIENCE)
    assert digest(empty) == theirs
    for name in (into, out_of):
        far.ask("drop", name=name)


@pytest.mark.parametrize(("source", "target"), PATHS)
def test_scattered_blocks_land_where_they_belong(near: Agent, far: Far, fars: Fars, source: str, target: str) -> None:
    count, block, into = 1000, 4 * KIB, fars.name()
    peer, order = near.peer(far.record), np.random.default_rng(3).permutation(count)
    ours = filled(source, count * block, 1)
    far.ask("make", name=into, kind=target, nbytes=count * block)
    region = near.register(ours)
    near.write(region.pages(np.arange(count), block), peer[into].pages(order, block)).wait(PATIENCE)
    wanted = np.empty((count, block), np.uint8)
    wanted[order] = content(ours).reshape(count, block)
    assert far.ask("digest", name=into) == digest(wanted)
    far.ask("drop", name=into)


def test_a_peer_that_is_killed_is_an_error_and_others_are_reached_as_before(
    near: Agent, far: Far, fars: Fars, make_far: Callable[..., Far], options: dict[str, str]
) -> None:
    victim, nbytes, name = make_far(backends=["ucx"], ucx=options), 64 * MIB, fars.name()
    ours = near.register(filled("gpu", nbytes, 1))
    victim.ask("make", name="memory", kind="gpu", nbytes=nbytes, seed=2)
    theirs = near.peer(victim.record)["memory"]
    plans = [near.prepare("write", ours, theirs), near.prepare("read", theirs, ours)]
    for plan in plans:
        plan.post().wait(PATIENCE)
    transfers = [plan.post(timeout=20.0) for plan in plans * 25]
    victim.kill()
    for plan in plans:
        eventually(lambda plan=plan: not is_done(plan.post(timeout=20.0)), "the peer's death is noticed")
    for transfer in transfers:  # over CUDA IPC most of them are through before it dies
        is_done(transfer)
    again = filled("gpu", MIB, 3)
    far.ask("make", name=name, kind="gpu", nbytes=MIB)
    near.write(near.register(again), near.peer(far.record)[name]).wait(PATIENCE)
    assert far.ask("digest", name=name) == digest(again)


@pytest.mark.parametrize("options", [{}], ids=["any"])
def test_gpus_of_one_host_reach_each_other_by_cuda_ipc(near: Agent, far: Far, fars: Fars) -> None:
    into = fars.name()
    far.ask("make", name=into, kind="gpu", nbytes=MIB)
    told = str(near.explain(near.register(filled("gpu", MIB, 1)), near.peer(far.record)[into]))
    assert "cuda_ipc" in told
    assert "software emulation" not in told


@pytest.mark.parametrize("options", [{}], ids=["any"])
def test_expandable_segments_of_torch_arrive_and_the_setting_to_change_is_named(
    near: Agent, make_far: Callable[..., Far]
) -> None:
    if not has_cuda_torch():
        pytest.skip("needs torch with CUDA")
    far = make_far(backends=["ucx"], environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    far.ask("make", name="into", kind="torch", nbytes=MIB)
    ours, peer = filled("gpu", MIB, 1), near.peer(far.record)
    region = near.register(ours)
    near.write(region, peer["into"]).wait(PATIENCE)
    assert far.ask("digest", name="into") == digest(ours)
    assert "expandable_segments:False" in str(near.explain(region, peer["into"]))


@pytest.mark.parametrize("options", [{"TLS": "tcp"}], ids=["tcp"])
def test_without_a_transport_for_gpu_memory_ours_is_staged_and_the_peers_is_refused(
    near: Agent, far: Far, fars: Fars
) -> None:
    into, of_gpu = fars.name(), fars.name()
    far.ask("make", name=into, kind="host", nbytes=20 * MIB)
    far.ask("make", name=of_gpu, kind="gpu", nbytes=MIB)
    ours, peer = near.register(filled("gpu", 20 * MIB, 1)), near.peer(far.record)
    near.write(ours, peer[into]).wait(PATIENCE)
    assert far.ask("digest", name=into) == digest(ours)
    assert "staged through pinned memory" in str(near.explain(ours, peer[into]))
    error = error_of(near.write(ours[:MIB], peer[of_gpu]))
    assert isinstance(error, BackendUnavailable)
    assert "cuda_copy" in f"{error.hint}{error}"


@pytest.mark.parametrize("op", ["read", "write"])
def test_gpu_memory_that_no_lane_reaches_is_staged_block_by_block(near: Agent, far: Far, fars: Fars, op: str) -> None:
    count, block, name = 3000, 10007, fars.name()  # 30 MB: several buffers, blocks across their ends
    before = far.ask("make", name=name, kind="host", nbytes=count * block, seed=4)
    ours, order = filled("gpu", count * block, 5), np.random.default_rng(3).permutation(count)
    peer = near.peer(far.record)
    region = near.register(ours)
    mine, theirs = region.pages(np.arange(count), block), peer[name].pages(order, block)
    assert "staged through pinned memory" in str(near.explain(region, peer[name]))
    if op == "write":
        near.write(mine, theirs).wait(PATIENCE)
        wanted = np.empty((count, block), np.uint8)
        wanted[order] = content(ours).reshape(count, block)
        assert far.ask("digest", name=name) == digest(wanted)
    else:
        near.read(theirs, mine).wait(PATIENCE)
        wanted = np.empty((count, block), np.uint8)
        wanted[order] = content(ours).reshape(count, block)
        assert digest(wanted) == before
    far.ask("drop", name=name)

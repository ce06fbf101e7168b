"""Memory of a GPU over UCX's transports for host memory, staged: a fake CUDA driver here, real UCX, another process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from agent_tools import error_of, make_agent
from cuda_fake import FakeCuda
from gpu_tools import Far

from raynixl import Agent, AgentConfig, PeerLost, Region
from raynixl.backends import ucx_gpu
from raynixl.backends.nvlink_staging import PIECE_NBYTES
from raynixl.bench.ends import bytes_of
from raynixl.bench.gpu import download, upload
from raynixl.bench.layout import digest, fill

pytestmark = pytest.mark.skipif("ucx" not in AgentConfig().backends, reason="ucxx is not installed")
PATIENCE = 30.0
LANES = {"tcp": {"TLS": "tcp"}, "cma": {"TLS": "cma,tcp"}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], list[str]], fake_cuda: FakeCuda) -> FakeCuda:
    """A made-up GPU, as if cupy were here."""
    monkeypatch.setattr(ucx_gpu, "find_spec", lambda _name: object())
    return fake_cuda


@pytest.fixture(params=LANES)
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    """Options of UCX."""
    return LANES[request.param]


@pytest.fixture
def pair(fake: FakeCuda, options: dict[str, str]) -> Iterator[tuple[Agent, Far]]:
    """An agent here, and one in another process that has host memory only."""
    with ExitStack() as stack:
        far = stack.enter_context(Far(backends=["ucx"], ucx=options))
        yield stack.enter_context(make_agent("near", backends=("ucx",), ucx=options)), far


def on_gpu(agent: Agent, nbytes: int, seed: int) -> Region:
    """A region of the made-up GPU that holds what no other seed gives."""
    region, source = agent.empty(nbytes, kind="vram"), np.empty(nbytes, np.uint8)
    fill(source, seed)
    upload(region, source)
    return region


def test_every_byte_goes_there_and_back(pair: tuple[Agent, Far]) -> None:
    near, far = pair
    peer = near.peer(far.record)
    for nbytes in (1, 4099, 2 * PIECE_NBYTES + 3):
        name, ours = f"theirs-{nbytes}", on_gpu(near, nbytes, 5)
        sent = digest(download(ours))
        far.ask("make", name=name, kind="host", nbytes=nbytes)
        near.write(ours, peer[name]).wait(PATIENCE)
        assert far.ask("digest", name=name) == sent
        other = far.ask("fill", name=name, seed=9)
        near.read(peer[name], ours).wait(PATIENCE)
        assert digest(download(ours)) == other


def test_blocks_that_lie_across_the_ends_of_buffers_land_where_they_belong(pair: tuple[Agent, Far]) -> None:
    near, far = pair
    count, block = 300, 70_001  # 21 MB: three buffers, none of which ends with a block
    ours = on_gpu(near, count * block, 5)
    there = far.ask("make", name="theirs", kind="arena", nbytes=count * block, seed=3)
    order = np.random.default_rng(1).permutation(count)
    mine, theirs = ours.pages(np.arange(count), block), near.peer(far.record)["theirs"].pages(order, block)
    placed = np.empty((count, block), np.uint8)
    near.read(theirs, mine).wait(PATIENCE)
    placed[order] = download(ours).reshape(count, block)
    assert digest(placed) == there
    source = np.empty(count * block, np.uint8)
    fill(source, 8)
    upload(ours, source)
    near.write(mine, theirs).wait(PATIENCE)
    placed[order] = source.reshape(count, block)
    assert far.ask("digest", name="theirs") == digest(placed)


def test_it_is_explained_and_posted_again_and_again(pair: tuple[Agent, Far], options: dict[str, str]) -> None:
    near, far = pair
    ours = on_gpu(near, 4096, 1)
    far.ask("make", name="theirs", kind="host", nbytes=4096)
    theirs = near.peer(far.record)["theirs"]
    told = near.explain(ours, theirs)
    assert "staged through pinned memory" in str(told)
    assert told.backend == "ucx"
    assert told.paths == (("cma",) if "cma" in options["TLS"] else ("tcp/lo (software emulation)",))
    plan = near.prepare("write", ours, theirs)
    for seed in range(2, 7):
        source = np.empty(4096, np.uint8)
        fill(source, seed)
        upload(ours, source)
        plan.post().wait(PATIENCE)
        assert far.ask("digest", name="theirs") == digest(source)


def test_a_killed_peer_is_an_error_and_its_successor_is_reached(
    pair: tuple[Agent, Far], options: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    near, far = pair
    caplog.set_level(logging.CRITICAL)
    ours = on_gpu(near, 3 * PIECE_NBYTES, 5)
    far.ask("make", name="theirs", kind="host", nbytes=3 * PIECE_NBYTES)
    plan = near.prepare("write", ours, near.peer(far.record)["theirs"])
    plan.post().wait(PATIENCE)
    transfers: list[Any] = [plan.post(timeout=PATIENCE) for _ in range(4)]
    far.kill()
    assert isinstance(error_of(transfers[-1]), PeerLost)
    with Far(backends=["ucx"], ucx=options) as heir:
        heir.ask("make", name="into", kind="host", nbytes=4096)
        near.write(ours[:4096], near.peer(heir.record)["into"]).wait(PATIENCE)
        assert heir.ask("digest", name="into") == digest(download(ours)[:4096])


def test_what_nvlink_does_not_reach_goes_over_ucx_and_both_are_explained(fake: FakeCuda) -> None:
    with (
        Far(backends=["nvlink", "shm", "ucx"]) as far,
        make_agent("near", backends=("nvlink", "shm", "ucx")) as near,
    ):
        ours = on_gpu(near, 4096, 5)
        far.ask("make", name="plain", kind="host", nbytes=4096)
        plain = near.peer(far.record)["plain"]
        near.write(ours, plain).wait(PATIENCE)
        assert far.ask("digest", name="plain") == digest(download(ours))
        told = near.explain(ours, plain)
        assert told.backend == "ucx"
        assert dict(told.rejected)["shm"] == "does not carry vram-dram"
        assert "does not offer the region over it" in dict(told.rejected)["nvlink"]  # it has no driver
        assert "staged through pinned memory" in told.detail


@pytest.mark.parametrize("is_gpu_first", [True, False], ids=["gpu first", "host first"])
@pytest.mark.parametrize("op", ["write", "read"])
def test_one_transfer_may_have_memory_of_a_gpu_and_of_the_host(
    pair: tuple[Agent, Far], op: str, is_gpu_first: bool
) -> None:
    near, far = pair
    ours = [on_gpu(near, 4099, 5), near.register(np.zeros(70_001, np.uint8))]
    fill(ours[1].array(), 6)
    regions = ours if is_gpu_first else ours[::-1]
    total = sum(region.nbytes for region in ours)
    far.ask("make", name="theirs", kind="host", nbytes=total)
    theirs = near.peer(far.record)["theirs"]
    if op == "write":
        sent = digest(np.concatenate([bytes_of(region) for region in regions]))
        near.write(regions, theirs).wait(PATIENCE)
        assert far.ask("digest", name="theirs") == sent
        assert "staged through pinned memory" in str(near.explain(regions, theirs))
    else:
        filled = far.ask("fill", name="theirs", seed=9)
        near.read(theirs, regions).wait(PATIENCE)
        assert digest(np.concatenate([bytes_of(region) for region in regions])) == filled

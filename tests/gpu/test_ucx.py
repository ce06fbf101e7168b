"""Memory of GPUs over UCX, between two plain processes: every byte, scattered blocks, a peer that is killed."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_tools import error_of

from raynixl import Agent, AgentConfig, BackendUnavailable, PeerLost
from raynixl.cuda import has_driver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

PATIENCE = 60.0
KIB, MIB = 1 << 10, 1 << 20
PATHS = [("host", "gpu"), ("gpu", "host"), ("gpu", "gpu")]
LANES = {"any": {}, "staged": {"TLS": "tcp,cuda_copy"}}


def why_no_gpu() -> str:
    """Why there is nothing to test here, or ''."""
    if missing := [name for name in ("cupy", "ucxx") if importlib.util.find_spec(name) is None]:
        return f"needs {' and '.join(missing)}"
    if not has_driver():
        return "needs the NVIDIA driver (libcuda.so.1)"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "needs a GPU"
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        return f"needs a GPU: {exc}"


class Far:
    """The other process, its agent's record, and what it is asked."""

    def __init__(self, options: dict[str, str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "gpu_far.py"), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip
        self.record = base64.b64decode(self.hear()["record"])

    def ask(self, do: str, **fields: Any) -> str:
        """Have something done; the digest of the memory after it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self.process.stdin.flush()
        return str(self.hear()["digest"])

    def hear(self) -> dict[str, Any]:
        """The next line, within a bounded time."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "the far process does not answer"
        line = self.process.stdout.readline()
        assert line, f"the far process ended: {self.process.wait(PATIENCE)}"
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if reason := why_no_gpu():
        pytest.skip(reason)


@pytest.fixture(params=LANES)
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    """Options of UCX: whatever it chooses, and all bytes through host memory."""
    return LANES[request.param]


@pytest.fixture
def near(options: dict[str, str]) -> Iterator[Agent]:
    """The agent of this process."""
    with Agent("near", config=AgentConfig(backends=("ucx",), ucx=options)) as agent:
        yield agent


@pytest.fixture
def make_far(options: dict[str, str]) -> Iterator[Callable[..., Far]]:
    """Start far processes, which end with the test."""
    made: list[Far] = []

    def make(**environment: str) -> Far:
        made.append(Far(options, **environment))
        return made[-1]

    yield make
    for far in made:
        far.close()


@pytest.mark.parametrize("nbytes", [1, 4 * KIB - 1, 64 * KIB, MIB + 3, 64 * MIB])
@pytest.mark.parametrize(("source", "target"), PATHS)
def test_every_byte_arrives(near: Agent, make_far: Callable[..., Far], source: str, target: str, nbytes: int) -> None:
    from gpu_far import digest, filled

    far = make_far()
    peer = near.peer(far.record)
    ours, empty = filled(source, nbytes, 1), filled(target, nbytes, 0)
    far.ask("make", name="into", kind=target, nbytes=nbytes, seed=0)
    near.write(near.register(ours), peer["into"]).wait(PATIENCE)
    assert far.ask("digest", name="into") == digest(ours)
    theirs = far.ask("make", name="from", kind=source, nbytes=nbytes, seed=2)
    near.read(peer["from"], near.register(empty)).wait(PATIENCE)
    assert digest(empty) == theirs


@pytest.mark.parametrize(("source", "target"), PATHS)
def test_scattered_blocks_land_where_they_belong(
    near: Agent, make_far: Callable[..., Far], source: str, target: str
) -> None:
    from gpu_far import content, digest, filled

    count, block = 1000, 4 * KIB
    far = make_far()
    peer, order = near.peer(far.record), np.random.default_rng(3).permutation(count)
    ours = filled(source, count * block, 1)
    far.ask("make", name="into", kind=target, nbytes=count * block, seed=0)
    region = near.register(ours)
    near.write(region.pages(np.arange(count), block), peer["into"].pages(order, block)).wait(PATIENCE)
    wanted = np.empty((count, block), np.uint8)
    wanted[order] = content(ours).reshape(count, block)
    assert far.ask("digest", name="into") == digest(wanted)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_peer_that_is_killed_is_an_error_and_its_successor_is_reached(
    near: Agent, make_far: Callable[..., Far], op: str
) -> None:
    from gpu_far import digest, filled

    far, nbytes = make_far(), 64 * MIB
    ours = near.register(filled("gpu", nbytes, 1))
    far.ask("make", name="memory", kind="gpu", nbytes=nbytes, seed=2)
    theirs = near.peer(far.record)["memory"]
    pair = (ours, theirs) if op == "write" else (theirs, ours)
    near.prepare(op, *pair).post().wait(PATIENCE)
    transfers = [near.prepare(op, *pair).post(timeout=20.0) for _ in range(50)]
    far.process.kill()
    assert isinstance(error_of(transfers[-1]), PeerLost)
    deadline = time.monotonic() + PATIENCE
    while not all(transfer.done for transfer in transfers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heir, again = make_far(), filled("gpu", MIB, 3)
    heir.ask("make", name="into", kind="gpu", nbytes=MIB, seed=0)
    near.write(near.register(again), near.peer(heir.record)["into"]).wait(PATIENCE)
    assert heir.ask("digest", name="into") == digest(again)


@pytest.mark.parametrize("options", [{}], ids=["any"])
def test_gpus_of_one_host_reach_each_other_by_cuda_ipc(near: Agent, make_far: Callable[..., Far]) -> None:
    from gpu_far import filled

    far = make_far()
    far.ask("make", name="into", kind="gpu", nbytes=MIB, seed=0)
    told = str(near.explain(near.register(filled("gpu", MIB, 1)), near.peer(far.record)["into"]))
    assert "cuda_ipc" in told
    assert "software emulation" not in told


@pytest.mark.parametrize("options", [{}], ids=["any"])
def test_expandable_segments_of_torch_arrive_and_the_setting_to_change_is_named(
    near: Agent, make_far: Callable[..., Far]
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from gpu_far import digest, filled

    far = make_far(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    far.ask("make", name="into", kind="torch", nbytes=MIB, seed=0)
    ours, peer = filled("gpu", MIB, 1), near.peer(far.record)
    region = near.register(ours)
    near.write(region, peer["into"]).wait(PATIENCE)
    assert far.ask("digest", name="into") == digest(ours)
    assert "expandable_segments:False" in str(near.explain(region, peer["into"]))


@pytest.mark.parametrize("options", [{"TLS": "tcp"}], ids=["tcp"])
def test_without_a_transport_for_gpu_memory_it_is_refused(near: Agent, make_far: Callable[..., Far]) -> None:
    from gpu_far import filled

    far = make_far()
    far.ask("make", name="into", kind="host", nbytes=MIB, seed=0)
    error = error_of(near.write(near.register(filled("gpu", MIB, 1)), near.peer(far.record)["into"]))
    assert isinstance(error, BackendUnavailable)
    assert "cuda_copy" in f"{error.hint}{error}"

"""GPU memory under UCX, decided without a GPU: what is refused, what is slow, and in which context it is mapped."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cuda_fake import PRIMARY, FakeCuda

from raynixl.backends import ucx_gpu
from raynixl.backends.ucx_gpu import check_transports, is_staged, parse_version, ready_to_map, why_slow
from raynixl.backends.ucx_options import Lanes
from raynixl.cuda import FABRIC, POSIX_FD, Allocation, Origin
from raynixl.errors import BackendUnavailable, ConfigError
from raynixl.memory import Memory, MemoryKind


@dataclass
class FakeRuntime:
    """UCX as the preparation of a mapping sees it."""

    transports: tuple[str, ...] = ("cuda_copy/cuda", "cuda_ipc/cuda", "tcp/eth0")
    settings: str = "UCX_TLS=something"
    version: str = "1.21.0"
    entered: list[int] = field(default_factory=list)

    def enter_cuda(self, context: int) -> None:
        """Note it."""
        self.entered.append(context)


def vram(address: int, device: int = 0) -> Memory:
    """A page on a made-up GPU."""
    return Memory(MemoryKind.VRAM, device, address, 4096, True, None)


@pytest.mark.parametrize(
    ("kind", "is_direct", "has_cupy", "staged"),
    [
        (MemoryKind.VRAM, False, True, True),
        (MemoryKind.VRAM, True, True, False),
        (MemoryKind.VRAM, False, False, False),  # UCX stages it then
        (MemoryKind.DRAM, False, True, False),
    ],
)
def test_memory_of_a_gpu_that_no_lane_reaches_is_staged(monkeypatch, kind, is_direct, has_cupy, staged):
    monkeypatch.setattr(ucx_gpu, "find_spec", lambda _name: object() if has_cupy else None)
    assert is_staged(kind, is_direct=is_direct) == staged


@pytest.mark.parametrize("transports", [(), ("tcp/eth0", "cma/memory"), ("cuda_ipc/cuda", "tcp/eth0")])
def test_without_a_transport_that_copies_gpu_memory_it_is_refused_and_the_setting_named(transports):
    with pytest.raises(BackendUnavailable, match="UCX_TLS=tcp") as caught:
        check_transports(transports, "UCX_TLS=tcp")
    assert "cuda_copy" in caught.value.hint


def test_host_memory_is_mapped_without_a_word_to_cuda(fake_cuda: FakeCuda):
    runtime = FakeRuntime(transports=())
    with ready_to_map(Memory(MemoryKind.DRAM, 0, 4096, 4096, True, None), runtime) as slow:
        assert slow == ""
    assert runtime.entered == []
    assert not fake_cuda.calls


def test_gpu_memory_is_mapped_in_its_context_which_ucx_then_works_in(fake_cuda: FakeCuda):
    own, runtime = fake_cuda.devices.make_context(0), FakeRuntime()
    with ready_to_map(vram(fake_cuda.make(1 << 20, context=own)), runtime) as slow:
        assert fake_cuda.devices.stack == [own]
        assert slow == ""
    assert fake_cuda.devices.stack == []
    assert runtime.entered == [own]


def test_expandable_segments_are_mapped_in_the_primary_context_and_said_to_be_slow(fake_cuda: FakeCuda, caplog):
    address = fake_cuda.make(1 << 20, device=1, origin=Origin.VIRTUAL, handle_types=POSIX_FD)
    runtime = FakeRuntime()
    with caplog.at_level(logging.WARNING), ready_to_map(vram(address, 1), runtime) as slow:
        assert fake_cuda.devices.stack == [PRIMARY + 1]
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in slow
    assert slow in caplog.text


def test_memory_that_was_freed_meanwhile_is_not_mapped(fake_cuda: FakeCuda):
    address = fake_cuda.make(1 << 20)
    fake_cuda.drop(address)
    with pytest.raises(ConfigError, match="on no GPU"), ready_to_map(vram(address), FakeRuntime()):
        pass


@pytest.mark.parametrize(
    ("origin", "handle_types", "version", "setting"),
    [
        (Origin.MALLOC, 0, (1, 19), ""),
        (Origin.VIRTUAL, FABRIC | POSIX_FD, (1, 19), ""),
        (Origin.VIRTUAL, POSIX_FD, (1, 21), "expandable_segments:False"),
        (Origin.VIRTUAL, POSIX_FD, (1, 22), ""),
        (Origin.VIRTUAL, 0, (1, 22), "expandable_segments:False"),
        (Origin.POOL, POSIX_FD, (1, 22), "backend:native"),
        (Origin.POOL, FABRIC, (1, 21), ""),
        (Origin.MANAGED, 0, (1, 22), "cudaMalloc"),
    ],
)
def test_what_cuda_ipc_does_not_export_is_known_and_what_to_set(origin, handle_types, version, setting):
    said = why_slow(Allocation(0, 0, 1 << 40, 4096, origin, handle_types), version)
    assert bool(said) == bool(setting)
    assert setting in said


@pytest.mark.parametrize(
    ("text", "version"), [("1.21.0", (1, 21)), ("1.22", (1, 22)), ("master", (0, 0)), ("", (0, 0))]
)
def test_versions_of_ucx_are_read(text, version):
    assert parse_version(text) == version


def test_an_explanation_tells_that_cuda_ipc_does_not_reach_such_memory_and_why():
    lanes = Lanes.of(["cuda_ipc/cuda", "tcp/lo"]).reaching(MemoryKind.VRAM)
    assert "cuda_ipc/cuda: without the peer's help" in lanes.explain()
    slow = lanes.reaching(MemoryKind.VRAM, "set PYTORCH_CUDA_ALLOC_CONF")
    assert slow.is_emulation
    assert "takes part in each operation; set PYTORCH_CUDA_ALLOC_CONF; all transports" in slow.explain()
    assert not Lanes.of(["rc_mlx5/mlx5_0:1"]).reaching(MemoryKind.VRAM, "slow").is_emulation, "RDMA exports it"


# In a process of its own, since a context is entered once for the process.
ENTER = """
    import threading
    import cuda_fake
    import numpy as np
    from agent_tools import introduce, make_agent

    taken, fake = [], cuda_fake.install()
    context = fake.devices.make_context(0)
    fake.watch("cuCtxSetCurrent", lambda given: taken.append((threading.get_native_id(), given)))
    with make_agent("near", **SETTINGS) as near, make_agent("far", **SETTINGS) as far:
        introduce(near, far)
        theirs, mine = np.zeros(1 << 20, np.uint8), np.arange(1 << 20, dtype=np.uint8)
        far.register(theirs, name="theirs")
        region = near.register(mine)
        for number in range(200):
            mine += 1
            near.write(region, near.peer("far")["theirs"]).wait(20.0)
            assert (theirs == mine).all()
            if number == 0:
                (backend,) = near.backends
                backend.network._run().enter_cuda(context)
            if number > 1 and threading.get_native_id() in dict(taken):
                break  # a thread that posts or waits drives UCX, too, if others have not done all by then
    assert taken
    assert {given for _, given in taken} == {context}
    assert len(taken) == len(dict(taken)), "each thread takes it once"
    print(len(taken), threading.get_native_id() in dict(taken))
"""


@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")
@pytest.mark.parametrize("native", [True, False], ids=["native", "ctypes"])
def test_transfers_go_on_while_the_threads_of_ucx_take_a_context(native):
    settings = f"SETTINGS = dict(backends=('ucx',), ucx={{'TLS': 'tcp'}}, native={native})\n"
    path = f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + settings + textwrap.dedent(ENTER)],
        capture_output=True, text=True, timeout=90, check=False,
        env={name: value for name, value in os.environ.items() if name != "RAYNIXL_NATIVE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, caller_took_it = done.stdout.split()
    assert int(count) > 1, "the threads that serve, beside the caller"
    assert caller_took_it == "True"

"""Windows for kernels of a GPU: where a peer's memory lies for them, and which memory they do not reach."""

from __future__ import annotations

import pytest
from agent_tools import make_agent
from vram_tools import gpu_agent, made_up_gpus

from raynixl.errors import BackendUnavailable, RegionStale


def test_kernels_reach_a_peers_memory_of_their_gpu_and_of_another_one(nothing_left):
    with made_up_gpus() as fake, gpu_agent("a") as a, gpu_agent("b") as b:
        region = b.empty(1 << 20, kind="vram", name="there")
        remote = a.peer(b.record())["there"]
        window = a.window(remote, device=0)
        assert window.is_mapped
        assert window.is_usable
        assert (window.address, window.path) == (region.memory.address, "memory")
        assert not fake.devices.peers
        assert a.window(remote, device=1).address == region.memory.address
        assert len(fake.devices.peers) == 1
        assert a.window(remote).address == 0  # for threads of the host it is not mapped
        b.deregister(region)
        assert isinstance(window.error, RegionStale)
        del region


def test_memory_of_the_host_and_other_backends_is_refused(nothing_left):
    with made_up_gpus(), gpu_agent("a") as a, gpu_agent("b") as b:
        b.empty(4096, name="arena")
        with pytest.raises(BackendUnavailable, match="in no GPU's memory"):
            a.window(a.peer(b.record())["arena"], device=0)


def test_kernels_are_inside_of_a_gate_for_which_the_owner_waits():
    with made_up_gpus(), gpu_agent("a") as a, gpu_agent("b", deregister_timeout=0.2) as b:
        region = b.empty(4096, kind="vram", name="memory")
        (gate,) = a.window(a.peer(b.record())["memory"], device=0).gates
        assert gate.enter() == 0
        b.deregister(region)
        assert gate.aborted
        assert gate.inflight == 1
        gate.leave()
        assert gate.enter() != 0
        del region


def test_without_a_backend_for_gpus_there_is_none(nothing_left):
    with make_agent("a", backends=("loopback", "shm")) as a, make_agent("b", backends=("loopback", "shm")) as b:
        b.empty(4096, name="arena")
        with pytest.raises(BackendUnavailable, match="no backend carries"):
            a.window(a.peer(b.record())["arena"], device=0)

"""Weights in the memory of a fake CUDA driver go from one agent to the other over nvlink, with all that is freed."""

import time

import pytest
import torch
from device_stand_in import GPU, StandIn
from weights_tools import Cluster, Policy, fill, same

from raynixl import Agent, AgentConfig, cuda
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.arenas import Arenas
from raynixl.weights.layout import Layout
from raynixl.weights.space import HOST, spaces_for

BACKENDS = ("nvlink", "shm")


@pytest.fixture
def device(fake_cuda, monkeypatch):
    made = StandIn()
    made.install_over(fake_cuda, monkeypatch)
    return made


@pytest.fixture
def link(device, fleet):
    """Agents that reach GPUs' memory, which is given back with them."""
    yield lambda name: fleet(name, backends=BACKENDS)
    for agent in fleet.agents:
        agent.close()
    fleet.agents.clear()


@pytest.mark.parametrize("install", ["copy", "swap"])
def test_versions_go_from_gpu_to_gpu(link, device, install):
    source, target = device.move(Policy(value=1.0)), device.move(Policy())
    cluster = Cluster(link, source, [target], install=install)
    for version in (1, 2, 3):
        fill(source, float(version))
        cluster.sync.push(version).raise_for_excluded()
        assert same(target, source)
    assert {slot.arenas.space for slot in cluster.subscriptions[0]._follower._slots} == {GPU}
    [ours] = next(iter(cluster.subscriptions[0]._follower._slots)).arenas.regions
    theirs = cluster.rollouts[0].peer("trainer")["weights/policy/0"]
    assert "nvlink" in str(cluster.rollouts[0].explain(theirs, ours))


@pytest.mark.parametrize("is_source", [True, False], ids=["gpu to host", "host to gpu"])
def test_one_side_may_be_on_the_host(link, device, is_source):
    source, target = Policy(value=1.0), Policy()
    device.move(source if is_source else target)
    cluster = Cluster(link, source, [target])
    for version in (1, 2):
        fill(source, float(version))
        cluster.sync.push(version).raise_for_excluded()
        assert same(target, source)
    slots = list(cluster.subscriptions[0]._follower._slots)
    assert slots[0].arenas.space == (HOST if is_source else GPU)


def test_in_place_and_relayed(link, device):
    source = device.move(Policy(value=1.0))
    trainer = link("trainer")
    publication = publish(trainer, "policy", source, copy_out=False, chunk_nbytes=4096)
    targets = {f"rollout-{number}": device.move(Policy()) for number in range(3)}
    for name, target in targets.items():
        subscribe(link(name), "policy", target)
    sync = WeightSync(trainer, "policy", ["trainer"], list(targets), timeout=20, topology="relay")
    for version in (1, 2):
        with publication.updating():
            fill(source, float(version))
        report = sync.push(version)
        report.raise_for_excluded()
        assert all(same(target, source) for target in targets.values())
    assert report.peer_nbytes > 0


def test_few_changes_travel_as_a_delta_through_host_memory(link, device):
    source = device.move({"w": torch.arange(100_000, dtype=torch.int32)})
    target = device.move({"w": torch.zeros(100_000, dtype=torch.int32)})
    cluster = Cluster(link, source, [target])
    for version in (1, 2):
        cluster.sync.push(version).raise_for_excluded()
    deadline = time.monotonic() + 20
    while len(cluster.publication._copies._copies) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for version in (3, 4):
        source["w"][version * 100] = -version
        report = cluster.sync.push(version)
        report.raise_for_excluded()
        assert same(target, source)
    assert report.deltas == 1
    assert report.origin_nbytes < 1000


def test_a_gpu_without_room_leaves_versions_in_host_memory(link, device, fake_cuda):
    source, target = device.move(Policy(value=2.0)), device.move(Policy())
    fake_cuda.fail("cuMemAlloc_v2", 2, times=2)  # CUDA_ERROR_OUT_OF_MEMORY
    cluster = Cluster(link, source, [target])
    cluster.sync.push(1).raise_for_excluded()
    assert same(target, source)
    slots = list(cluster.subscriptions[0]._follower._slots)
    assert [slot.arenas.space for slot in slots] == [HOST]
    assert cuda.pinned_address(slots[0].arenas.regions[0].memory.address, 1) is not None


def test_host_memory_for_a_model_on_one_gpu_is_pinned_without_a_context_on_another(fake_cuda, monkeypatch):
    monkeypatch.setattr("raynixl.weights.space.device_of", lambda _tensor: "cuda:1")
    with Agent("trainer", config=AgentConfig(backends=("shm",))) as agent:
        arenas = Arenas(agent, Layout((), (4096,)), spaces=spaces_for([torch.zeros(100)], "dram"))
        assert cuda.pinned_address(arenas.regions[0].memory.address, 1) is not None
        assert set(fake_cuda.devices.retained) == {1}
        arenas.release()


def test_host_memory_that_cannot_be_pinned_carries_them_as_well(link, device, fake_cuda):
    fake_cuda.fail("cuMemHostRegister_v2", 2, times=10)
    source, target = device.move(Policy(value=2.0)), device.move(Policy())
    trainer, rollout = link("trainer"), link("rollout")
    publish(trainer, "policy", source, memory="dram")
    subscribe(rollout, "policy", target, memory="dram")
    WeightSync(trainer, "policy", ["trainer"], ["rollout"], timeout=20).push(1).raise_for_excluded()
    assert same(target, source)

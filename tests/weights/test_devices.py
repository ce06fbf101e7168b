"""Weights on a GPU, which memory of a stand-in takes the place of: they stay there, and every byte arrives."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_stand_in import GPU, StandIn
from weights_tools import Cluster, Policy, fill, same

from raynixl.errors import ConfigError, IntegrityError, RangeError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.bank import HostBank
from raynixl.weights.space import HOST, spaces_for


@pytest.fixture
def device(monkeypatch):
    made = StandIn()
    made.install(monkeypatch)
    return made


def addresses(model):
    return [tensor.data_ptr() for tensor in model.state_dict().values()]


def slots(cluster, number=0):
    return list(cluster.subscriptions[number]._follower._slots)


def test_a_model_on_a_gpu_is_copied_out_pulled_and_installed_there(fleet, device):
    source, target = device.move(Policy(value=1.0)), device.move(Policy())
    cluster = Cluster(fleet, source, [target])
    before = addresses(target)
    for version in (1, 2):
        fill(source, float(version))
        cluster.sync.push(version).raise_for_excluded()
        assert same(target, source)
    assert addresses(target) == before  # captured graphs know them
    assert [slot.arenas.space for slot in slots(cluster)] == [GPU]
    assert cluster.publication._copies.first.arenas.space == GPU


def test_tensors_on_a_gpu_are_repointed_where_that_is_asked_for(fleet, device):
    source, target = device.move(Policy(value=1.0)), device.move(Policy())
    cluster = Cluster(fleet, source, [target], install="swap")
    for version in (1, 2, 3):
        fill(source, float(version))
        cluster.sync.push(version).raise_for_excluded()
        assert same(target, source)
        active = cluster.subscriptions[0]._follower._slots.active
        assert active.arenas.holds_any([target.embedding.weight])
    assert target.head.weight.data_ptr() == target.embedding.weight.data_ptr()


def test_published_in_place_they_are_read_where_they_lie(fleet, device):
    source, target = device.move(Policy(value=1.0)), device.move(Policy())
    trainer, rollout = fleet("trainer"), fleet("rollout")
    publication = publish(trainer, "policy", source, copy_out=False)
    before = addresses(source)
    assert publication._copies.first.arenas.holds_any([source.embedding.weight])
    assert device.holds(*source.state_dict().values())
    subscribe(rollout, "policy", target)
    sync = WeightSync(trainer, "policy", ["trainer"], ["rollout"], timeout=20)
    for version in (1, 2):
        with publication.updating():
            fill(source, float(version))
        sync.push(version).raise_for_excluded()
        assert same(target, source)
    assert addresses(source) == before


def test_in_place_a_tensor_elsewhere_is_refused_by_name(fleet, device):
    source = device.move(Policy())
    source.norm.running_mean = torch.zeros(64)
    with pytest.raises(ConfigError, match=r"norm\.running_mean.*cuda:0"):
        publish(fleet("trainer"), "policy", source, copy_out=False)


@pytest.mark.parametrize("is_source", [True, False], ids=["gpu to host", "host to gpu"])
@pytest.mark.parametrize("install", ["auto", "copy"])
def test_one_side_may_be_on_a_gpu(fleet, device, is_source, install):
    source, target = Policy(value=3.0), Policy()
    device.move(source if is_source else target)
    cluster = Cluster(fleet, source, [target], install=install)
    cluster.sync.push(1).raise_for_excluded()
    assert same(target, source)
    assert [slot.arenas.space for slot in slots(cluster)][:1] == [HOST if is_source else GPU]


def test_a_model_may_have_some_of_its_tensors_on_the_host(fleet, device):
    models = [device.move(Policy(value=value)) for value in (4.0, 0.0)]
    for model in models:
        model.norm.running_mean = model.norm.running_mean.clone()
        assert not device.holds(model.norm.running_mean)
    source, target = models
    fill(source, 5.0)
    before = addresses(target)
    cluster = Cluster(fleet, source, [target])
    cluster.sync.push(1).raise_for_excluded()
    assert same(target, source)
    assert addresses(target) == before
    assert slots(cluster)[0].arenas.space == GPU


@pytest.mark.parametrize("begins", ["host", "gpu"])
@pytest.mark.parametrize("install", ["auto", "copy"])
def test_a_model_that_is_moved_between_devices_stays_where_it_is_then(fleet, device, begins, install):
    source, target = Policy(value=1.0), Policy()
    if begins == "gpu":
        device.move(target)
    cluster = Cluster(fleet, source, [target], install=install)
    for version in range(1, 7):
        if version % 2 == 0:
            is_here = device.holds(target.embedding.weight)
            for tensor in {id(one): one for one in target.state_dict(keep_vars=True).values()}.values():
                tensor.data = tensor.data.clone() if is_here else device.to(tensor.data)
        is_here = device.holds(*target.state_dict().values())
        fill(source, float(version))
        cluster.sync.push(version).raise_for_excluded()
        assert same(target, source)
        assert device.holds(*target.state_dict().values()) == is_here
        assert device.holds(target.embedding.weight) == is_here


def test_a_gpu_without_room_leaves_versions_in_host_memory(fleet, device, caplog):
    source, target = device.move(Policy(value=2.0)), device.move(Policy())
    device.room = 100
    cluster = Cluster(fleet, source, [target])
    assert "no room" in caplog.text
    before = addresses(target)
    cluster.sync.push(1).raise_for_excluded()
    assert same(target, source)
    assert addresses(target) == before
    assert [slot.arenas.space for slot in slots(cluster)] == [HOST]


def test_a_gpu_without_room_is_an_error_where_nothing_else_will_do(fleet, device):
    device.room = 100
    with pytest.raises(RangeError, match="no room"):
        publish(fleet("trainer"), "policy", device.move(Policy()), memory="vram")


def test_host_memory_can_be_asked_for(fleet, device):
    source, target = device.move(Policy(value=2.0)), device.move(Policy())
    trainer, rollout = fleet("trainer"), fleet("rollout")
    publication = publish(trainer, "policy", source, memory="dram")
    subscription = subscribe(rollout, "policy", target, memory="dram")
    WeightSync(trainer, "policy", ["trainer"], ["rollout"], timeout=20).push(1).raise_for_excluded()
    assert same(target, source)
    assert publication._copies.first.arenas.space == HOST
    with pytest.raises(ConfigError, match="cannot be repointed"):
        subscribe(fleet("other"), "policy", target, memory="dram", install="swap")
    assert subscription.version == 1


def test_where_versions_lie_is_where_most_bytes_are(device):
    large, small = device.to(torch.zeros(1000)), torch.zeros(10)
    assert spaces_for([large, small], "auto") == (GPU, HOST)
    assert spaces_for([device.to(small), torch.zeros(1000)], "auto") == (HOST,)
    assert spaces_for([large], "vram") == (GPU,)
    assert spaces_for([large], "dram") == (HOST,)
    assert spaces_for([], "auto") == (HOST,)
    for memory in ("vram", "disk"):
        with pytest.raises(ConfigError, match="memory="):
            spaces_for([small], memory)


def test_tensors_on_several_gpus_travel_by_host_memory(monkeypatch):
    monkeypatch.setattr("raynixl.weights.space.device_of", lambda tensor: f"cuda:{len(tensor)}")
    assert spaces_for([torch.zeros(1), torch.zeros(2)], "auto") == (HOST,)


@pytest.mark.parametrize("options", [{"cast": "bfloat16"}, {"quantise": "fp8"}])
def test_what_is_converted_there_is_what_the_host_makes_of_it(fleet, device, options):
    values = {"proj.weight": torch.randn(300, 257), "bias": torch.randn(300)}
    trainer, found = fleet("trainer"), []
    for number, model in enumerate((values, device.move(values))):
        name = f"w{number}"
        publication = publish(trainer, name, model, **options)
        made = {
            entry.name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype))
            for entry in publication.layout.entries
        }
        target = made if number == 0 else device.move(made)
        subscribe(fleet(f"rollout-{number}"), name, target)
        WeightSync(trainer, name, ["trainer"], [f"rollout-{number}"], timeout=20).push(1).raise_for_excluded()
        found.append(target)
    assert same(*found)
    assert device.holds(*found[1].values())


@pytest.mark.parametrize("install", ["swap", "copy"])
@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_few_changes_travel_as_a_delta(fleet, device, install, topology):
    def touch(version):
        source["a"].view(torch.int16)[torch.randint(0, 200_000, (1500,), generator=generator)] ^= 1
        source["b"][7] = float(version)
        return sync.push(version)

    generator = torch.Generator().manual_seed(3)
    source = device.move({"a": torch.randn(200_000, generator=generator).to(torch.bfloat16), "b": torch.randn(5000)})
    targets = [device.move({name: torch.zeros_like(one) for name, one in source.items()}) for _ in range(2)]
    cluster = Cluster(fleet, source, targets, install=install)
    names = [agent.name for agent in cluster.rollouts]
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], names, timeout=20, topology=topology)
    for version in (1, 2):
        touch(version).raise_for_excluded()
    deadline = time.monotonic() + 20
    while len(cluster.publication._copies._copies) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for version in (3, 4, 5):
        report = touch(version)
        report.raise_for_excluded()
        assert all(same(source, target) for target in targets)
    assert report.deltas == 2
    assert report.origin_nbytes + report.peer_nbytes < 30_000


def test_receivers_on_gpus_feed_each_other_and_return_to_a_version(fleet, device):
    source = device.move(Policy(value=1.0))
    targets = [device.move(Policy()) for _ in range(3)]
    cluster = Cluster(fleet, source, targets, keep=2)
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0", "rollout-1"], topology="relay", timeout=20)
    for version in (1, 2):
        fill(source, float(version))
        sync.push(version).raise_for_excluded()
    assert sync.join(["rollout-2"]) == {}
    assert all(same(target, source) for target in targets)
    assert set(sync.roll_back(1)) <= {"rollout-2"}
    assert targets[0]() == {1.0}
    assert targets[2]() == {2.0}


@pytest.mark.parametrize("shape", ["plain", "strided"])
def test_a_tensor_that_does_not_hold_what_was_installed_is_noticed(fleet, device, shape, monkeypatch):
    target = device.to(torch.zeros(64, 48))
    target = {"w": target if shape == "plain" else target.t()}
    source = {"w": torch.randn(target["w"].shape)}
    cluster = Cluster(fleet, device.move(source), [target])
    cluster.sync.push(1).raise_for_excluded()
    assert torch.equal(target["w"], source["w"])
    monkeypatch.setattr("raynixl.weights.installer.Steps.run", lambda *_: [])
    target["w"][3, 5] += 1.0
    error = cluster.sync.push(2).excluded["rollout-0"]
    assert isinstance(error, IntegrityError)


def test_a_slot_on_the_host_takes_over_one_on_the_gpu_on_our_own_stream(device):
    there = SimpleNamespace(space=GPU, flat=lambda _number: device.to(torch.arange(100, dtype=torch.uint8)))
    here = HostBank([np.zeros(100, np.uint8)])
    before = device.gpu.entered
    here.take(there)
    assert here.arrays[0].tolist() == list(range(100))
    assert device.gpu.entered == before + 1  # on another one it could break a graph that is captured meanwhile

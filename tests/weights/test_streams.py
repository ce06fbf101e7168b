"""What was put on a GPU's streams before is through before weights change there, and nothing else is waited for."""

import threading

import pytest
import torch
from device_stand_in import StandIn
from weights_tools import Cluster, fill, same

from raynixl.errors import TransferTimeout
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.streams import Streams, on_ours


@pytest.fixture
def device(monkeypatch):
    made = StandIn()
    made.install(monkeypatch)
    return made


def model(device, value):
    return device.move({"w": torch.full((1000,), float(value))})


def in_background(call):
    """Run a call in a thread; return the thread and where its result will be."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("install", ["copy", "swap"])
def test_a_flip_waits_for_the_kernels_that_readers_have_left_behind(fleet, device, install):
    source, target = model(device, 1), model(device, 0)
    cluster = Cluster(fleet, source, [target], install=install)
    seen = []
    with cluster.subscriptions[0].pinned():
        kernel = device.gpu.put(lambda: seen.extend(target["w"].unique().tolist()))
    thread, reports = in_background(lambda: cluster.sync.push(1))
    thread.join(0.5)
    assert thread.is_alive()
    assert target["w"].unique().tolist() == [0.0]
    kernel.happen()
    thread.join(20)
    reports[0].raise_for_excluded()
    assert seen == [0.0]
    assert target["w"].unique().tolist() == [1.0]


def test_kernels_that_take_too_long_keep_the_old_version_and_the_next_push_goes_on(fleet, device):
    source, target = model(device, 1), model(device, 0)
    cluster = Cluster(fleet, source, [target], flip_timeout=0.3)

    def read():
        with cluster.subscriptions[0].pinned():
            return device.gpu.put(lambda: None)

    thread, kernels = in_background(read)
    thread.join(20)
    error = cluster.sync.push(1).excluded["rollout-0"]
    assert isinstance(error, TransferTimeout)
    assert target["w"].unique().tolist() == [0.0]
    with cluster.subscriptions[0].pinned() as version:
        assert version == 0
    kernels[0].happen()
    cluster.sync.push(2).raise_for_excluded()
    assert same(target, source)


def test_a_forward_is_a_section_of_the_stream_too(fleet, device):
    source, target = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    fill(source, 1.0)
    fill(target, 0.0)
    kernels, seen = [], []
    target.register_forward_hook(
        lambda *_: kernels.append(device.gpu.put(lambda: seen.extend(target.weight.unique().tolist())))
    )
    cluster = Cluster(fleet, device.move(source), [device.move(target)])
    target(torch.zeros(8))
    thread, reports = in_background(lambda: cluster.sync.push(1))
    thread.join(0.3)
    assert thread.is_alive()
    kernels[0].happen()
    thread.join(20)
    reports[0].raise_for_excluded()
    assert seen == [0.0]


@pytest.mark.parametrize("copy_out", [True, False])
def test_a_copy_out_waits_for_the_step_that_an_update_has_put_on_its_stream(fleet, device, copy_out):
    source, target = model(device, 1), model(device, 0)
    trainer = fleet("trainer")
    publication = publish(trainer, "policy", source, copy_out=copy_out)
    subscribe(fleet("rollout"), "policy", target)
    sync = WeightSync(trainer, "policy", ["trainer"], ["rollout"], timeout=20)
    with publication.updating():
        step = device.gpu.put(lambda: source["w"].fill_(5.0))
    thread, reports = in_background(lambda: sync.push(1))
    thread.join(0.3)
    assert thread.is_alive()
    step.happen()
    thread.join(20)
    reports[0].raise_for_excluded()
    assert target["w"].unique().tolist() == [5.0]


def test_the_stream_on_which_weights_were_published_needs_no_sections(fleet, device):
    source, target = model(device, 1), model(device, 0)
    cluster = Cluster(fleet, source, [target])
    step = device.gpu.put(lambda: source["w"].fill_(3.0))
    thread, reports = in_background(lambda: cluster.sync.push(1))
    thread.join(0.3)
    assert thread.is_alive()
    step.happen()
    thread.join(20)
    reports[0].raise_for_excluded()
    assert target["w"].unique().tolist() == [3.0]


def test_what_others_do_meanwhile_is_not_waited_for(fleet, device):
    source, target = model(device, 1), model(device, 0)
    cluster = Cluster(fleet, source, [target])
    thread, _ = in_background(lambda: device.gpu.put(lambda: None))
    thread.join(20)
    cluster.sync.push(1).raise_for_excluded()
    assert same(target, source)


def test_host_tensors_ask_no_gpu_for_anything(monkeypatch):
    monkeypatch.setattr("raynixl.weights.streams.gpu", lambda _: pytest.fail("a GPU was asked"))
    streams = Streams(lambda: [torch.zeros(3)])
    streams.note()
    with streams.alone(1.0), on_ours(()):
        pass


def test_our_work_is_waited_for_also_after_an_error(device):
    tensor = device.to(torch.zeros(3))
    entered = device.gpu.entered
    with pytest.raises(ZeroDivisionError), on_ours({device_space(tensor)}):
        raise ZeroDivisionError
    assert device.gpu.entered == entered + 1


def test_a_gpu_that_hangs_is_told_of(device, monkeypatch):
    monkeypatch.setattr("raynixl.weights.streams._HUNG_SECONDS", 0.05)
    with pytest.raises(TransferTimeout, match="hangs"), on_ours({device_space(device.to(torch.zeros(3)))}):
        device.gpu.put(lambda: None)


def device_space(tensor):
    from raynixl.weights.space import space_of

    return space_of(tensor)


def test_readers_of_a_model_that_has_come_to_the_gpu_since_are_waited_for(fleet, device):
    source, target = {"w": torch.ones(1000)}, {"w": torch.zeros(1000)}
    cluster = Cluster(fleet, source, [target])
    target["w"].data = device.to(target["w"].data)

    def read():
        with cluster.subscriptions[0].pinned():
            return device.gpu.put(lambda: None)

    reader, kernels = in_background(read)
    reader.join(20)
    thread, reports = in_background(lambda: cluster.sync.push(1))
    thread.join(0.5)
    assert thread.is_alive()
    assert target["w"].unique().tolist() == [0.0]
    kernels[0].happen()
    thread.join(20)
    reports[0].raise_for_excluded()
    assert target["w"].unique().tolist() == [1.0]

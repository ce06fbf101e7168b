"""Pushes between agents of one process: whole versions or none, and every kind of tensor."""

import asyncio
import copy
import gc
import io
import pickle
import threading
import time

import pytest
import torch

from raynixl.agents import Agent
from raynixl.errors import (
    AgentClosed,
    ConfigError,
    IntegrityError,
    PeerLost,
    PeerUnknown,
    RegionUnknown,
    TransferTimeout,
)
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.publication import Publication

INSTALLS = ["swap", "copy"]


class Cluster:
    """One trainer and some rollouts of one model."""

    def __init__(self, fleet, source, targets, **options):
        self.trainer = fleet("trainer")
        self.rollouts = [fleet(f"rollout-{number}") for number in range(len(targets))]
        self.publication = publish(self.trainer, "policy", source, chunk_nbytes=4096)
        pairs = zip(self.rollouts, targets, strict=True)
        self.subscriptions = [subscribe(agent, "policy", target, **options) for agent, target in pairs]
        self.sync = WeightSync(self.trainer, "policy", ["trainer"], [agent.name for agent in self.rollouts], timeout=20)


@pytest.mark.parametrize("install", INSTALLS)
def test_a_push_brings_every_bit_to_every_target(fleet, policy, same, install):
    source, targets = policy(), [policy().eval(), policy().eval()]
    cluster = Cluster(fleet, source, targets, install=install)
    for version in (1, 2, 5):
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) * 10)
        report = cluster.sync.push(version)
        assert not report.excluded
        assert sorted(report.ranks) == ["rollout-0", "rollout-1"]
        assert report.nbytes == cluster.publication.layout.nbytes
        for target, subscription in zip(targets, cluster.subscriptions, strict=True):
            assert same(source, target)
            assert subscription.version == version
    assert cluster.publication.version == 5
    text = str(report)
    assert "version 5" in text
    assert "rollout-1" in text
    assert "GB/s" in text


KINDS = {
    "bfloat16": torch.randn(7, 5).to(torch.bfloat16), "float16": torch.randn(3).half(), "float64": torch.randn(9).double(),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn), "bool": torch.rand(33) > 0.5, "complex": torch.randn(5, dtype=torch.complex64),
    "int8": torch.randint(-128, 127, (11,), dtype=torch.int8), "int64": torch.randint(-(2**60), 2**60, (4, 4)),
    "uint16": torch.arange(9).to(torch.uint16), "empty": torch.empty(0, 4), "scalar": torch.tensor(3.5),
    "transposed": torch.randn(8, 3).t(), "strided": torch.randn(10, 10)[::2, 1:7:3], "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugate": torch.randn(6, dtype=torch.complex64).conj(), "expanded": torch.randn(4, 1).expand(4, 3), "large": torch.randn(5000),
}  # fmt: skip


@pytest.mark.parametrize("install", ["auto", "swap", "copy"])
def test_every_kind_of_tensor_arrives(fleet, same, install):
    source = dict(KINDS)
    target = {name: torch.zeros_like(tensor) for name, tensor in KINDS.items()}
    target["transposed"] = torch.zeros(8, 3).t()
    target["strided"] = torch.zeros(10, 10)[::2, 1:7:3]
    target["expanded"] = torch.zeros(4, 3)
    kept = dict(target)
    strides = {name: tensor.stride() for name, tensor in target.items()}
    cluster = Cluster(fleet, source, [target], install=install)
    for version in (1, 2):
        assert not cluster.sync.push(version).excluded
        assert same(source, target)
    assert all(target[name] is kept[name] and target[name].stride() == strides[name] for name in kept)


class Tied(torch.nn.Module):
    """Tied three ways: one parameter twice, a transposed view, and overlapping slices."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(6, 4))
        self.same = self.table
        base = torch.randn(4, 4)
        self.square = torch.nn.Parameter(base)
        self.turned = torch.nn.Parameter(self.square.detach().t())
        line = torch.randn(10)
        self.left, self.right = torch.nn.Parameter(line[:6]), torch.nn.Parameter(line[4:])


@pytest.mark.parametrize("install", INSTALLS)
def test_ties_stay_tied_at_the_target(fleet, same, install):
    source, target = Tied(), Tied()
    cluster = Cluster(fleet, source, [target], install=install)
    for version in (1, 2, 3):
        with torch.no_grad():
            source.table.add_(1)
            source.square.mul_(2)
            source.left.sub_(3)
        assert not cluster.sync.push(version).excluded
        assert same(source, target)
        assert target.same is target.table
    with torch.no_grad():
        target.square[0, 1] = 77
        target.left[5] = 78
    assert target.turned[1, 0] == 77
    assert target.right[1] == 78


def test_what_is_tied_at_the_source_alone_stays_apart_at_the_target(fleet):
    shared = torch.ones(5)
    target = torch.nn.ParameterDict({"a": torch.zeros(5), "b": torch.zeros(5)})
    cluster = Cluster(fleet, {"a": shared, "b": shared}, [target])
    for version in (1, 2):
        shared.fill_(version)
        assert not cluster.sync.push(version).excluded
        with torch.no_grad():
            target["a"][0] = 9
        assert target["b"].tolist() == [version] * 5


def test_identity_gradients_and_device_are_kept(fleet, policy):
    target = policy()
    target.embedding.weight.requires_grad_(False)
    target.layers[0].weight.grad = torch.ones(64, 64)
    kept = dict(target.named_parameters())
    cluster = Cluster(fleet, policy(value=3.0), [target], install="swap")
    cluster.sync.push(1)
    assert all(dict(target.named_parameters())[name] is tensor for name, tensor in kept.items())
    assert not target.embedding.weight.requires_grad
    assert target.layers[0].weight.requires_grad
    assert target.layers[0].weight.grad.sum() == 64 * 64
    target.layers[0](torch.ones(1, 64)).sum().backward()


def test_buffers_come_along_but_not_those_that_are_not_saved(fleet, policy):
    source, target = policy(), policy().eval()
    source.norm.num_batches_tracked.fill_(41)
    source.scratch.fill_(5)
    cluster = Cluster(fleet, source, [target])
    cluster.sync.push(1)
    assert target.norm.num_batches_tracked.item() == 41
    assert target.scratch.tolist() == [0, 0, 0]


def test_a_model_made_in_inference_mode_is_a_target(fleet):
    with torch.inference_mode():
        targets = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    source = torch.nn.Linear(4, 4)
    cluster = Cluster(fleet, source, targets[:1], install="swap")
    agent = fleet("other")
    with subscribe(agent, "policy", targets[1], install="copy"):
        WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0", "other"]).push(1)
    assert torch.equal(targets[0].weight, source.weight)
    assert torch.equal(targets[1].weight, source.weight)


@pytest.mark.parametrize("install", INSTALLS)
def test_readers_in_a_tight_loop_never_see_half_a_version(fleet, policy, filled, install):
    source, target = policy(), policy().eval()
    cluster = Cluster(fleet, source, [target], install=install)
    subscription, stop, seen = cluster.subscriptions[0], threading.Event(), []

    def read_pinned():
        while not stop.is_set():
            with subscription.pinned() as version:
                seen.append((version, target.forward()))

    def read_by_forward():
        while not stop.is_set():
            seen.append((None, target()))

    readers = [threading.Thread(target=action) for action in (read_pinned, read_by_forward)]
    for reader in readers:
        reader.start()
    try:
        for version in range(1, 51):
            with cluster.publication.updating():
                filled(source, version)
            assert not cluster.sync.push(version).excluded
    finally:
        stop.set()
        for reader in readers:
            reader.join(10)
    assert all(len(values) == 1 for _, values in seen)
    assert all(values == {version} for version, values in seen if version is not None)
    assert len({version for version, _ in seen}) > 3


def test_a_copy_out_never_sees_half_an_optimiser_step(fleet, policy, filled):
    source, target = policy(), policy().eval()
    cluster = Cluster(fleet, source, [target])
    stop = threading.Event()

    def train():
        step = 0
        while not stop.is_set():
            step += 1
            with cluster.publication.updating():
                filled(source, step)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for version in range(1, 21):
            cluster.sync.push(version)
            assert len(target()) == 1
    finally:
        stop.set()
        trainer.join(10)


def test_a_push_from_inside_updating_ends_with_a_typed_error(fleet, policy):
    cluster = Cluster(fleet, policy(), [policy()])
    with cluster.publication.updating(), pytest.raises(TransferTimeout):
        cluster.sync.push(1, timeout=0.3)
    cluster.sync.push(1)


def test_a_corrupted_chunk_is_noticed_and_the_old_version_kept(fleet, policy, filled, monkeypatch):
    source, targets = policy(), [policy().eval(), policy().eval()]
    cluster = Cluster(fleet, source, targets)
    filled(source, 1)
    cluster.sync.push(1)
    freeze = Publication.freeze

    def corrupt(publication, *arguments):
        frozen = freeze(publication, *arguments)
        publication._arenas.arrays[0][5000] ^= 1
        return frozen

    filled(source, 2)
    monkeypatch.setattr(Publication, "freeze", corrupt)
    report = cluster.sync.push(2)
    assert {type(error) for error in report.excluded.values()} == {IntegrityError}
    assert "chunk 1 " in str(report.excluded["rollout-0"])
    assert report.ranks == {}
    with pytest.raises(IntegrityError):
        report.raise_for_excluded()
    assert all(target() == {1.0} for target in targets)
    monkeypatch.undo()
    assert not cluster.sync.push(2).excluded
    assert all(target() == {2.0} for target in targets)


def test_a_mismatch_is_refused_with_a_table_before_anything_moves(fleet, policy):
    good, bad = policy().eval(), policy().eval()
    bad.layers[0] = torch.nn.Linear(64, 32)
    bad.layers[1].bfloat16()
    del bad.norm
    cluster = Cluster(fleet, policy(value=1.0), [good, bad])
    with pytest.raises(ConfigError) as caught:
        cluster.sync.push(1)
    text = str(caught.value)
    for piece in (
        "rollout-1",
        "layers.0.weight",
        "[64, 64]",
        "[32, 64]",
        "layers.1.bias",
        "bfloat16",
        "norm.running_mean",
    ):
        assert piece in text
    assert good() == {0.0}
    assert cluster.rollouts[0].statistics().nbytes == 0
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0"])
    assert not sync.push(1).excluded
    assert good() == {1.0}


def test_versions_only_go_up(fleet, policy):
    cluster = Cluster(fleet, policy(), [policy()])
    cluster.sync.push(7)
    for version in (7, 3, 0, -1, "8", 1 << 70):
        with pytest.raises(ConfigError):
            cluster.sync.push(version)
    again = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0"])
    with pytest.raises(ConfigError, match="not above 7"):
        again.push(7)
    cluster.publication.close()
    with publish(cluster.trainer, "policy", policy()):
        report = again.push(5)
        assert "serves version 7" in str(report.excluded["rollout-0"])


def test_an_on_flip_that_raises_is_reported_and_tears_nothing(fleet, policy):
    def fail(version):
        raise ValueError(f"no {version}")

    target = policy().eval()
    cluster = Cluster(fleet, policy(value=4.0), [target], on_flip=fail)
    report = cluster.sync.push(1)
    assert "no 1" in report.ranks["rollout-0"].note
    assert "no 1" in str(report)
    assert target() == {4.0}


def test_on_flip_may_run_the_model_before_anybody_else(fleet, policy):
    seen = []
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=4.0), [target], on_flip=lambda version: seen.append((version, target())))
    cluster.sync.push(3)
    assert seen == [(3, {4.0})]


def test_a_forward_that_raises_leaves_its_section(fleet):
    target = torch.nn.Linear(4, 4)
    cluster = Cluster(fleet, torch.nn.Linear(4, 4), [target])
    with cluster.subscriptions[0].pinned(), pytest.raises(RuntimeError):
        target(torch.ones(3))
    handle = target.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target(torch.ones(4))
    handle.remove()

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    handle = target.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        target(torch.ones(4))
    handle.remove()
    assert not cluster.sync.push(1).excluded


def test_a_reader_that_stays_keeps_its_version_and_is_reported(fleet, policy, filled):
    source, target = policy(value=1.0), policy().eval()
    cluster = Cluster(fleet, source, [target], flip_timeout=0.2)
    with cluster.subscriptions[0].pinned() as version:
        report = cluster.sync.push(1)
        assert isinstance(report.excluded["rollout-0"], TransferTimeout)
        assert target() == {0.0}
        assert version == cluster.subscriptions[0].version == 0
    assert not cluster.sync.push(1).excluded
    assert target() == {1.0}


def test_waiting_for_a_version(fleet, policy):
    cluster = Cluster(fleet, policy(), [policy()])
    subscription = cluster.subscriptions[0]
    with pytest.raises(TransferTimeout, match="version 2"):
        subscription.wait_version(2, timeout=0.01)
    waited = []
    waiter = threading.Thread(target=lambda: waited.append(subscription.wait_version(2, timeout=10)))
    waiter.start()
    cluster.sync.push(1)
    cluster.sync.push(4)
    waiter.join(10)
    assert waited == [4]
    waiter = threading.Thread(target=lambda: pytest.raises(AgentClosed, subscription.wait_version, 9, 10))
    waiter.start()
    subscription.close()
    waiter.join(10)
    assert not waiter.is_alive()


async def test_pushes_from_an_event_loop_follow_one_another(fleet, policy):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=1.0), [target])
    reports = await asyncio.gather(*(cluster.sync.push_async(version) for version in (1,)), asyncio.sleep(0))
    assert reports[0].version == 1
    results = await asyncio.gather(*(cluster.sync.push_async(version) for version in (2, 3, 4)), return_exceptions=True)
    assert any(not isinstance(result, BaseException) for result in results)
    assert all(isinstance(result, ConfigError) for result in results if isinstance(result, BaseException))


def test_two_who_push_the_same_weights_follow_one_another(fleet, policy):
    cluster = Cluster(fleet, policy(value=1.0), [policy(), policy()])
    others = [WeightSync(agent, "policy", ["trainer"], ["rollout-0", "rollout-1"]) for agent in cluster.rollouts]
    errors = []

    def push(sync, versions):
        for version in versions:
            try:
                sync.push(version)
            except ConfigError as exc:
                errors.append(exc)

    threads = [threading.Thread(target=push, args=(sync, range(n, 20, 2))) for n, sync in enumerate(others, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(subscription.version for subscription in cluster.subscriptions) >= 18
    assert all("not above" in str(error) for error in errors)


def test_targets_that_are_not_there_are_excluded_and_found_when_they_come(fleet, policy):
    cluster = Cluster(fleet, policy(value=1.0), [policy().eval()])
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0", "late", "idle"])
    idle = fleet("idle")
    report = sync.push(1, timeout=1.0)
    assert isinstance(report.excluded["late"], PeerUnknown)
    assert isinstance(report.excluded["idle"], RegionUnknown)
    assert list(report.ranks) == ["rollout-0"]
    late, target = fleet("late"), policy().eval()
    with subscribe(late, "policy", target), subscribe(idle, "policy", policy()):
        assert not sync.push(2).excluded
    assert target() == {1.0}


def test_a_target_that_starts_during_the_first_push_takes_part(fleet, policy):
    trainer, rollout = fleet("trainer"), fleet("rollout")
    with publish(trainer, "policy", policy(value=2.0)):
        sync, reports = WeightSync(trainer, "policy", ["trainer"], ["rollout"]), []
        pusher = threading.Thread(target=lambda: reports.append(sync.push(1)))
        pusher.start()
        target = policy().eval()
        with subscribe(rollout, "policy", target) as subscription:
            assert subscription.wait_version(1, 10) == 1
            pusher.join(10)
        assert not reports[0].excluded
        assert target() == {2.0}


def test_a_restarted_target_takes_part_by_itself(fleet, policy):
    cluster = Cluster(fleet, policy(value=1.0), [policy(), policy()])
    cluster.sync.push(1)
    cluster.rollouts[1].close()
    report = cluster.sync.push(2)
    assert isinstance(report.excluded["rollout-1"], PeerLost | PeerUnknown)
    assert list(report.ranks) == ["rollout-0"]
    again, target = fleet("rollout-1"), policy().eval()
    with subscribe(again, "policy", target):
        assert not cluster.sync.push(3).excluded
    assert target() == {1.0}


def test_without_exclusion_the_first_failure_ends_the_push_and_nobody_flips(fleet, policy):
    cluster = Cluster(fleet, policy(value=1.0), [policy().eval(), policy()])
    targets = ["rollout-0", "rollout-1"]
    strict = WeightSync(cluster.trainer, "policy", ["trainer"], targets, exclude_failed=False)
    strict.push(1)
    cluster.rollouts[1].close()
    with pytest.raises((PeerLost, PeerUnknown)):
        strict.push(2)
    assert cluster.subscriptions[0].version == 1


def test_replicas_share_the_load_and_must_agree(fleet, policy, filled):
    first, second = policy(value=1.0), policy(value=1.0)
    agents = [fleet("a"), fleet("b")]
    publications = [publish(agent, "policy", model) for agent, model in zip(agents, (first, second), strict=True)]
    rollouts, targets = [fleet("x"), fleet("y")], [policy().eval(), policy().eval()]
    subscriptions = [subscribe(agent, "policy", model) for agent, model in zip(rollouts, targets, strict=True)]
    sync = WeightSync(rollouts[0], "policy", ["a", "b"], ["x", "y"])
    assert not sync.push(1).excluded
    peers = {route.peer for agent in rollouts for route in agent.statistics().routes if route.nbytes}
    assert peers == {"a", "b"}
    filled(second, 3)
    with pytest.raises(IntegrityError, match="different weights"):
        sync.push(2)
    assert {subscription.version for subscription in subscriptions} == {1}
    assert [publication.version for publication in publications] == [1, 1]


def test_a_source_that_is_gone_is_a_typed_error_and_the_old_version_stays(fleet, policy):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=1.0), [target])
    sync = WeightSync(cluster.rollouts[0], "policy", ["trainer"], ["rollout-0"], timeout=2)
    sync.push(1)
    cluster.trainer.close()
    with pytest.raises((PeerLost, PeerUnknown)):
        sync.push(2)
    assert cluster.subscriptions[0].version == 1
    assert target() == {1.0}


def test_a_trainer_may_replace_tensors_but_not_the_model(fleet):
    source, target = {"w": torch.zeros(4)}, {"w": torch.zeros(4)}
    cluster = Cluster(fleet, source, [target])
    source["w"] = torch.ones(4)
    cluster.sync.push(1)
    assert target["w"].tolist() == [1] * 4
    source["w"] = torch.ones(5)
    with pytest.raises(ConfigError, match="not what was published"):
        cluster.sync.push(2)


def test_a_target_may_replace_its_tensors(fleet, policy):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=1.0), [target], install="swap")
    cluster.sync.push(1)
    target.layers[0].weight = torch.nn.Parameter(torch.zeros(64, 64))
    cluster.sync.push(2)
    assert target() == {1.0}


def test_a_published_model_that_changed_is_pushed_with_its_new_layout(fleet):
    source, target = {"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.zeros(4), "b": torch.zeros(4)}
    cluster = Cluster(fleet, source, [target])
    cluster.sync.push(1)
    cluster.publication.close()
    turned = {"b": torch.full((4,), 2.0), "a": torch.full((4,), 3.0)}
    with publish(cluster.trainer, "policy", turned):
        assert not cluster.sync.push(2).excluded
    assert (target["a"].tolist(), target["b"].tolist()) == ([3] * 4, [2] * 4)


def test_parameters_outlive_subscription_and_agent(fleet, policy):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=6.0), [target], install="swap")
    cluster.sync.push(1)
    cluster.subscriptions[0].close()
    cluster.subscriptions[0].close()
    cluster.publication.close()
    cluster.publication.close()
    for agent in (cluster.trainer, *cluster.rollouts):
        agent.close()
    gc.collect()
    assert target() == {6.0}
    assert not target._forward_hooks
    assert not target._forward_pre_hooks


def test_a_subscribed_module_can_be_copied_pickled_and_saved(fleet, policy, same):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=6.0), [target], install="swap")
    cluster.sync.push(1)
    twin = copy.deepcopy(target)
    assert same(twin, target)
    twin()
    linear = torch.nn.Linear(2, 2)
    with subscribe(cluster.rollouts[0], "other", linear):
        pickle.loads(pickle.dumps(linear))(torch.ones(2))
    buffer = io.BytesIO()
    torch.save(target.state_dict(), buffer)
    assert len(buffer.getvalue()) < 2 * cluster.publication.layout.nbytes + 20_000
    with cluster.subscriptions[0].pinned():
        cluster.sync.push(2, timeout=0.5)
    twin()


@pytest.mark.parametrize("install", INSTALLS)
def test_repeated_pushes_leak_nothing(fleet, policy, install):
    cluster = Cluster(fleet, policy(), [policy()], install=install)
    for version in range(1, 6):
        cluster.sync.push(version)
    agents = (cluster.trainer, *cluster.rollouts)

    def count():
        gc.collect()
        regions = [agent.statistics().regions for agent in agents]
        return regions, len([thread for thread in threading.enumerate() if thread.name == "raynixl-weights"])

    before, objects = count(), len(gc.get_objects())
    for version in range(6, 40):
        cluster.sync.push(version)
    assert count() == before
    assert len(gc.get_objects()) - objects < 500
    cluster.publication.close()
    cluster.subscriptions[0].close()
    assert [agent.statistics().regions for agent in agents] == [0, 0]


BAD_MODELS = {
    "nothing": {},
    "a list": [torch.zeros(2)],
    "no tensor": {"w": 3},
    "a sparse tensor": {"w": torch.eye(3).to_sparse()},
    "a tensor without values": {"w": torch.zeros(3, device="meta")},
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_cannot_be_carried_is_refused(fleet, case):
    agent = fleet("a")
    with pytest.raises(ConfigError):
        publish(agent, "w", BAD_MODELS[case])
    with pytest.raises(ConfigError):
        subscribe(agent, "w", BAD_MODELS[case])


def test_bad_arguments_are_refused(fleet):
    agent, model = fleet("a"), {"w": torch.zeros(4)}
    bad = [
        lambda: publish(agent, "", model),
        lambda: publish(agent, "x" * 151, model),
        lambda: publish(agent, "w", model, copy_threads=0),
        lambda: publish(agent, "w", model, chunk_nbytes=1),
        lambda: subscribe(agent, "w", model, install="magic"),
        lambda: subscribe(agent, "w", model, flip_timeout=0),
        lambda: subscribe(agent, "w", {"w": torch.zeros(4, 1).expand(4, 3)}, install="copy"),
        lambda: WeightSync(agent, "w", [], ["a"]),
        lambda: WeightSync(agent, "w", "a", ["a"]),
        lambda: WeightSync(agent, "w", ["a"], ["b", "b"]),
        lambda: WeightSync(agent, "w", ["a"], ["b"], timeout=0),
    ]
    for call in bad:
        with pytest.raises(ConfigError):
            call()


def test_a_name_is_published_and_subscribed_once_in_an_agent(fleet):
    agent = fleet("a")
    with publish(agent, "w", {"w": torch.zeros(4)}), pytest.raises(ConfigError):
        publish(agent, "w", {"w": torch.zeros(4)})
    with subscribe(agent, "w", {"w": torch.zeros(4)}), pytest.raises(ConfigError):
        subscribe(agent, "w", {"w": torch.zeros(4)})
    with publish(agent, "w", {"w": torch.zeros(4)}), subscribe(agent, "w", {"w": torch.zeros(4)}):
        pass


def test_an_agent_may_push_to_itself(fleet):
    agent, target = fleet("a"), {"w": torch.zeros(4)}
    with publish(agent, "w", {"w": torch.ones(4)}), subscribe(agent, "w", target):
        assert not WeightSync(agent, "w", ["a"], ["a"]).push(1).excluded
    assert target["w"].tolist() == [1] * 4


def test_a_closed_target_and_a_closed_source_are_named(fleet, policy):
    cluster = Cluster(fleet, policy(), [policy(), policy()])
    cluster.sync.push(1)
    cluster.subscriptions[0].close()
    report = cluster.sync.push(2)
    assert isinstance(report.excluded["rollout-0"], RegionUnknown)
    cluster.publication.close()
    began = time.monotonic()
    with pytest.raises(RegionUnknown):
        cluster.sync.push(3)
    assert time.monotonic() - began < 5


def test_a_sharded_arena_carries_tensors_of_any_size(fleet, same, monkeypatch):
    monkeypatch.setattr("raynixl.weights.layout.build_layout.__kwdefaults__", {"arena_nbytes": 8192})
    source = {f"w{n}": torch.randn(n * 700 + 1) for n in range(8)}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    cluster = Cluster(fleet, source, [target])
    assert len(cluster.publication.layout.arenas) > 3
    assert not cluster.sync.push(1).excluded
    assert same(source, target)


def test_a_model_of_empty_tensors_is_pushed(fleet):
    source, target = {"e": torch.empty(0)}, {"e": torch.empty(0)}
    cluster = Cluster(fleet, source, [target])
    assert not cluster.sync.push(1).excluded
    assert cluster.subscriptions[0].version == 1


def test_nonsense_from_a_stranger_changes_nothing(fleet, policy):
    target = policy().eval()
    cluster = Cluster(fleet, policy(value=1.0), [target])
    stranger: Agent = fleet("stranger")
    for topic in ("match", "pull", "flip", "freeze", "release"):
        peer = "trainer" if topic in ("freeze", "release") else "rollout-0"
        for payload in (b"", b"{}", b"[1]", b"\xff" * 99, b'{"push": "x", "version": -1}'):
            reply = stranger.ask(peer, f"weights/policy/{topic}", payload, timeout=5)
            if topic in ("freeze", "release"):
                with pytest.raises(IntegrityError):
                    reply.wait()
            else:
                assert b"IntegrityError" in reply.wait()
    assert not cluster.sync.push(1).excluded
    assert target() == {1.0}

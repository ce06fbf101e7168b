"""Ranks: those that are late, gone, back again or changed, and what is left behind after many pushes."""

import copy
import gc
import io
import pickle
import threading
import time

import pytest
import torch
from agent_tools import eventually
from weights_tools import INSTALLS, Cluster, Policy, fill, same

from raynixl.errors import (
    ConfigError,
    IntegrityError,
    PeerLost,
    PeerUnknown,
    RegionUnknown,
)
from raynixl.weights import WeightSync, publish, subscribe

pytestmark = pytest.mark.pure


def test_targets_that_are_not_there_are_excluded_and_found_when_they_come(fleet):
    cluster = Cluster(fleet, Policy(value=1.0), [Policy().eval()])
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0", "late", "idle"])
    idle = fleet("idle")
    report = sync.push(1, timeout=1.0)
    assert isinstance(report.excluded["late"], PeerUnknown)
    assert isinstance(report.excluded["idle"], RegionUnknown)
    assert "does not subscribe to the weights 'policy'" in str(report.excluded["idle"])
    assert list(report.ranks) == ["rollout-0"]
    late, target = fleet("late"), Policy().eval()
    with subscribe(late, "policy", target), subscribe(idle, "policy", Policy()):
        assert not sync.push(2).excluded
    assert target() == {1.0}


def test_a_target_that_starts_during_the_first_push_takes_part(fleet):
    trainer, rollout = fleet("trainer"), fleet("rollout")
    with publish(trainer, "policy", Policy(value=2.0)):
        sync, reports = WeightSync(trainer, "policy", ["trainer"], ["rollout"]), []
        pusher = threading.Thread(target=lambda: reports.append(sync.push(1)))
        pusher.start()
        target = Policy().eval()
        with subscribe(rollout, "policy", target) as subscription:
            assert subscription.wait_version(1, 10) == 1
            pusher.join(10)
        assert not reports[0].excluded
        assert target() == {2.0}


def test_a_restarted_target_takes_part_by_itself(fleet):
    cluster = Cluster(fleet, Policy(value=1.0), [Policy(), Policy()])
    cluster.sync.push(1)
    cluster.rollouts[1].close()
    report = cluster.sync.push(2)
    assert isinstance(report.excluded["rollout-1"], PeerLost | PeerUnknown)
    assert list(report.ranks) == ["rollout-0"]
    again, target = fleet("rollout-1"), Policy().eval()
    with subscribe(again, "policy", target):
        assert not cluster.sync.push(3).excluded
    assert target() == {1.0}


def test_without_exclusion_the_first_failure_ends_the_push_and_nobody_flips(fleet):
    cluster = Cluster(fleet, Policy(value=1.0), [Policy().eval(), Policy()])
    targets = ["rollout-0", "rollout-1"]
    strict = WeightSync(cluster.trainer, "policy", ["trainer"], targets, exclude_failed=False)
    strict.push(1)
    cluster.rollouts[1].close()
    with pytest.raises((PeerLost, PeerUnknown)):
        strict.push(2)
    assert cluster.subscriptions[0].version == 1


def test_replicas_share_the_load_and_must_agree(fleet):
    first, second = Policy(value=1.0), Policy(value=1.0)
    agents = [fleet("a"), fleet("b")]
    publications = [publish(agent, "policy", model) for agent, model in zip(agents, (first, second), strict=True)]
    rollouts, targets = [fleet("x"), fleet("y")], [Policy().eval(), Policy().eval()]
    subscriptions = [subscribe(agent, "policy", model) for agent, model in zip(rollouts, targets, strict=True)]
    sync = WeightSync(rollouts[0], "policy", ["a", "b"], ["x", "y"])
    assert not sync.push(1).excluded
    peers = {route.peer for agent in rollouts for route in agent.statistics().routes if route.nbytes}
    assert peers == {"a", "b"}
    fill(second, 3)
    with pytest.raises(IntegrityError, match="different weights"):
        sync.push(2)
    assert {subscription.version for subscription in subscriptions} == {1}
    assert [publication.version for publication in publications] == [1, 1]


def test_a_source_that_is_gone_is_a_typed_error_and_the_old_version_stays(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=1.0), [target])
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


def test_a_target_may_replace_its_tensors(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=1.0), [target], install="swap")
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


def test_parameters_outlive_subscription_and_agent(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=6.0), [target], install="swap")
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


def test_a_subscribed_module_can_be_copied_pickled_and_saved(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=6.0), [target], install="swap")
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
def test_repeated_pushes_leak_nothing(fleet, install):
    cluster = Cluster(fleet, Policy(), [Policy()], install=install)
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
    eventually(lambda: count() == before, f"{before} are left")  # what the last push let go of goes behind it
    assert len(gc.get_objects()) - objects < 500
    cluster.publication.close()
    cluster.subscriptions[0].close()
    assert [agent.statistics().regions for agent in agents] == [0, 0]


def test_an_agent_may_push_to_itself(fleet):
    agent, target = fleet("a"), {"w": torch.zeros(4)}
    with publish(agent, "w", {"w": torch.ones(4)}), subscribe(agent, "w", target):
        assert not WeightSync(agent, "w", ["a"], ["a"]).push(1).excluded
    assert target["w"].tolist() == [1] * 4


def test_a_closed_target_and_a_closed_source_are_named(fleet):
    cluster = Cluster(fleet, Policy(), [Policy(), Policy()])
    cluster.sync.push(1)
    cluster.subscriptions[0].close()
    report = cluster.sync.push(2)
    assert isinstance(report.excluded["rollout-0"], RegionUnknown)
    cluster.publication.close()
    began = time.monotonic()
    with pytest.raises(RegionUnknown):
        cluster.sync.push(3)
    assert time.monotonic() - began < 5

"""Versions that targets keep: rolled back to, told of, given to those who join, and missed by those who lag."""

import threading

import pytest
import torch

from raynixl.errors import ConfigError, RaynixlError, RegionUnknown
from raynixl.weights import WeightSync, publish, subscribe

SECONDS = 20.0


def weights(value=0.0):
    return {"a": torch.full((300, 50), value), "b": torch.full((7,), value)}


def put(model, value):
    for tensor in model.values():
        tensor.fill_(value)


def is_all(model, value):
    return all(bool(tensor.eq(value).all()) for tensor in model.values())


class Group:
    """A trainer of a model that is one number, and rollouts that follow it."""

    def __init__(self, fleet, count=2, **options):
        self.fleet, self.options = fleet, options
        self.trainer = fleet("trainer")
        self.source = weights()
        publish(self.trainer, "policy", self.source, chunk_nbytes=4096)
        self.models, self.subscriptions = {}, {}
        for number in range(count):
            self.add(f"rollout-{number}")
        self.sync = self.new_sync()

    def new_sync(self, agent=None, **options):
        agent = self.trainer if agent is None else agent
        return WeightSync(agent, "policy", ["trainer"], list(self.models), timeout=SECONDS, **options)

    def add(self, name):
        self.models[name] = weights(-1.0)
        self.subscriptions[name] = subscribe(self.fleet(name), "policy", self.models[name], **self.options)

    def push(self, version, sync=None):
        put(self.source, version)
        return (sync or self.sync).push(version)

    def serves(self, version, names=None):
        names = list(self.models) if names is None else names
        return all(is_all(self.models[n], version) and self.subscriptions[n].version == version for n in names)


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_the_last_versions_are_kept_and_rolled_back_to(fleet, install):
    group = Group(fleet, install=install, keep=3)
    for version in range(1, 6):
        assert not group.push(version).excluded
    for subscription in group.subscriptions.values():
        assert subscription.held_versions[-3:] == [3, 4, 5]
    for version in (4, 3, 5, 3):
        assert group.sync.roll_back(version) == {}
        assert group.serves(version)
    assert not group.push(6).excluded
    assert group.serves(6)
    assert group.sync.roll_back(5) == {}
    assert group.serves(5)
    with pytest.raises(ConfigError, match="keep=2 or more"):
        group.sync.roll_back(1)
    assert group.serves(5)
    with pytest.raises(ConfigError, match="not above 6"):
        group.push(6)
    assert not group.push(7).excluded
    assert group.serves(7)


def test_one_version_is_kept_unless_more_are_asked_for(fleet):
    group = Group(fleet, 1, install="copy")
    for version in (1, 2, 3):
        group.push(version)
    assert group.subscriptions["rollout-0"].held_versions == [3]


def test_lag_is_counted_from_the_last_push(fleet):
    group = Group(fleet)
    group.push(1)
    group.subscriptions["rollout-1"].close()
    group.push(4)
    lag = group.sync.lag()
    assert lag["rollout-0"] == 0
    assert isinstance(lag["rollout-1"], RegionUnknown)


def test_a_push_that_leaves_a_target_too_far_behind_is_refused_and_none_flips(fleet):
    group = Group(fleet)
    sync = group.new_sync(max_lag=2)
    group.push(1, sync)
    group.subscriptions["rollout-1"].close()
    assert "rollout-1" in group.push(2, sync).excluded
    with pytest.raises(RaynixlError):
        group.push(9, sync)
    assert group.serves(2, ["rollout-0"])
    sync.leave(["rollout-1"])
    assert not group.push(9, sync).excluded
    assert group.serves(9, ["rollout-0"])


def test_a_target_that_has_just_died_does_not_lag_yet(fleet):
    group = Group(fleet)
    sync = group.new_sync(max_lag=2)
    group.push(7, sync)
    fleet.agents[-1].close()
    for version in (8, 9):
        assert "rollout-1" in group.push(version, sync).excluded
    with pytest.raises(RaynixlError):
        group.push(10, sync)
    assert group.serves(9, ["rollout-0"])


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_who_joins_catches_up_from_peers_without_the_sources(fleet, install):
    group = Group(fleet, install=install)
    group.push(1)
    group.push(2)
    outside = fleet("outside")
    sync = group.new_sync(outside)
    put(group.source, 3)
    assert not sync.push(3).excluded
    group.trainer.close()
    group.add("late")
    assert sync.join(["late"]) == {}
    assert group.serves(3)
    assert sync.lag() == {"rollout-0": 0, "rollout-1": 0, "late": 0}


def test_who_joins_costs_the_sources_no_byte(fleet):
    group = Group(fleet)
    group.push(1)
    before = given_by(group, "late")
    group.add("late")
    assert group.sync.join(["late"]) == {}
    assert group.serves(1)
    assert given_by(group, "late") == before
    assert not group.push(2).excluded
    assert group.serves(2)


def given_by(group, peer):
    """Bytes that an agent read from the trainer, as the agents count them."""
    agent = next((one for one in group.fleet.agents if one.name == peer), None)
    if agent is None:
        return 0
    return sum(row.nbytes for row in agent.statistics().routes if row.peer == "trainer")


def test_who_joins_after_a_roll_back_gets_what_the_others_serve(fleet):
    group = Group(fleet, keep=2)
    group.push(1)
    group.push(2)
    assert group.sync.roll_back(1) == {}
    group.add("late")
    assert group.sync.join(["late"]) == {}
    assert group.serves(1)


def test_a_fresh_sync_object_knows_what_was_pushed(fleet):
    group = Group(fleet)
    group.push(5)
    fresh = group.new_sync(fleet("outside"))
    assert fresh.lag() == {"rollout-0": 0, "rollout-1": 0}
    with pytest.raises(ConfigError, match="not above 5"):
        fresh.push(5)
    group.add("late")
    assert fresh.join(["late"]) == {}
    assert group.serves(5)
    assert not group.push(6, fresh).excluded
    assert group.serves(6)


def test_who_leaves_keeps_its_version_and_may_come_back(fleet):
    group = Group(fleet)
    group.push(1)
    group.sync.leave(["rollout-1"])
    assert group.sync.targets == ("rollout-0",)
    group.push(2)
    assert group.serves(2, ["rollout-0"])
    assert group.serves(1, ["rollout-1"])
    assert group.sync.join(["rollout-1"]) == {}
    assert group.serves(2)
    with pytest.raises(ConfigError, match="follow already"):
        group.sync.join(["rollout-1"])


def test_a_new_trainer_publishes_on(fleet):
    group = Group(fleet)
    group.push(1)
    group.trainer.close()
    again = fleet("trainer")
    publish(again, "policy", weights(2.0), chunk_nbytes=4096)
    sync = group.new_sync(again)
    assert not sync.push(2).excluded
    assert group.serves(2)


def test_a_version_that_was_pulled_but_never_flipped_to_is_not_held(fleet):
    group = Group(fleet, 1, keep=3, flip_timeout=0.2)
    group.push(1)
    fill_blocked(group, 2)
    assert group.subscriptions["rollout-0"].held_versions == [1]
    with pytest.raises(ConfigError):
        group.sync.roll_back(2)
    put(group.source, 2.5)
    assert not group.sync.push(2).excluded
    assert is_all(group.models["rollout-0"], 2.5)


def fill_blocked(group, version):
    """Push a version while a reader of another thread stays."""
    inside, leave = threading.Event(), threading.Event()

    def read():
        with group.subscriptions["rollout-0"].pinned():
            inside.set()
            leave.wait(SECONDS)

    thread = threading.Thread(target=read)
    thread.start()
    assert inside.wait(SECONDS)
    try:
        assert "rollout-0" in group.push(version).excluded
    finally:
        leave.set()
        thread.join(SECONDS)


def test_who_joins_with_a_version_above_a_roll_back_follows_and_takes_the_next_above_its_own(fleet):
    group = Group(fleet, keep=2)
    for version in (1, 2):
        assert not group.push(version).excluded
    (name, ahead) = (group.sync.targets[0], group.sync.targets[1])
    group.sync.leave([ahead])
    assert group.sync.roll_back(1) == {}
    assert list(group.sync.join([ahead])) == [ahead]
    assert set(group.sync.targets) == {name, ahead}
    report = group.push(3)
    assert not report.excluded
    assert group.serves(3)

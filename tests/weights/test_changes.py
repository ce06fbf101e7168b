"""Models that change while they are followed: what is installed is always one whole version, or nothing."""

import threading

import pytest
import torch
from weights_tools import INSTALLS, Cluster

from raynixl.errors import ConfigError, TransferTimeout
from raynixl.weights import WeightSync, subscribe
from raynixl.weights.versionlock import VersionLock


def square(value):
    model = torch.nn.Linear(8, 8)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(value)
    return model


def values(model):
    return {value for tensor in model.state_dict().values() for value in tensor.flatten().tolist()}


def before_the_flip(monkeypatch, action):
    """Run something at the target when it has pulled and is about to flip, once."""
    writing, actions = VersionLock.writing, [action]

    def act_and_write(lock, timeout):
        while actions:
            actions.pop()()
        return writing(lock, timeout)

    monkeypatch.setattr(VersionLock, "writing", act_and_write)


@pytest.mark.parametrize("install", INSTALLS)
def test_a_parameter_replaced_between_pull_and_flip_gets_the_version_too(fleet, install, monkeypatch):
    target = square(0)
    cluster = Cluster(fleet, square(1), [target], install=install)

    def replace():
        target.weight = torch.nn.Parameter(torch.zeros(8, 8))

    before_the_flip(monkeypatch, replace)
    cluster.sync.push(1).raise_for_excluded()
    assert values(target) == {1.0}


@pytest.mark.parametrize("install", INSTALLS)
def test_a_parameter_that_fits_no_more_at_the_flip_keeps_the_whole_old_version(fleet, install, monkeypatch):
    target = square(0)
    cluster = Cluster(fleet, square(1), [target], install=install)

    def replace():
        target.bias = torch.nn.Parameter(torch.zeros(9))

    before_the_flip(monkeypatch, replace)
    error = cluster.sync.push(1).excluded["rollout-0"]
    assert isinstance(error, ConfigError)
    assert "bias" in str(error)
    assert values(target) == {0.0}
    target.bias = torch.nn.Parameter(torch.zeros(8))
    cluster.sync.push(2).raise_for_excluded()
    assert values(target) == {1.0}


@pytest.mark.parametrize("install", INSTALLS)
def test_a_module_cast_in_place_is_refused_not_cast_back(fleet, install):
    target = square(0)
    cluster = Cluster(fleet, square(1), [target], install=install)
    cluster.sync.push(1)
    target.half()
    error = cluster.sync.push(2).excluded["rollout-0"]
    assert isinstance(error, ConfigError)
    assert "float16" in str(error)
    assert target.weight.dtype is torch.float16


def test_a_served_view_of_an_arena_is_never_pulled_over(fleet, monkeypatch):
    source, target = square(1), square(0)
    cluster = Cluster(fleet, source, [target], install="swap")
    cluster.sync.push(1)
    target.weight = torch.nn.Parameter(target.weight.detach().t())  # strided: from now on copied into, in the arena
    for version in range(2, 8):
        with torch.no_grad():
            source.weight.fill_(version)
            source.bias.fill_(version)
        seen = []
        before_the_flip(monkeypatch, lambda seen=seen, version=version: seen.append((version, values(target))))
        cluster.sync.push(version).raise_for_excluded()
        assert seen == [(version, {version - 1.0})]
        assert values(target) == {float(version)}
        monkeypatch.undo()


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_version_that_an_engine_has_put_back_in_part_is_never_pulled_over(fleet, monkeypatch, kept):
    source, target = square(1), square(0)
    cluster = Cluster(fleet, source, [target], install="swap")
    olds = {}
    for version in range(1, 9):
        with torch.no_grad():
            source.weight.fill_(version)
            source.bias.fill_(version)
        seen = []
        before_the_flip(monkeypatch, lambda seen=seen: seen.append(target.weight.unique().tolist()))
        wanted = target.weight.unique().tolist()
        cluster.sync.push(version).raise_for_excluded()
        assert seen == [wanted]
        assert values(target) == {float(version)}
        monkeypatch.undo()
        olds[version] = target.weight.data
        if version == 3:
            target.weight.data = olds[kept]
            # what an engine has kept of a version may be a later one's by now, but changes no more
    slots = list(cluster.subscriptions[0]._follower._slots)
    assert len(slots) <= 3


def test_a_conjugate_is_no_tie(fleet):
    number = torch.randn(5, dtype=torch.complex64)
    source = {"a": number, "b": number.conj(), "c": number}
    target = {name: torch.zeros(5, dtype=torch.complex64) for name in source}
    Cluster(fleet, source, [target]).sync.push(1).raise_for_excluded()
    assert all(torch.equal(target[name], source[name]) for name in source)


def test_a_tie_that_became_a_transposed_view_is_refused(fleet):
    shared = torch.nn.Parameter(torch.randn(4, 4))
    source = {"a": shared, "b": shared}
    cluster = Cluster(fleet, source, [{"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}])
    cluster.sync.push(1)
    source["b"] = shared.detach().t()
    with pytest.raises(ConfigError, match="tied"):
        cluster.sync.push(2)


@pytest.mark.parametrize("install", INSTALLS)
def test_an_optimiser_at_the_target_goes_on_across_flips(fleet, install):
    source, target = square(1), square(0)
    optimiser = torch.optim.Adam(target.parameters(), lr=0.5)
    cluster = Cluster(fleet, source, [target], install=install)
    for version in range(1, 5):
        cluster.sync.push(version).raise_for_excluded()
        assert values(target) == {1.0}
        with cluster.subscriptions[0].pinned():
            optimiser.zero_grad()
            target(torch.ones(2, 8)).sum().backward()
            optimiser.step()
        assert values(target).isdisjoint({1.0})
        assert optimiser.state[target.weight]["step"] == version
    assert values(source) == {1.0}


def test_a_flip_between_forward_and_backward_is_an_error_not_a_wrong_gradient(fleet):
    for install in INSTALLS:
        target = square(0)
        cluster = Cluster(lambda name, install=install: fleet(f"{name}-{install}"), square(1), [target])
        sync = WeightSync(cluster.trainer, "policy", [cluster.trainer.name], [cluster.rollouts[0].name])
        loss = target(torch.ones(2, 8, requires_grad=True)).sum()
        sync.push(1).raise_for_excluded()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_compiled_module_follows_an_uncompiled_one_and_the_other_way_round(fleet):
    source, target = square(1), square(0)
    compiled = torch.compile(target, backend="eager")
    cluster = Cluster(fleet, torch.compile(source, backend="eager"), [compiled])
    batch = torch.ones(2, 8)
    assert compiled(batch).sum() == 0
    for version in (1, 2, 3):
        with torch.no_grad():
            source.weight.fill_(version)
        cluster.sync.push(version).raise_for_excluded()
        with cluster.subscriptions[0].pinned():
            assert compiled(batch).unique().tolist() == [8 * version + 1]
    plain = square(0)
    with subscribe(fleet("plain"), "policy", plain):
        WeightSync(cluster.trainer, "policy", ["trainer"], ["plain"]).push(4).raise_for_excluded()
    assert plain(batch).unique().tolist() == [25]


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # once in each process: it does not trace our hooks
def test_a_module_compiled_after_it_subscribed_sees_every_version(fleet):
    source, target = square(1), square(0)
    cluster = Cluster(fleet, source, [target])
    compiled = torch.compile(target, backend="eager")
    for version in (1, 2, 3):
        with torch.no_grad():
            source.weight.fill_(version)
        cluster.sync.push(version).raise_for_excluded()
        assert compiled(torch.ones(2, 8)).unique().tolist() == [8 * version + 1]


def test_a_callback_may_close_its_subscription(fleet):
    target, closed = square(0), threading.Event()
    cluster = Cluster(fleet, square(1), [target], on_flip=lambda: (cluster.subscriptions[0].close(), closed.set()))
    cluster.sync.push(1, timeout=5).raise_for_excluded()
    assert closed.is_set()
    assert cluster.rollouts[0].statistics().regions == 0
    assert values(target) == {1.0}


def test_a_subscription_closed_during_a_long_callback_frees_its_memory_when_that_ends(fleet, monkeypatch):
    monkeypatch.setattr("raynixl.weights.subscription._CLOSE_SECONDS", 0.05)
    inside, leave = threading.Event(), threading.Event()
    cluster = Cluster(fleet, square(1), [square(0)], on_flip=lambda: (inside.set(), leave.wait(10)))
    pusher = threading.Thread(target=cluster.sync.push, args=(1,))
    pusher.start()
    assert inside.wait(5)
    cluster.subscriptions[0].close()
    leave.set()
    pusher.join(10)
    assert cluster.rollouts[0].statistics().regions == 0


def test_an_asynchronous_callback_is_refused(fleet):
    async def reset(version):
        return version

    with pytest.raises(ConfigError, match="on_flip"):
        subscribe(fleet("a"), "policy", square(0), on_flip=reset)


def test_a_strict_push_that_fails_in_the_flip_remembers_who_flipped(fleet):
    targets = [square(0), square(0)]
    cluster = Cluster(fleet, square(1), targets, flip_timeout=0.2)
    names = ["rollout-0", "rollout-1"]
    strict = WeightSync(cluster.trainer, "policy", ["trainer"], names, exclude_failed=False)
    with cluster.subscriptions[0].pinned(), pytest.raises(TransferTimeout, match="did not leave"):
        strict.push(1)
    assert [values(target) for target in targets] == [{0.0}, {1.0}]
    assert strict.version == cluster.publication.version == 1
    strict.push(2)
    assert [values(target) for target in targets] == [{1.0}, {1.0}]

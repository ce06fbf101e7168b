"""Versions: readers see whole ones, in rising order, whatever readers, trainers and callbacks do."""

import asyncio
import threading

import pytest
import torch
from weights_tools import INSTALLS, Cluster, Policy, fill

from raynixl.agents import Agent
from raynixl.errors import (
    AgentClosed,
    ConfigError,
    IntegrityError,
    TransferTimeout,
)
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.publication import Publication
from raynixl.weights.sourcing import Freeze


@pytest.mark.parametrize("install", INSTALLS)
def test_readers_in_a_tight_loop_never_see_half_a_version(fleet, install):
    source, target = Policy(), Policy().eval()
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
                fill(source, version)
            assert not cluster.sync.push(version).excluded
    finally:
        stop.set()
        for reader in readers:
            reader.join(10)
    assert all(len(values) == 1 for _, values in seen)
    assert all(values == {version} for version, values in seen if version is not None)
    assert len({version for version, _ in seen}) > 3


def test_a_copy_out_never_sees_half_an_optimiser_step(fleet):
    source, target = Policy(), Policy().eval()
    cluster = Cluster(fleet, source, [target])
    stop = threading.Event()

    def train():
        step = 0
        while not stop.is_set():
            step += 1
            with cluster.publication.updating():
                fill(source, step)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for version in range(1, 21):
            cluster.sync.push(version)
            assert len(target()) == 1
    finally:
        stop.set()
        trainer.join(10)


def test_a_push_from_inside_updating_ends_with_a_typed_error(fleet):
    cluster = Cluster(fleet, Policy(), [Policy()])
    with cluster.publication.updating(), pytest.raises(TransferTimeout):
        cluster.sync.push(1, timeout=0.3)
    cluster.sync.push(1)


def test_a_corrupted_chunk_is_noticed_and_the_old_version_kept(fleet, monkeypatch):
    source, targets = Policy(), [Policy().eval(), Policy().eval()]
    cluster = Cluster(fleet, source, targets)
    fill(source, 1)
    cluster.sync.push(1)
    freeze = Publication.freeze

    def corrupt(publication, *arguments):
        frozen = freeze(publication, *arguments)
        publication._copies.base(arguments[0].version).arenas.arrays[0][5000] ^= 1
        return frozen

    fill(source, 2)
    monkeypatch.setattr(Publication, "freeze", corrupt)
    report = cluster.sync.push(2)
    assert {type(error) for error in report.excluded.values()} == {IntegrityError}
    assert "chunk 1 " in str(report.excluded["rollout-0"])
    assert "'embedding.weight'" in str(report.excluded["rollout-0"])
    assert report.excluded["rollout-0"].peer == "trainer"
    assert report.ranks == {}
    with pytest.raises(IntegrityError):
        report.raise_for_excluded()
    assert all(target() == {1.0} for target in targets)
    monkeypatch.undo()
    assert not cluster.sync.push(2).excluded
    assert all(target() == {2.0} for target in targets)


def test_versions_only_go_up(fleet):
    cluster = Cluster(fleet, Policy(), [Policy()])
    cluster.sync.push(7)
    for version in (7, 3, 0, -1, "8", 1 << 70, True, 8.0, None):
        with pytest.raises(ConfigError):
            cluster.sync.push(version)
    again = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0"])
    with pytest.raises(ConfigError, match="not above 7"):
        again.push(7)
    cluster.publication.close()
    with publish(cluster.trainer, "policy", Policy()):
        report = again.push(5)
        assert "serves version 7" in str(report.excluded["rollout-0"])


def test_an_on_flip_that_raises_is_reported_and_tears_nothing(fleet):
    def fail(version):
        raise ValueError(f"no {version}")

    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=4.0), [target], on_flip=fail)
    report = cluster.sync.push(1)
    assert "no 1" in report.ranks["rollout-0"].note
    assert "no 1" in str(report)
    assert target() == {4.0}


def test_on_flip_may_run_the_model_before_anybody_else(fleet):
    seen = []
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=4.0), [target], on_flip=lambda version: seen.append((version, target())))
    cluster.sync.push(3)
    assert seen == [(3, {4.0})]


def test_on_flip_gets_the_version_or_nothing_and_is_refused_if_it_takes_more(fleet):
    class Engine:
        def __init__(self):
            self.calls = []

        def reset_cache(self):
            self.calls.append("reset")

        def note(self, version, how="flip"):
            self.calls.append((how, version))

    engine = Engine()
    for number, on_flip in enumerate((engine.reset_cache, engine.note, engine.calls.append)):
        cluster = Cluster(lambda name, number=number: fleet(f"{name}-{number}"), Policy(), [Policy()], on_flip=on_flip)
        WeightSync(cluster.trainer, "policy", [cluster.trainer.name], [cluster.rollouts[0].name]).push(4)
    assert engine.calls == ["reset", ("flip", 4), 4]
    agent = fleet("refuses")
    for wrong in (lambda a, b: None, 5, "reset"):
        with pytest.raises(ConfigError, match="on_flip"):
            subscribe(agent, "policy", Policy(), on_flip=wrong)


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


def test_a_reader_that_stays_keeps_its_version_and_is_reported(fleet):
    source, target = Policy(value=1.0), Policy().eval()
    cluster = Cluster(fleet, source, [target], flip_timeout=0.2)
    with cluster.subscriptions[0].pinned() as version:
        report = cluster.sync.push(1)
        assert isinstance(report.excluded["rollout-0"], TransferTimeout)
        assert target() == {0.0}
        assert version == cluster.subscriptions[0].version == 0
    assert not cluster.sync.push(1).excluded
    assert target() == {1.0}


def test_waiting_for_a_version(fleet):
    cluster = Cluster(fleet, Policy(), [Policy()])
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

    def wait_for_ever():
        with pytest.raises(AgentClosed):
            subscription.wait_version(9, timeout=10)

    waiter = threading.Thread(target=wait_for_ever)
    waiter.start()
    subscription.close()
    waiter.join(10)
    assert not waiter.is_alive()


async def test_pushes_from_an_event_loop_follow_one_another(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=1.0), [target])
    reports = await asyncio.gather(*(cluster.sync.push_async(version) for version in (1,)), asyncio.sleep(0))
    assert reports[0].version == 1
    results = await asyncio.gather(*(cluster.sync.push_async(version) for version in (2, 3, 4)), return_exceptions=True)
    assert any(not isinstance(result, BaseException) for result in results)
    assert all(isinstance(result, ConfigError) for result in results if isinstance(result, BaseException))


def test_two_who_push_the_same_weights_follow_one_another(fleet):
    cluster = Cluster(fleet, Policy(value=1.0), [Policy(), Policy()])
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


def test_a_long_forward_is_waited_for(fleet):
    inside, leave = threading.Event(), threading.Event()

    class Slow(torch.nn.Linear):
        def forward(self, batch):
            inside.set()
            leave.wait(10)
            return super().forward(batch)

    target = Slow(4, 4)
    cluster = Cluster(fleet, torch.nn.Linear(4, 4), [target], flip_timeout=0.5)
    reader = threading.Thread(target=target, args=(torch.ones(4),))
    reader.start()
    assert inside.wait(5)
    assert isinstance(cluster.sync.push(1).excluded["rollout-0"], TransferTimeout)
    leave.set()
    reader.join(5)
    assert not cluster.sync.push(1).excluded


def test_weights_held_for_one_who_is_gone_are_free_again(fleet):
    cluster = Cluster(fleet, torch.nn.Linear(4, 4), [torch.nn.Linear(4, 4)])
    cluster.sync.push(1)
    (plan,) = cluster.publication._served._plans
    with Agent("gone", directory=fleet.directory) as stranger:
        request = Freeze(push="0" * 32, version=2, seconds=600.0, plan=plan)
        stranger.ask("trainer", "weights/policy/freeze", request.to_bytes()).wait(5)
    assert not cluster.sync.push(2, timeout=5).excluded

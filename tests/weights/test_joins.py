"""Targets that join: in the middle of a push they take part in it, and many at a time feed each other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from weights_crew import CHUNKS, ELEMENTS, NBYTES, TENSORS, Crew

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import ConfigError, PeerLost, RaynixlError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.receiver import Receiver

pytestmark = pytest.mark.pure


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture(scope="module")
def crew():
    with Agent("pusher", config=from_env(AgentConfig(heartbeat_timeout=60))) as pusher:
        made = Crew(pusher)
        yield made
        made.close()


def newcomer(crew, name, **options):
    (late,) = crew.start(name)
    late.ask("make", tensors=TENSORS, elements=ELEMENTS)
    late.ask("subscribe", **options)
    return late


def serves(rollouts, version):
    return all(child.ask("values") == [version, [float(version)]] for child in rollouts)


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_who_joins_in_the_middle_of_a_push_has_it_from_peers_before_slow_ones_end(crew, pool, topology):
    sync, trainer, rollouts = crew.ready("r0", "r1", "r2", topology=topology)
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    late = newcomer(crew, f"late-{topology}")
    late.ask("stall_at", chunk=CHUNKS)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    if topology == "relay":
        crew.wait_released()
        trainer.kill()
    joining = pool.submit(sync.join, [late.name])
    assert late.hear() == "stalled"  # it has all but its last chunk checked, and the slow one goes on only now
    late.ask("go_on")
    rollouts[1].ask("go_on")
    report = pushing.result(40)
    assert not report.excluded
    assert joining.result(40) == {}
    assert report.ranks[late.name].nbytes == NBYTES
    assert report.ranks[late.name].origin_nbytes == 0
    assert serves([*rollouts, late], crew.version)
    sync.leave([late.name])
    late.kill()


def test_a_joiner_that_dies_in_the_middle_of_a_push_fails_nobody(crew, pool):
    sync, _, rollouts = crew.ready("r0", "r1", exclude_failed=False)
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    late = newcomer(crew, "late-dies")
    late.ask("stall_at", chunk=2)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    joining = pool.submit(sync.join, [late.name])
    assert late.hear() == "stalled"
    late.kill()
    rollouts[1].ask("go_on")
    report = pushing.result(40)
    assert list(report.excluded) == [late.name]
    assert isinstance(report.excluded[late.name], PeerLost)
    assert isinstance(joining.result(40)[late.name], RaynixlError)
    assert serves(rollouts, crew.version)
    sync.leave([late.name])


def test_many_join_at_the_same_time_and_one_that_is_slow_keeps_no_other_up(crew, pool):
    sync, trainer, rollouts = crew.ready("r0")
    trainer.kill()
    late = [newcomer(crew, f"many-{number}") for number in range(3)]
    for child in late:
        child.ask("stall_at", chunk=2)
    joining = pool.submit(sync.join, [child.name for child in late])
    for child in late:
        assert child.hear() == "stalled"  # all are at work
    for child in late:
        child.ask("go_on")
    assert joining.result(40) == {}
    assert serves([*rollouts, *late], crew.version)
    for child in late:
        child.kill()


# what is seen best in one process


def pair(fleet, **options):
    trainer = fleet("trainer")
    source = {"w": torch.arange(100_000, dtype=torch.float32)}
    publish(trainer, "policy", source, chunk_nbytes=4096)
    model = {"w": torch.zeros(100_000)}
    subscribe(fleet("rollout"), "policy", model)
    return trainer, source, WeightSync(trainer, "policy", ["trainer"], ["rollout"], timeout=20, **options)


def test_those_that_join_together_feed_each_other(fleet, monkeypatch):
    _, source, sync = pair(fleet)
    sync.push(1).raise_for_excluded()
    models = [{"w": torch.zeros(100_000)} for _ in range(4)]
    for number, model in enumerate(models):
        subscribe(fleet(f"late-{number}"), "policy", model)
    gave, from_peer = [], Receiver.from_peer

    def noting(receiver, chunk, giver):
        gave.append(giver.name)
        return from_peer(receiver, chunk, giver)

    monkeypatch.setattr(Receiver, "from_peer", noting)
    assert sync.join([f"late-{number}" for number in range(4)]) == {}
    assert all(torch.equal(model["w"], source["w"]) for model in models)
    assert len(set(gave)) > 1
    assert gave.count("rollout") < len(gave) / 2


def test_who_joins_where_one_does_not_fit_joins_nonetheless(fleet):
    _, source, sync = pair(fleet)
    sync.push(1).raise_for_excluded()
    model = {"w": torch.zeros(100_000)}
    subscribe(fleet("well"), "policy", model)
    subscribe(fleet("odd"), "policy", {"w": torch.zeros(3)})
    failed = sync.join(["odd", "well"])
    assert [type(error) for error in failed.values()] == [ConfigError]
    assert list(failed) == ["odd"]
    assert torch.equal(model["w"], source["w"])
    assert sync.targets == ("rollout", "well")

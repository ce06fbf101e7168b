"""Faults in the middle of a push, between processes: none hangs, nobody tears, survivors have the right bytes."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from weights_crew import CHUNKS, ELEMENTS, TENSORS, Crew

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import IntegrityError, PeerLost, PeerUnknown, TransferTimeout

pytestmark = pytest.mark.pure

SAFE = "safe"
"""A rollout that reads its weights in a tight loop through all tests."""


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture(scope="module")
def crew():
    with Agent("pusher", config=from_env(AgentConfig(heartbeat_timeout=60))) as pusher:
        made = Crew(pusher)
        yield made
        made.close()


@pytest.fixture(autouse=True)
def reader(crew):
    """Check that the safe rollout never saw a torn version, while the others had their faults."""
    yield
    reads, torn, seen = crew.by_name[SAFE].ask("watched")
    assert reads > 0
    assert torn == []
    assert seen == sorted(set(seen))


def ready(crew, *names, **options):
    made = crew.ready(*names, SAFE, **options)
    crew.by_name[SAFE].ask("watch")
    return made


def serves(rollouts, version):
    return all(child.ask("values") == [version, [float(version)]] for child in rollouts)


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_receiver_killed_midway_delays_nobody(crew, pool, topology):
    sync, _, rollouts = ready(crew, "r0", "r1", "r2", topology=topology)
    rollouts[1].ask("stall_at", chunk=2)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    began = time.monotonic()
    rollouts[1].kill()
    report = pushing.result(40)
    assert time.monotonic() - began < 15
    assert list(report.excluded) == ["r1"]
    assert isinstance(report.excluded["r1"], PeerLost)
    assert serves([rollouts[0], rollouts[2]], crew.version)


def test_a_trainer_killed_before_its_release_is_a_typed_error_and_the_old_version_stays(crew, pool):
    sync, trainer, rollouts = ready(crew, "r0", "r1")
    old = crew.version
    for child in rollouts:
        child.ask("stall_at", chunk=1)
    pushing = pool.submit(crew.push, sync)
    for child in rollouts:
        assert child.hear() == "stalled"
    trainer.kill()
    for child in rollouts:
        child.ask("go_on")
    with pytest.raises((PeerLost, PeerUnknown)):
        pushing.result(40)
    assert serves(rollouts, old)


def test_a_trainer_killed_after_its_release_is_not_missed(crew, pool):
    sync, trainer, rollouts = ready(crew, "r0", "r1", "r2")
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    crew.wait_released()
    trainer.kill()
    rollouts[1].ask("go_on")
    assert not pushing.result(40).excluded
    assert serves(rollouts, crew.version)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_whoever_coordinates_killed_or_frozen_midway_leaves_whole_versions_and_another_goes_on(crew, how):
    sync, _, rollouts = ready(crew, "r0", "r1")
    (coordinator,) = crew.start(f"coordinator-{how}")
    to = {"sources": ["trainer"], "targets": ["r0", "r1", SAFE], "topology": "relay", "timeout": 40}
    assert coordinator.ask("push", version=crew.next(), **to) == ["r0", "r1", SAFE]
    old = crew.version
    rollouts[0].ask("stall_at", chunk=2)
    coordinator.send("push", version=crew.next(), **to)
    assert rollouts[0].hear() == "stalled"
    if how == "frozen":
        coordinator.signal(signal.SIGSTOP)
    else:
        coordinator.kill()
    rollouts[0].ask("reset")
    assert serves(rollouts, old)
    assert not crew.push(sync).excluded
    assert serves(rollouts, crew.version)
    coordinator.kill()


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_holder_that_is_frozen_costs_its_stall_and_nobody_else(crew, pool, topology):
    sync, _, rollouts = ready(crew, "r0", "r1", "r2", topology=topology)
    old, frozen = crew.version, rollouts[0]
    frozen.ask("stall_at", chunk=4)
    pushing = pool.submit(crew.push, sync)
    assert frozen.hear() == "stalled"
    began = time.monotonic()
    frozen.signal(signal.SIGSTOP)
    report = pushing.result(60)
    assert time.monotonic() - began < 15  # of the 32 s that a pull may take
    assert isinstance(report.excluded["r0"], TransferTimeout | PeerLost)
    assert serves(rollouts[1:], crew.version)
    frozen.signal(signal.SIGCONT)
    frozen.ask("reset")
    assert serves([frozen], old)
    assert not crew.push(sync).excluded
    assert serves(rollouts, crew.version)


def test_a_holder_that_serves_damaged_chunks_is_named_fetched_around_and_left_out(crew, pool):
    sync, _, rollouts = ready(crew, "r0", "r1")
    liar, *honest = rollouts
    old = crew.version
    liar.ask("lie", told_at=CHUNKS // 2)
    for child in honest:
        child.ask("stall_at", chunk=1)
    pushing = pool.submit(crew.push, sync)
    heard = sorted([liar.hear(), *(child.hear() for child in honest)])
    assert heard == ["lied", "stalled", "stalled"]
    for child in honest:
        child.ask("go_on")
    report = pushing.result(40)
    assert report.liars == ("r0",)
    assert isinstance(report.excluded["r0"], IntegrityError)
    assert "r0 gave corrupt chunks" in str(report)
    assert serves(honest, crew.version)
    assert serves([liar], old)
    liar.ask("reset")
    assert not crew.push(sync).excluded
    assert serves(rollouts, crew.version)


def test_a_receiver_that_joins_in_the_middle_of_a_push_needs_no_trainer(crew, pool):
    sync, trainer, rollouts = ready(crew, "r0", "r1")
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    crew.wait_released()
    trainer.kill()
    late = joiner(crew)
    joining = pool.submit(sync.join, ["late"])
    rollouts[1].ask("go_on")
    assert not pushing.result(40).excluded
    assert joining.result(40) == {}
    assert late.ask("wait_version", version=crew.version) == crew.version
    assert serves([*rollouts, late], crew.version)
    late.kill()


def joiner(crew, name="late"):
    (late,) = crew.start(name)
    late.ask("make", tensors=TENSORS, elements=ELEMENTS)
    late.ask("subscribe")
    return late


@pytest.mark.parametrize(
    ("versions", "kills"), [(8, 3), pytest.param(50, 20, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_random_kills_and_joins_over_many_versions_never_tear_and_never_hang(crew, pool, versions, kills):
    dice = random.Random(7)
    fatal = set(dice.sample(range(versions), kills))
    names = ["r0", "r1", "r2"]
    sync, _, _ = ready(crew, *names)
    for turn in range(versions):
        if turn not in fatal:
            assert not crew.push(sync).excluded
        else:
            victim = crew.by_name[dice.choice(names)]
            victim.ask("stall_at", chunk=dice.randint(1, CHUNKS))
            pushing = pool.submit(crew.push, sync)
            assert victim.hear() == "stalled"
            victim.kill()
            assert set(pushing.result(60).excluded) == {victim.name}
            assert serves([crew.by_name[name] for name in (*names, SAFE) if name != victim.name], crew.version)
            sync.leave([victim.name])
            names[names.index(victim.name)] = f"r{turn + 3}"
            joiner(crew, f"r{turn + 3}")
            assert sync.join([f"r{turn + 3}"]) == {}
        assert serves([crew.by_name[name] for name in (*names, SAFE)], crew.version)
    for name in names:
        crew.by_name[name].kill()

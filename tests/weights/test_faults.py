"""Faults in the middle of a push, between processes: none hangs, nobody tears, survivors have the right bytes."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from weights_nursery import Nursery

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import PeerLost, PeerUnknown, TransferTimeout
from raynixl.weights import WeightSync

SCRIPT = Path(__file__).parent / "fault_child.py"
TENSORS, ELEMENTS = 4, 100_000
CHUNK = 1 << 16
CHUNKS = -(-TENSORS * ELEMENTS * 4 // CHUNK)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


class Crew:
    """A trainer and rollouts in processes of their own, that know each other and the pusher; the dead are replaced."""

    def __init__(self, pusher):
        self.pusher = pusher
        self.nursery = Nursery(SCRIPT)
        self.version = 0
        self.by_name = {}

    def start(self, *names):
        """Start processes, and introduce them to all that live."""
        fresh = [self.nursery.child(name) for name in names]
        self.by_name.update((child.name, child) for child in fresh)
        for child in fresh:
            child.ask("meet", record=self.pusher.record().hex())
            self.pusher.peer(child.record)
            for other in self.alive():
                if other is not child:
                    child.ask("meet", record=other.record.hex())
                    other.ask("meet", record=child.record.hex())
        return fresh

    def alive(self):
        return [child for child in self.by_name.values() if child.is_alive]

    def missing(self, *names):
        alive = {child.name for child in self.alive()}
        return self.start(*(name for name in names if name not in alive))

    def ready(self, *names, **options):
        """Return a sync to these rollouts, the trainer and them; all serve one version and do no harm."""
        for child in self.missing("trainer", *names):
            child.ask("make", tensors=TENSORS, elements=ELEMENTS)
            if child.name == "trainer":
                child.ask("publish", chunk_nbytes=CHUNK)
            else:
                child.ask("subscribe")
        rollouts = [self.by_name[name] for name in names]
        for child in rollouts:
            child.ask("reset")
        sync = WeightSync(self.pusher, "w", ["trainer"], list(names), timeout=40, **{"topology": "relay", **options})
        assert not self.push(sync).excluded
        return sync, self.by_name["trainer"], rollouts

    def next(self):
        """Give the trainer's weights the next version's number, and return it."""
        self.version += 1
        self.by_name["trainer"].ask("fill", value=float(self.version))
        return self.version

    def push(self, sync, **options):
        return sync.push(self.next(), **options)

    def close(self):
        self.nursery.close()


@pytest.fixture(scope="module")
def crew():
    with Agent("pusher", config=from_env(AgentConfig(heartbeat_timeout=60))) as pusher:
        made = Crew(pusher)
        yield made
        made.close()


def serves(rollouts, version):
    return all(child.ask("values") == [version, [float(version)]] for child in rollouts)


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_receiver_killed_midway_delays_nobody(crew, pool, topology):
    sync, _, rollouts = crew.ready("r0", "r1", "r2", topology=topology)
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
    sync, trainer, rollouts = crew.ready("r0", "r1")
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
    sync, trainer, rollouts = crew.ready("r0", "r1", "r2")
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    end = time.monotonic() + 20
    while not trainer.ask("is_free"):
        assert time.monotonic() < end
    trainer.kill()
    rollouts[1].ask("go_on")
    assert not pushing.result(40).excluded
    assert serves(rollouts, crew.version)


def test_whoever_coordinates_killed_midway_leaves_whole_versions_and_another_goes_on(crew):
    sync, _, rollouts = crew.ready("r0", "r1")
    (coordinator,) = crew.start("coordinator")
    how = {"sources": ["trainer"], "targets": ["r0", "r1"], "topology": "relay", "timeout": 40}
    assert coordinator.ask("push", version=crew.next(), **how) == ["r0", "r1"]
    old = crew.version
    rollouts[0].ask("stall_at", chunk=2)
    coordinator.send("push", version=crew.next(), **how)
    assert rollouts[0].hear() == "stalled"
    coordinator.kill()
    rollouts[0].ask("reset")
    assert serves(rollouts, old)
    assert not crew.push(sync).excluded
    assert serves(rollouts, crew.version)


def test_a_holder_that_is_frozen_costs_its_stall_and_nobody_else(crew, pool):
    sync, _, rollouts = crew.ready("r0", "r1", "r2")
    old, frozen = crew.version, rollouts[0]
    frozen.ask("stall_at", chunk=4)
    pushing = pool.submit(crew.push, sync, timeout=20.0)
    assert frozen.hear() == "stalled"
    frozen.signal(signal.SIGSTOP)
    report = pushing.result(40)
    assert isinstance(report.excluded["r0"], TransferTimeout | PeerLost)
    assert serves(rollouts[1:], crew.version)
    frozen.signal(signal.SIGCONT)
    frozen.ask("reset")
    assert serves([frozen], old)
    assert not crew.push(sync).excluded
    assert serves(rollouts, crew.version)


def test_a_holder_that_serves_damaged_chunks_is_named_and_fetched_around(crew):
    sync, _, rollouts = crew.ready("r0", "r1", "r2")
    rollouts[0].ask("lie")
    report = crew.push(sync)
    assert {"r1", "r2"} <= set(report.ranks)
    assert serves(rollouts[1:], crew.version)
    assert set(report.liars) <= {"r0"}
    rollouts[0].kill()  # what it has is not worth keeping


def test_a_receiver_that_joins_in_the_middle_of_a_push_catches_up_from_peers(crew, pool):
    sync, _, rollouts = crew.ready("r0", "r1")
    rollouts[1].ask("stall_at", chunk=CHUNKS)
    pushing = pool.submit(crew.push, sync)
    assert rollouts[1].hear() == "stalled"
    late = joiner(crew)
    joining = pool.submit(sync.join, ["late"])
    rollouts[1].ask("go_on")
    assert not pushing.result(40).excluded
    assert joining.result(40) == {}
    assert late.ask("wait_version", version=crew.version) == crew.version
    assert serves([*rollouts, late], crew.version)
    late.kill()


def test_a_late_receiver_catches_up_without_the_trainer(crew):
    sync, trainer, _ = crew.ready("r0")
    trainer.kill()
    late = joiner(crew)
    assert sync.join(["late"]) == {}
    assert serves([late], crew.version)
    late.kill()


def joiner(crew):
    (late,) = crew.start("late")
    late.ask("make", tensors=TENSORS, elements=ELEMENTS)
    late.ask("subscribe")
    return late


@pytest.mark.timeout(240)
def test_random_kills_and_joins_over_many_versions_never_tear_and_never_hang(crew):
    dice, kills = random.Random(7), 0
    sync, _, rollouts = crew.ready("r0", "r1", "r2")
    rollouts[0].ask("watch")
    for turn in range(1, 31):
        if turn % 6:
            assert not crew.push(sync).excluded
            assert serves(rollouts, crew.version)
            continue
        victim = dice.choice(rollouts[1:])
        victim.ask("stall_at", chunk=dice.randint(1, CHUNKS))
        with ThreadPoolExecutor(1) as pool:
            pushing = pool.submit(crew.push, sync)
            assert victim.hear() == "stalled"
            victim.kill()
            assert set(pushing.result(60).excluded) == {victim.name}
        kills += 1
        assert serves([child for child in rollouts if child is not victim], crew.version)
        (again,) = crew.missing(victim.name)
        again.ask("make", tensors=TENSORS, elements=ELEMENTS)
        again.ask("subscribe")
        rollouts[rollouts.index(victim)] = again
    assert kills == 5
    reads, torn, seen = rollouts[0].ask("watched")
    assert reads > 30
    assert torn == []
    assert len(seen) > 5
    assert seen == sorted(set(seen))

"""Pushes between processes over shm: killed and frozen ranks, and bytes that arrive."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import mapped_arenas

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.errors import PeerLost, PeerUnknown, TransferTimeout
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.receiver import Receiver

TENSORS, ELEMENTS = 6, 200_000
CHUNK = 1 << 18


def weights(value=0.0):
    return {f"w{number}": torch.full((ELEMENTS,), value) for number in range(TENSORS)}


def set_up_target(child, install="auto"):
    child.ask("make", tensors=TENSORS, elements=ELEMENTS)
    child.ask("subscribe", install=install)


@pytest.fixture
def trainer():
    with Agent("trainer", config=from_env(AgentConfig(heartbeat_timeout=60))) as agent:
        yield agent


@pytest.fixture
def source(trainer):
    tensors = weights()
    with publish(trainer, "w", tensors, chunk_nbytes=CHUNK):
        yield tensors


def fill(tensors, value):
    for tensor in tensors.values():
        tensor.fill_(value)


def kill_at_the_second_chunk(child, monkeypatch):
    """Kill a source once something was pulled from it, and go on when the puller knows."""
    begin = Receiver._begin

    def begin_after_the_kill(receiver, chunk):
        if chunk > 0 and child.is_alive:
            child.kill()
        deadline = time.monotonic() + 10
        while chunk > 0 and receiver.agent.lost(child.name) is None and time.monotonic() < deadline:
            os.sched_yield()
        return begin(receiver, chunk)

    monkeypatch.setattr(Receiver, "_begin", begin_after_the_kill)


def push_in_background(pool, sync, version, **options):
    return pool.submit(sync.push, version, **options)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


def test_every_process_gets_every_version(trainer, source, children):
    targets = children("r0", "r1", "r2", known=[trainer])
    for child, install in zip(targets, ("auto", "swap", "copy"), strict=True):
        set_up_target(child, install)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0", "r1", "r2"])
    for version in (1, 2, 3):
        fill(source, version)
        report = sync.push(version)
        assert not report.excluded
        assert {rank.nbytes for rank in report.ranks.values()} == {TENSORS * ELEMENTS * 4}
        assert [child.ask("values") for child in targets] == [[version, [float(version)]]] * 3


def test_a_target_killed_while_it_pulls_is_excluded_and_back_when_it_restarts(trainer, source, children, pool):
    healthy, victim = children("r0", "r1", known=[trainer])
    for child in (healthy, victim):
        set_up_target(child)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0", "r1"])
    assert not sync.push(1).excluded
    victim.ask("stall")
    fill(source, 2)
    pushing = push_in_background(pool, sync, 2)
    assert victim.hear() == "stalled"
    began = time.monotonic()
    victim.kill()
    report = pushing.result(30)
    assert time.monotonic() - began < 5
    assert isinstance(report.excluded["r1"], PeerLost)
    assert healthy.ask("values") == [2, [2.0]]
    (again,) = children("r1", known=[trainer])
    set_up_target(again)
    assert not sync.push(3).excluded
    assert again.ask("values") == healthy.ask("values") == [3, [2.0]]


def test_a_frozen_target_costs_the_others_no_more_than_the_deadline_and_wakes_to_its_old_version(
    trainer, source, children, pool
):
    healthy, victim = children("r0", "r1", known=[trainer])
    for child in (healthy, victim):
        set_up_target(child)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0", "r1"])
    fill(source, 1)
    assert not sync.push(1).excluded
    victim.ask("stall")
    fill(source, 2)
    began = time.monotonic()
    pushing = push_in_background(pool, sync, 2, timeout=2.0)
    assert victim.hear() == "stalled"
    victim.signal(signal.SIGSTOP)
    report = pushing.result(30)
    assert time.monotonic() - began < 4
    assert isinstance(report.excluded["r1"], TransferTimeout | PeerLost)
    assert healthy.ask("values") == [2, [2.0]]
    victim.signal(signal.SIGCONT)
    assert victim.ask("values") == [1, [1.0]]


def test_a_target_that_was_frozen_for_a_while_takes_the_next_version(trainer, source, children):
    healthy, victim = children("r0", "r1", known=[trainer])
    for child in (healthy, victim):
        set_up_target(child)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0", "r1"])
    fill(source, 1)
    assert not sync.push(1).excluded
    victim.signal(signal.SIGSTOP)
    fill(source, 2)
    report = sync.push(2, timeout=1.0)
    assert isinstance(report.excluded["r1"], TransferTimeout | PeerLost)
    victim.signal(signal.SIGCONT)
    fill(source, 3)
    assert not sync.push(3).excluded
    assert victim.ask("values") == healthy.ask("values") == [3, [3.0]]


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_a_source_killed_while_it_is_pulled_from_leaves_every_target_on_the_old_version(
    trainer, children, install, monkeypatch
):
    (source,) = children("source", known=[trainer])
    source.ask("make", tensors=TENSORS, elements=4 * ELEMENTS)
    source.ask("publish", chunk_nbytes=CHUNK)
    source.ask("fill", value=1.0)
    with Agent("other") as other:
        other.peer(source.record)
        trainer.peer(other.record())
        targets = [{name: torch.zeros(4 * ELEMENTS) for name in weights()} for _ in range(2)]
        subscriptions = [
            subscribe(agent, "w", target, install=install)
            for agent, target in zip((trainer, other), targets, strict=True)
        ]
        sync = WeightSync(trainer, "w", ["source"], ["trainer", "other"])
        assert not sync.push(1).excluded
        kill_at_the_second_chunk(source, monkeypatch)
        source.ask("fill", value=2.0)
        with pytest.raises((PeerLost, PeerUnknown)):
            sync.push(2)
        assert [subscription.version for subscription in subscriptions] == [1, 1]
        assert all(tensor.unique().tolist() == [1.0] for target in targets for tensor in target.values())
        for subscription in subscriptions:
            subscription.close()


def test_a_source_killed_before_a_push_is_a_typed_error_at_once(trainer, children):
    source, target = children("source", "r0", known=[trainer])
    source.ask("make", tensors=TENSORS, elements=ELEMENTS)
    source.ask("publish", chunk_nbytes=CHUNK)
    set_up_target(target)
    sync = WeightSync(trainer, "w", ["source"], ["r0"])
    sync.push(1)
    source.kill()
    began = time.monotonic()
    with pytest.raises((PeerLost, PeerUnknown)):
        sync.push(2)
    assert time.monotonic() - began < 5
    assert target.ask("values") == [1, [0.0]]


def test_a_source_may_push_by_itself_from_its_own_process(trainer, children):
    source, target = children("source", "r0", known=[trainer])
    source.ask("make", tensors=TENSORS, elements=ELEMENTS)
    source.ask("fill", value=4.0)
    source.ask("publish", chunk_nbytes=CHUNK)
    set_up_target(target)
    assert source.ask("push", version=1, targets=["r0"], timeout=10) == ["r0"]
    assert target.ask("wait_version", version=1) == 1
    assert target.ask("values") == [1, [4.0]]


def test_a_replica_takes_over_from_a_source_that_dies_while_it_is_pulled_from(trainer, source, children, monkeypatch):
    (replica,) = children("replica", known=[trainer])
    replica.ask("make", tensors=TENSORS, elements=ELEMENTS)
    replica.ask("fill", value=5.0)
    replica.ask("publish", chunk_nbytes=CHUNK)
    fill(source, 5)
    target = weights()
    with subscribe(trainer, "w", target):
        kill_at_the_second_chunk(replica, monkeypatch)
        assert list(WeightSync(trainer, "w", ["replica", "trainer"], ["trainer"]).push(1).ranks) == ["trainer"]
    assert all(tensor.unique().tolist() == [5.0] for tensor in target.values())


def test_a_target_frozen_between_pull_and_flip_does_not_flip_after_it_was_given_up(trainer, source, children, pool):
    (victim,) = children("r0", known=[trainer])
    set_up_target(victim)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0"])
    fill(source, 1)
    assert not sync.push(1).excluded
    victim.ask("stall_flip")
    fill(source, 2)
    pushing = push_in_background(pool, sync, 2, timeout=1.5)
    assert victim.hear() == "stalled"
    victim.signal(signal.SIGSTOP)
    assert isinstance(pushing.result(30).excluded["r0"], TransferTimeout | PeerLost)
    victim.signal(signal.SIGCONT)
    victim.ask("go_on")
    fill(source, 3)
    assert not sync.push(3).excluded
    assert victim.ask("flips") == [3]
    assert victim.ask("values") == [3, [3.0]]


def test_a_source_restarted_under_its_name_is_pushed_from_again(trainer, children):
    target = weights()
    with subscribe(trainer, "w", target):
        sync = WeightSync(trainer, "w", ["source"], ["trainer"])
        for version in (1, 2):
            (source,) = children("source", known=[trainer])
            source.ask("make", tensors=TENSORS, elements=ELEMENTS)
            source.ask("publish", chunk_nbytes=CHUNK)
            source.ask("fill", value=float(version))
            assert not sync.push(version).excluded
            assert all(tensor.unique().tolist() == [version] for tensor in target.values())
            source.kill()


def test_hundreds_of_pushes_between_processes_grow_nothing(trainer, source, children):
    (target,) = children("r0", known=[trainer])
    set_up_target(target)
    sync = WeightSync(trainer, "w", ["trainer"], ["r0"])
    pids = (os.getpid(), target.pid)

    def held():
        return [
            count for pid in pids for count in (mapped_arenas(pid), len(os.listdir(f"/proc/{pid}/fd")), threads_of(pid))
        ]

    for version in range(1, 10):
        sync.push(version)
    before = held()
    for version in range(10, 160):
        assert not sync.push(version).excluded
    deadline = time.monotonic() + 10
    while (now := held()) != before and time.monotonic() < deadline:
        if all(count <= then for count, then in zip(now, before, strict=True)):
            break  # a thread of the first pushes has ended since
        os.sched_yield()
    assert all(count <= then for count, then in zip(now, before, strict=True)), (now, before)


def threads_of(pid):
    return len(os.listdir(f"/proc/{pid}/task"))

"""Receivers that feed each other, in processes of their own: equal bytes, each from the trainer once, soon released."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from weights_crew import CHUNK, CHUNKS, ELEMENTS, NBYTES, TENSORS, Crew

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env
from raynixl.weights import WeightSync

pytestmark = pytest.mark.pure

NAMES = [f"r{number}" for number in range(8)]


@pytest.fixture(scope="module")
def crew():
    with Agent("pusher", config=from_env(AgentConfig(heartbeat_timeout=60))) as pusher:
        made = Crew(pusher)
        yield made
        made.close()


def push_random(crew, sync):
    """Push weights that tell every element from its neighbours; return the report and what tells their bytes."""
    crew.version += 1
    trainer = crew.by_name["trainer"]
    trainer.ask("randomise", seed=crew.version)
    return sync.push(crew.version), trainer.ask("sha256")


@pytest.mark.parametrize("receivers", [1, 2, 3, 5, 8])
def test_however_many_receivers_the_trainer_gives_its_bytes_about_once(crew, receivers):
    sync, _, rollouts = crew.ready(*NAMES[:receivers])
    report, digest = push_random(crew, sync)
    assert not report.excluded
    assert {child.ask("sha256") for child in rollouts} == {digest}
    assert report.origin_nbytes <= 1.1 * NBYTES
    assert report.origin_nbytes + report.peer_nbytes == receivers * NBYTES
    assert not report.liars


def test_the_trainer_is_released_before_the_slowest_receiver_has_everything(crew):
    sync, trainer, rollouts = crew.ready(*NAMES[:3])
    rollouts[2].ask("stall_at", chunk=CHUNKS - 2)
    with ThreadPoolExecutor(1) as pool:
        crew.version += 1
        trainer.ask("randomise", seed=crew.version)
        digest = trainer.ask("sha256")
        pushing = pool.submit(sync.push, crew.version)
        assert rollouts[2].hear() == "stalled"
        crew.wait_released()
        trainer.ask("randomise", seed=0)
        assert not pushing.done()
        rollouts[2].ask("go_on")
        report = pushing.result(40)
    assert not report.excluded
    assert report.release_seconds < report.seconds
    assert {child.ask("sha256") for child in rollouts} == {digest}


def test_slow_receivers_still_share_the_work(crew):
    sync, _, rollouts = crew.ready(*NAMES[:4])
    for child in rollouts[:2]:
        child.ask("dawdle", seconds=0.02)
    report, digest = push_random(crew, sync)
    assert not report.excluded
    assert report.origin_nbytes <= 1.1 * NBYTES
    assert {child.ask("sha256") for child in rollouts} == {digest}


def test_receivers_that_pull_straight_from_the_trainer_release_it_before_they_flip(crew):
    sync, _, rollouts = crew.ready(*NAMES[:2], topology="direct")
    report, digest = push_random(crew, sync)
    assert report.origin_nbytes == 2 * NBYTES
    assert report.peer_nbytes == 0
    assert 0 < report.release_seconds < report.seconds
    assert {child.ask("sha256") for child in rollouts} == {digest}


def test_the_trainers_of_shards_are_kept_for_a_receiver_that_nobody_else_can_feed(crew):
    shares = {"whole0": (0, 1), "whole1": (0, 1), "left0": (0, 2), "left1": (0, 2), "right": (1, 2)}
    trainers = crew.start("half0", "half1")
    for rank, child in enumerate(trainers):
        child.ask("make", tensors=TENSORS, elements=ELEMENTS // 2)
        child.ask("publish_share", rank=rank, ranks=2, chunk_nbytes=CHUNK, copy_out=False)
        child.ask("randomise", seed=rank)
    rollouts = crew.start(*shares)
    for child, (rank, ranks) in zip(rollouts, shares.values(), strict=True):
        child.ask("make", tensors=TENSORS, elements=ELEMENTS // ranks)
        child.ask("subscribe_share", rank=rank, ranks=ranks)
    lonely, others = rollouts[-1], rollouts[:-1]
    for child in rollouts:
        child.ask("stall_at", chunk=2)
    sync = WeightSync(crew.pusher, "w", ["half0", "half1"], list(shares), topology="relay", timeout=40)
    with ThreadPoolExecutor(2) as pool:
        pushing = pool.submit(sync.push, 1)
        assert [child.hear() for child in rollouts] == ["stalled"] * len(rollouts)
        for child in others:
            child.ask("go_on")
        assert not any(trainers[1].ask("is_free") for _ in range(500))
        refilling = pool.submit(trainers[1].ask, "randomise", seed=9)  # as soon as the weights are free
        lonely.ask("go_on")
        report = pushing.result(40)
        refilling.result(40)
    assert not report.excluded
    halves = [random_weights(seed) for seed in (0, 1)]
    whole = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    wanted = {"whole0": whole, "whole1": whole, "left0": halves[0], "left1": halves[0], "right": halves[1]}
    assert {child.name: child.ask("sha256") for child in rollouts} == {
        name: hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
        for name, tensors in wanted.items()
    }
    assert report.origin_nbytes <= 1.1 * 2 * NBYTES  # one whole, a left half, a right half


def random_weights(seed):
    """Return what a child that has half of the elements makes of a seed."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(ELEMENTS // 2, generator=draw) for _ in range(TENSORS)]

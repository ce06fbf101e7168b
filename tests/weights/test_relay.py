"""Receivers that feed each other, in processes of their own: equal bytes, each from the trainer once, soon released."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from weights_crew import CHUNKS, NBYTES, Crew

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env

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
        trainer.ask("randomise", seed=0)  # returns once the sources are released, which the push outlasts
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

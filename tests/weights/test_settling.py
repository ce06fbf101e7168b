"""A replica whose pusher dies or freezes in the midst of its flip: its ranks end alike, by themselves, and soon."""

import signal
import time

import pytest
from weights_crew import ELEMENTS, TENSORS, Crew

from raynixl.agents import Agent
from raynixl.config import AgentConfig, from_env

pytestmark = pytest.mark.pure

RANKS = ["r0", "r1", "r2"]


@pytest.fixture(scope="module")
def crew():
    with Agent("pusher", config=from_env(AgentConfig(heartbeat_timeout=60))) as pusher:
        made = Crew(pusher)
        yield made
        made.close()


@pytest.fixture
def ranks(crew):
    """The ranks of one replica, which all serve a version, and read in a tight loop."""
    _, _, made = crew.ready(*RANKS)
    for child in made:
        child.ask("watch")
    yield made
    for child in made:
        if child.is_alive:
            reads, torn, _ = child.ask("watched")
            assert reads > 0
            assert torn == []


def leader(crew, name):
    (child,) = crew.start(name)
    to = {"sources": ["trainer"], "targets": [RANKS], "topology": "direct"}
    return child, {"version": crew.next(), "timeout": 20, **to}


def all_serve(ranks, version, seconds=10.0):
    """Wait until all do, and see that they go on doing so."""
    deadline = time.monotonic() + seconds
    wanted = [[version, [float(version)]]] * len(ranks)
    while (seen := [child.ask("values") for child in ranks]) != wanted:
        assert time.monotonic() < deadline, seen
    time.sleep(0.3)
    return [child.ask("values") for child in ranks] == wanted


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
def test_a_pusher_killed_when_some_ranks_have_flipped_leaves_all_on_one_version(crew, ranks, flips):
    old = crew.version
    child, push = leader(crew, f"leader-{flips}")
    child.send("push_until", flips=flips, pause=0, **push)
    child.wait_ended()
    assert all_serve(ranks, crew.version if flips else old)
    sync, _, _ = crew.ready(*RANKS)
    assert not crew.push(sync).excluded
    assert all_serve(ranks, crew.version)


def test_a_rank_that_flipped_and_was_frozen_when_the_others_went_back_goes_back_when_it_wakes(crew, ranks):
    old = crew.version
    for rank in ranks:
        rank.ask("settle_for", seconds=1.0)
    child, push = leader(crew, "leader-frozen-rank")
    child.send("push_until", flips=1, pause=60, **push)
    assert child.hear() == "flipped"
    ranks[0].signal(signal.SIGSTOP)
    child.kill()
    assert all_serve(ranks[1:], old)
    ranks[0].signal(signal.SIGCONT)
    assert all_serve(ranks, old)


def test_a_pusher_that_was_frozen_amid_a_flip_does_not_undo_what_the_ranks_have_settled(crew, ranks):
    child, push = leader(crew, "leader-frozen")
    child.send("push_until", flips=1, pause=0.5, **{**push, "timeout": 2})
    assert child.hear() == "flipped"
    child.signal(signal.SIGSTOP)
    woken = time.monotonic() + 2.5  # when its time is over, so that it gives the flips of the others up
    while not all_serve(ranks, crew.version) or time.monotonic() < woken:
        pass
    child.signal(signal.SIGCONT)
    child.hear()
    assert all_serve(ranks, crew.version)
    child.kill()


def test_a_rank_that_is_dead_too_does_not_keep_the_readers_of_the_others_out(crew, ranks):
    child, push = leader(crew, "leader-dead-rank")
    child.send("push_until", flips=1, pause=60, **push)
    assert child.hear() == "flipped"
    ranks[2].kill()
    child.kill()
    assert all_serve(ranks[:2], crew.version)
    late = crew.start("r2")[0]
    late.ask("make", tensors=TENSORS, elements=ELEMENTS)
    late.ask("subscribe")

"""A source that is frozen while it is pulled from, over paths that need it: its replica gives the rest, and soon."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from weights_crew import CHUNK, ELEMENTS, TENSORS, Crew

from raynixl.agents import Agent
from raynixl.config import from_env
from raynixl.errors import PeerLost, TransferTimeout
from raynixl.weights import WeightSync

pytestmark = pytest.mark.pure

pytest.importorskip("ucxx", reason="shm reads from processes that are stopped; only TCP needs them")
ROLLOUTS = ["r0", "r1"]


@pytest.fixture(scope="module")
def crew():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYNIXL_BACKENDS", "ucx")
        patch.setenv("RAYNIXL_UCX", "TLS=tcp")
        patch.setenv("RAYNIXL_HEARTBEAT_TIMEOUT", "60")
        with Agent("pusher", config=from_env()) as pusher:
            made = Crew(pusher)
            yield made
            made.close()


def ready(crew, topology):
    """Return a sync from two replicas to two fresh rollouts that serve its first version, and all of them."""
    sources = crew.missing("trainer", "twin") or [crew.by_name[name] for name in ("trainer", "twin")]
    rollouts = crew.missing(*ROLLOUTS) or [crew.by_name[name] for name in ROLLOUTS]
    for child in (*sources, *rollouts):
        child.ask("reset")
        child.ask("withdraw")
        child.ask("make", tensors=TENSORS, elements=ELEMENTS)
    for child in sources:
        child.ask("publish", chunk_nbytes=CHUNK)
    for child in rollouts:
        child.ask("subscribe")
    sync = WeightSync(crew.pusher, "w", ["trainer", "twin"], ROLLOUTS, topology=topology, timeout=60)
    assert not sync.push(1).excluded
    for child in sources:
        child.ask("fill", value=2.0)
    return sync, sources, rollouts


@pytest.mark.parametrize("topology", ["direct", "relay"])
def test_a_source_that_is_frozen_midway_is_named_and_its_replica_gives_the_rest(crew, topology):
    sync, sources, rollouts = ready(crew, topology)
    for child in rollouts:
        child.ask("stall_at", chunk=3)
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(sync.push, 2)
        assert [child.hear() for child in rollouts] == ["stalled"] * len(rollouts)
        sources[1].signal(signal.SIGSTOP)
        began = time.monotonic()
        for child in rollouts:
            child.ask("go_on")
        report = pushing.result(60)
        seconds = time.monotonic() - began
        sources[1].signal(signal.SIGCONT)
    assert set(report.ranks) == set(ROLLOUTS)
    assert all(child.ask("values") == [2, [2.0]] for child in rollouts)
    if topology == "direct":
        assert isinstance(report.excluded["twin"], TransferTimeout | PeerLost)
        assert report.replans == 1
    assert seconds < 20  # the pull alone may take 48


def test_a_source_that_is_frozen_before_a_push_is_left_out_soon(crew):
    sync, sources, rollouts = ready(crew, "direct")
    sources[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    report = sync.push(2)
    seconds = time.monotonic() - began
    sources[1].signal(signal.SIGCONT)
    assert set(report.ranks) == set(ROLLOUTS)
    assert list(report.excluded) == ["twin"]
    assert all(child.ask("values") == [2, [2.0]] for child in rollouts)
    assert seconds < 12  # its answer may take 18

"""Transfers over two rails of this host: every byte arrives, and a rail that fails is made anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import warm
from agent_tools import MIB, PATIENCE, eventually, make_agent, make_config, random_bytes

from raynixl import Agent, Region, RemoteRegion
from raynixl.agents import Prepared
from raynixl.backends.ucx import UcxBackend
from raynixl.backends.ucx_lane import Lane, UcxBinding
from raynixl.native import RESET
from raynixl.testing.far import pattern
from raynixl.testing.places import FarProcess
from raynixl.topology import addresses

N = 8 * MIB + 4099
BLOCK = 4096


@pytest.fixture(scope="module")
def rails() -> tuple[str, ...]:
    """Two interfaces of this host, on which UCX has a device each."""
    found = tuple(dict.fromkeys(one.interface for one in addresses()))
    if len(found) < 2:
        pytest.skip(f"two rails need two interfaces that are up; there is {', '.join(found) or 'none'}")
    return found[-1], found[0]


@pytest.fixture
def settings(rails: tuple[str, ...]) -> dict[str, Any]:
    """How agents of both sides are configured."""
    return {"secret": b"of this job", "backends": ("ucx",), "ucx": {"TLS": "tcp"}, "rails": rails}


@pytest.fixture
def far(settings: dict[str, Any], _leaves_nothing: None) -> Iterator[FarProcess]:
    """An agent of another process with a region 'theirs'."""
    made = FarProcess(UcxBackend, make_config(**settings), is_busy=False, launch=warm.popen)
    made.open("far")
    made.ask("make", "theirs", N, "user", 1)
    yield made
    made.close()


@pytest.fixture
def near(settings: dict[str, Any], far: FarProcess) -> Iterator[Agent]:
    """An agent of this process that knows the other."""
    with make_agent("near", **settings) as made:
        made.peer(far.ask("record"))
        far.ask("meet", made.record())
        yield made


@pytest.fixture
def mine(near: Agent) -> Region:
    """Memory of this process."""
    return near.register(np.zeros(N, np.uint8))


@pytest.fixture
def theirs(near: Agent) -> RemoteRegion:
    """Memory of the other."""
    return near.peer("far")["theirs"]


def binding_of(plan: Prepared) -> UcxBinding:
    """The binding that an operation takes, the one that is there if it is usable."""
    (binding,) = plan.agent.connector.bind(plan, time.monotonic() + PATIENCE)
    assert isinstance(binding, UcxBinding)
    return binding


def lane_of(plan: Prepared) -> Lane:
    """The lane that an operation takes."""
    lane = binding_of(plan).lane
    assert lane is not None
    return lane


def test_one_large_block_arrives_in_both_directions(
    near: Agent, far: FarProcess, mine: Region, theirs: RemoteRegion, rails: tuple[str, ...]
) -> None:
    plan = near.prepare("read", theirs, mine)
    plan.post().wait(PATIENCE)
    assert mine.array().tobytes() == pattern(N, 1).tobytes()
    assert [way.writer.transports for way in lane_of(plan).ways] == [[f"tcp/{name}"] for name in rails]
    assert [way.reader.transports for way in lane_of(plan).ways] == [[f"tcp/{name}"] for name in rails]
    assert len(set(lane_of(plan).endpoints)) == 4, "one for writes and one for reads on each"
    assert near.explain(theirs, mine).detail.startswith(f"rails {', '.join(rails)}: named in AgentConfig.rails;")
    mine.array()[:] = random_bytes(N, seed=2)
    near.write(mine, theirs, notify=b"all there").wait(PATIENCE)
    assert far.ask("hear_and_look", "theirs") == (b"all there", random_bytes(N, seed=2).tobytes())


@pytest.mark.parametrize("op", ["read", "write"])
def test_many_blocks_arrive_and_nothing_around_them_changes(
    near: Agent, far: FarProcess, mine: Region, theirs: RemoteRegion, op: str
) -> None:
    order = np.random.default_rng(3).permutation(N // BLOCK)
    picked, places = order[: len(order) // 2], np.sort(order[len(order) // 2 : 2 * (len(order) // 2)])
    source_bytes, target_bytes = (pattern(N, 1), np.zeros(N, np.uint8))
    if op == "write":
        mine.array()[:] = random_bytes(N, seed=4)
        source_bytes, target_bytes = random_bytes(N, seed=4), pattern(N, 1)
    source, target = (theirs, mine) if op == "read" else (mine, theirs)
    plan = near.prepare(op, source.pages(picked, BLOCK), target.pages(places, BLOCK))
    for _ in range(2):
        plan.post().wait(PATIENCE)
    expected = target_bytes.copy()
    for of, to in zip(picked.tolist(), places.tolist(), strict=True):
        expected[to * BLOCK : (to + 1) * BLOCK] = source_bytes[of * BLOCK : (of + 1) * BLOCK]
    found = mine.array().tobytes() if op == "read" else far.ask("content", "theirs")
    assert found == expected.tobytes()


def test_the_far_side_reaches_back_over_the_same_rails(near: Agent, far: FarProcess) -> None:
    back = near.register(random_bytes(N, seed=5), name="back")
    far.ask("copy", "read", "theirs", "near", "back")
    assert far.ask("content", "theirs") == random_bytes(N, seed=5).tobytes()
    far.ask("fill", "theirs", 6)
    far.ask("copy", "write", "theirs", "near", "back")
    assert back.array().tobytes() == pattern(N, 6).tobytes()


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("of", ["writer", "reader"])
def test_an_endpoint_that_fails_resets_the_lane_and_the_next_transfer_makes_another(
    near: Agent, far: FarProcess, mine: Region, theirs: RemoteRegion, broken: int, of: str
) -> None:
    plan = near.prepare("read", theirs, mine)
    plan.post().wait(PATIENCE)
    gate, lane = binding_of(plan).gate, lane_of(plan)
    getattr(lane.ways[broken], of).close(RESET)
    eventually(lambda: gate.code and not any(one.code == 0 for one in lane.endpoints), "the lane to end as a whole")
    assert not lane.is_usable
    mine.array()[:] = 0
    plan.post().wait(PATIENCE)
    assert mine.array().tobytes() == pattern(N, 1).tobytes()
    assert lane_of(plan) is not lane
    assert [one.code for one in lane_of(plan).endpoints] == [0] * 4
    near.notify("far", b"the link stands")
    assert far.ask("hear", 1) == [b"the link stands"]


@pytest.mark.parametrize(("ours", "others"), [(2, 1), (1, 2), (2, 0), (0, 2)])
def test_peers_with_different_rails_use_those_that_they_share(
    settings: dict[str, Any], rails: tuple[str, ...], ours: int, others: int
) -> None:
    far = FarProcess(UcxBackend, make_config(**{**settings, "rails": rails[:others]}), is_busy=False, launch=warm.popen)
    try:
        far.open("far")
        far.ask("make", "theirs", N, "user", 1)
        with make_agent("near", **{**settings, "rails": rails[:ours]}) as near:
            near.peer(far.ask("record"))
            far.ask("meet", near.record())
            mine = near.register(np.zeros(N, np.uint8), name="mine")
            near.read(near.peer("far")["theirs"], mine).wait(PATIENCE)
            assert mine.array().tobytes() == pattern(N, 1).tobytes()
            mine.array()[:] = random_bytes(N, seed=7)
            far.ask("copy", "read", "theirs", "near", "mine")
            assert far.ask("content", "theirs") == random_bytes(N, seed=7).tobytes()
    finally:
        far.close()

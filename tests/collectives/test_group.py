"""Groups of real agents: bytes, failures, and nothing left behind."""

import asyncio
import os
import signal
import time

import numpy as np
import pytest
import torch

from raynixl import Agent, AgentConfig, InMemoryDirectory
from raynixl.collectives import Group
from raynixl.errors import ConfigError, PeerUnknown, RangeError, TransferTimeout
from tests.collectives.members import Members, in_threads
from tests.collectives.operations import all_operations, barrier, broadcast, many_times, without

NBYTES = 20_000_003  # several chunks, and none of them whole


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_operation_moves_the_right_bytes_between_threads(world):
    assert in_threads(world, lambda group: all_operations([group])) == list(range(world))


@pytest.mark.parametrize("algorithm", ["direct", "chain", "auto"])
def test_broadcast_between_threads(algorithm):
    assert all(in_threads(4, lambda group: broadcast([group], 2, algorithm, NBYTES)))


def test_barrier_of_thirty_three():
    assert in_threads(33, lambda group: group.barrier()) == [None] * 33


def test_torch_tensors_regions_and_empty_buffers():
    def work(group):
        tensor = torch.full((3, 5), float(group.rank))
        group.broadcast(tensor, 1)
        arena = group._agent.empty(64)
        arena.array()[:] = group.rank
        group.broadcast(arena, 0)
        group.broadcast(np.zeros(0, np.uint8))
        return tensor.eq(1.0).all().item() and not arena.array().any()

    assert in_threads(3, work) == [True] * 3


def test_operations_from_event_loops():
    def work(group):
        async def main():
            buffer = np.full(1000, group.rank, np.uint8)
            await group.broadcast_async(buffer, 1)
            await group.barrier_async()
            return int(buffer.sum())

        return asyncio.run(main())

    assert in_threads(2, work) == [1000, 1000]


def test_buffers_of_unequal_length_are_refused_everywhere():
    def work(group):
        with pytest.raises(RangeError):
            group.broadcast(np.zeros(10 + group.rank, np.uint8))
        with pytest.raises(ConfigError, match="without"):
            group.barrier()

    in_threads(2, work, timeout=10)


def test_a_member_that_does_not_come_is_named():
    def work(group):
        if group.rank == 2:
            return "away"
        with pytest.raises(TransferTimeout) as caught:
            group.barrier(timeout=1.0)
        return caught.value.peer

    assert in_threads(3, work) in (["m2", "m2", "away"], ["m2", "m0", "away"], ["m1", "m2", "away"])


@pytest.mark.parametrize("members", [["a", "a"], ["b"], []])
def test_groups_that_make_no_sense_are_refused(members):
    with Agent("a") as agent, pytest.raises(ConfigError):
        Group(agent, members)


def test_an_unknown_member_is_an_error_and_not_a_wait():
    with (
        Agent("a", config=AgentConfig(connect_timeout=1)) as agent,
        Group(agent, ["a", "b"], timeout=0.5) as group,
        pytest.raises(PeerUnknown),
    ):
        group.barrier()


def test_a_hundred_steps_and_groups_leave_nothing():
    directory = InMemoryDirectory()
    with Agent("a", directory=directory) as one, Agent("b", directory=directory) as two:
        from concurrent.futures import ThreadPoolExecutor

        def run(agent, steps):
            for _ in range(steps):
                with Group(agent, ["a", "b"], name="again") as group:
                    group.broadcast(np.zeros(5000, np.uint8))
                    group.barrier()

        with ThreadPoolExecutor(2) as pool:
            for steps in (3, 100):
                list(pool.map(run, (one, two), (steps, steps)))
                counts = [
                    (len(agent.control.topics._inboxes), agent.statistics().regions, len(os.listdir("/proc/self/fd")))
                    for agent in (one, two)
                ]
                if steps == 3:
                    before = counts
        assert counts == before


@pytest.fixture(scope="module")
def quartet():
    with Members(4) as members:
        yield members


@pytest.mark.parametrize("algorithm", ["direct", "chain"])
@pytest.mark.parametrize("root", [0, 3])
def test_broadcast_between_processes(quartet, algorithm, root):
    assert quartet.run(broadcast, root, algorithm, NBYTES) == [(True, "", "")] * 4


def test_every_operation_between_processes(quartet):
    assert quartet.run(all_operations) == [(rank, "", "") for rank in range(4)]


@pytest.mark.parametrize("algorithm", ["direct", "chain"])
def test_a_killed_member_fails_the_step_on_every_survivor_and_the_rest_goes_on(algorithm):
    with Members(4) as members:
        members.run(barrier)
        survivors = [0, 1, 3]
        for rank in survivors:
            members.tell(rank, broadcast, 0, algorithm, NBYTES)
        began = time.monotonic()
        members.processes[2].kill()
        heard = [members.hear(rank) for rank in survivors]
        assert [(error, peer) for _, error, peer in heard] == [("PeerLost", "p2")] * 3
        assert time.monotonic() - began < 10
        assert [value for value, _, _ in members.run(without, "p2", ranks=survivors)] == [0, 1, 2]


def test_a_frozen_member_ends_the_step_by_its_deadline():
    with Members(3, timeout=2.0) as members:
        members.run(barrier)
        os.kill(members.processes[1].pid, signal.SIGSTOP)
        for rank in (0, 2):
            members.tell(rank, barrier)
        began = time.monotonic()
        heard = [members.hear(rank) for rank in (0, 2)]
        assert all(error in ("TransferTimeout", "PeerLost") for _, error, _ in heard)
        assert "p1" in [peer for _, _, peer in heard]
        assert time.monotonic() - began < 10


def test_hundreds_of_operations_between_processes_with_buffers_freed_in_between(quartet):
    assert quartet.run(many_times, 60) == [(True, "", "")] * 4

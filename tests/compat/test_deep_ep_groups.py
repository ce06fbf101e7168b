"""Ranks find each other over what their users group them by, and everything is closed in the end."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from agent_tools import make_agent
from deep_ep_tools import Case, ranks, same
from moe_tools import Threads

from raynixl import ConfigError
from raynixl.compat import deep_ep
from raynixl.compat.deep_ep import Buffer, ElasticBuffer

CASE = Case(2, tokens=12, hidden=128, topk=2, experts=4)


class Communicator:
    """What DeepEP uses of an MPI communicator, for ranks in threads."""

    def __init__(self, rank, values, barrier):
        self._rank, self._values, self._barrier = rank, values, barrier

    @staticmethod
    def ranks(size):
        values, barrier = [None] * size, threading.Barrier(size)
        return [Communicator(rank, values, barrier) for rank in range(size)]

    def Get_rank(self):  # noqa: N802 - MPI's name
        return self._rank

    def Get_size(self):  # noqa: N802 - MPI's name
        return len(self._values)

    def allgather(self, value):
        self._values[self._rank] = value
        self._barrier.wait(20)
        found = list(self._values)
        self._barrier.wait(20)
        return found


def step(rank, buffer):
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        CASE.x(rank), topk_idx=CASE.topk_idx(rank), topk_weights=CASE.topk_weights(rank), **CASE.layout(buffer, rank)
    )
    assert same(recv_x, CASE.received(rank, CASE.x))
    buffer.combine(recv_x, handle)


def in_threads(*works):
    errors = []

    def run(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]


def our_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raynixl")]


@pytest.mark.parametrize("destroys", [True, False], ids=["destroyed", "dropped"])
def test_an_mpi_communicator_introduces_agents_of_our_own(nothing_left, destroys):
    def work(rank, comm):
        buffer = Buffer(None, comm=comm, explicitly_destroy=destroys)
        assert (buffer.rank, buffer.group_size, buffer.group) == (rank, 2, comm)
        step(rank, buffer)
        comm.allgather(None)
        if destroys:
            buffer.destroy()
            buffer.destroy()

    in_threads(*[lambda rank=rank, comm=comm: work(rank, comm) for rank, comm in enumerate(Communicator.ranks(2))])


def test_a_given_agent_is_used_and_left_open(nothing_left):
    def work(rank, comm):
        with make_agent(f"mine{rank}") as agent:
            buffer = Buffer(comm=comm, agent=agent)
            step(rank, buffer)
            comm.allgather(None)
            buffer.destroy()
            assert not agent.is_closed

    in_threads(*[lambda rank=rank, comm=comm: work(rank, comm) for rank, comm in enumerate(Communicator.ranks(2))])


def test_what_is_no_group_is_refused():
    with pytest.raises(ConfigError, match="no group"):
        Buffer(object())
    with pytest.raises(ValueError, match="must be provided"):
        Buffer(None)
    with pytest.raises(ConfigError, match="no group"):
        ElasticBuffer("group", num_max_tokens_per_rank=1, hidden=8)


def test_domains_are_known_of_every_kind_of_group(pair):
    with ranks(pair) as group:
        for each in (group.buffers[0].group, Communicator.ranks(2)[0]):
            assert deep_ep.get_logical_domain_size(each) == deep_ep.get_physical_domain_size(each) == (1, 2)


def test_install_makes_deep_ep_importable(monkeypatch):
    for name in [name for name in sys.modules if name == "deep_ep" or name.startswith("deep_ep.")]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    deep_ep.install()
    try:
        import deep_ep as found
        from deep_ep.buffers.elastic import EPHandle
        from deep_ep.utils import EventHandle

        assert found.Buffer is Buffer
        assert found.topk_idx_t is torch.int64
        assert EPHandle is deep_ep.EPHandle
        assert EventHandle is deep_ep.EventHandle
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("deep_ep"):
                del sys.modules[name]


def test_install_does_not_replace_what_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", sys.modules["pytest"])
    with pytest.raises(ConfigError, match="before that"):
        deep_ep.install()


def test_one_agent_serves_several_buffers_at_once(nothing_left):
    with Threads(2) as crew, ranks(crew) as one, ranks(crew) as other:

        def work(rank, buffer):
            step(rank, buffer)
            step(rank, other.buffers[rank])
            step(rank, buffer)

        one.run(work)

"""Ranks that are lost: with enable_shrink the others go on, else every one of them is told who is missing."""

from __future__ import annotations

import itertools

import pytest
import torch
from deep_ep_tools import Case, counts_without, same
from moe_kernels_host import library
from moe_tools import CHILD, Processes
from weights_nursery import Nursery

from raynixl import PeerLost

CASE = Case(4, tokens=20, hidden=128, topk=3, experts=8)
LOST = 2
LEFT = [0, 1, 3]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def nursery():
    made = Nursery(CHILD)
    yield made
    made.close()


@pytest.fixture(scope="module")
def processes(nursery):
    with Processes(4, lent=nursery) as made:
        yield made


@pytest.fixture
def crew(processes):
    """Four processes; those that a test has killed are started anew."""
    yield processes
    for rank, child in enumerate(processes.children):
        if child.is_alive:
            processes.tell(rank, "deep_ep_far:drop")
    for rank, child in enumerate(processes.children):
        if child.is_alive:
            processes.hear(rank)
    for rank, child in enumerate(processes.children):
        if not child.is_alive:
            processes.restart(rank)


def make(crew, **options):
    crew.call("deep_ep_far:make", crew.names, {"name": f"shrink{next(_numbers)}", **options})


def sums_without(case, rank, lost):
    ids, weights = case.topk_idx(rank), case.topk_weights(rank)
    total = torch.zeros(case.count(rank), case.hidden)
    for k in range(case.topk):
        is_there = torch.tensor([int(e) // case.each not in lost for e in ids[:, k]])
        total += torch.where(is_there.unsqueeze(1), weights[:, k : k + 1] * case.x(rank).float(), 0)
    return total.bfloat16()


def test_survivors_go_on_without_a_rank_that_is_killed_before_dispatch(crew):
    make(crew, enable_shrink=True)
    assert crew.call("deep_ep_far:dispatch", CASE) == [counts_without(CASE, rank, []) for rank in range(4)]
    crew.call("deep_ep_far:combine", CASE)
    assert crew.call("deep_ep_far:masked") == [[]] * 4
    crew.kill(LOST)
    assert crew.call("deep_ep_far:dispatch", CASE, ranks=LEFT) == [counts_without(CASE, rank, [LOST]) for rank in LEFT]
    assert crew.call("deep_ep_far:masked", ranks=LEFT) == [[LOST]] * 3
    outs = crew.call("deep_ep_far:combine", CASE, ranks=LEFT)
    assert all(same(out, sums_without(CASE, rank, [LOST])) for out, rank in zip(outs, LEFT, strict=True))
    crew.call("deep_ep_far:dispatch", CASE, ranks=LEFT)
    crew.call("deep_ep_far:combine", CASE, ranks=LEFT)


def test_a_rank_that_is_killed_before_combine_is_missing_from_the_sums(crew):
    make(crew, enable_shrink=True)
    crew.call("deep_ep_far:dispatch", CASE)
    crew.kill(LOST)
    outs = crew.call("deep_ep_far:combine", CASE, ranks=LEFT)
    assert all(same(out, sums_without(CASE, rank, [LOST])) for out, rank in zip(outs, LEFT, strict=True))
    assert crew.call("deep_ep_far:masked", ranks=LEFT) == [[LOST]] * 3


@pytest.mark.parametrize("step", ["dispatch", "normal"])
def test_without_enable_shrink_survivors_are_told_who_is_lost(crew, step):
    make(crew)
    crew.call(f"deep_ep_far:{step}", CASE)
    crew.kill(LOST)
    for _ in range(2):
        for rank in LEFT:
            crew.tell(rank, f"deep_ep_far:{step}", CASE)
        for rank in LEFT:
            with pytest.raises(PeerLost, match=r"ranks \[2\] \(rank2\).*enable_shrink"):
                crew.hear(rank)


def test_buffers_over_torch_distributed_and_threads_that_read_alike(crew, tmp_path):
    """Four processes that only share a group of gloo's: agents are made, and meet over it."""
    store = str(tmp_path / "store")
    make(crew)
    assert crew.call("deep_ep_far:over_gloo", store, CASE) == [
        [counts_without(CASE, rank, [])] * 2 for rank in range(4)
    ]


def test_survivors_on_gpus_are_told_who_is_lost(nursery):
    """In processes of their own memory of a GPU that is made up is opened by CUDA IPC."""
    library()
    case = Case(3, tokens=20, hidden=128, topk=3, experts=9)
    with Processes(3, backends=("shm", "nvlink"), lent=nursery) as crew:
        crew.call("moe_cuda_far:begin")
        crew.call("deep_ep_far:make", crew.names, {"name": "killed"})
        for rank, out in enumerate(crew.call("deep_ep_far:normal", case)):
            times = sum(case.is_in_rank(rank, other).float() for other in range(3)).unsqueeze(1)
            assert torch.equal(out, (case.x(rank).float() * times).bfloat16())
        crew.kill(2)
        for _ in range(2):
            for rank in (0, 1):
                crew.tell(rank, "deep_ep_far:normal", case)
            for rank in (0, 1):
                with pytest.raises(PeerLost, match=r"ranks \[2\] \(rank2\).*enable_shrink"):
                    crew.hear(rank)
        crew.call("deep_ep_far:drop", ranks=[0, 1])
        crew.call("moe_cuda_far:end", ranks=[0, 1])

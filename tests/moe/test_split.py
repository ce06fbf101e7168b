"""Ranks that lose each other, or are replaced while their former process lives."""

from __future__ import annotations

import signal

import pytest
import torch
from moe_fault_crews import REST, VICTIM, WORLD, check, harm, layer
from moe_faults import DISPATCH, OPTIONS
from moe_tools import Processes, Threads
from weights_nursery import Nursery

from raynixl import Masked


def test_of_two_ranks_that_mask_each_other_the_lower_one_stays(crew: Threads) -> None:
    """Such as when the way between them is cut: the others keep one of them, and the other one is told."""
    x, ids = torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor([[0, 1], [2, 3]])
    with crew.experts(4, experts=4, hidden=16, topk=2, max_tokens=2) as made:
        made.run(lambda rank, ep: ep.dispatch(x, ids))
        made.eps[0]._session.members.lose(1, "cut")
        made.eps[1]._session.members.lose(0, "cut")
        errors = made.errors(lambda rank, ep: ep.dispatch(x, ids))
        assert [type(error) for error in errors] == [type(None), Masked, type(None), type(None)]
        for rank in (0, 2, 3):
            assert made.eps[rank].active == (0, 2, 3)
        sums = made.run(lambda rank, ep: step(ep, x, ids), ranks=[0, 2, 3])
        for out in sums:
            assert out[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("knowing", [[0], [1, 3], [0, 1, 3]])
def test_all_agree_behind_the_same_operation_that_a_rank_is_lost(crew: Threads, knowing: list[int]) -> None:
    """Such as one that died amid its lines of the operation before, of which some had its line and others had not."""
    x, ids = torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor([[0, 1], [2, 3]])
    rest = [0, 1, 3]
    with crew.experts(4, experts=4, hidden=16, topk=2, max_tokens=2) as made:
        handles = made.run(lambda rank, ep: ep.dispatch(x, ids))
        for rank in knowing:
            made.eps[rank]._session.members.lose(2, "it died")
        assert [ep.agreed for ep in made.eps] == [(0, 1, 2, 3)] * 4
        made.run(lambda rank, ep: ep.combine(handles[rank].x, handles[rank].handle), ranks=rest)
        assert [made.eps[rank].agreed for rank in rest] == [(0, 1, 3)] * 3
        assert [made.eps[rank].active for rank in rest] == [(0, 1, 3)] * 3


def test_who_was_masked_and_can_reach_nobody_is_told_so_and_does_not_go_on_alone(crew: Threads) -> None:
    """Such as one that was frozen amid its puts, whose former peers have withdrawn what it knows."""
    x, ids = torch.ones(2, 16, dtype=torch.bfloat16), torch.tensor([[0, 1], [2, 3]])
    with crew.experts(3, experts=4, hidden=16, topk=2, max_tokens=2) as made:
        made.run(lambda rank, ep: ep.dispatch(x, ids))
        for rank in (1, 2):
            made.eps[rank]._session.lose(0, "it did not come in time")
        for channel in made.eps[0]._session.channels.values():
            channel.post = lambda *_: False
        with pytest.raises(Masked, match="rejoin"):
            made.eps[0].dispatch(x, ids)


def step(ep, x, ids):
    """Experts that return what they get."""
    made = ep.dispatch(x, ids)
    return ep.combine(made.x, made.handle)


def test_memory_that_a_replaced_process_may_write_is_kept_from_others_while_it_lives(nursery: Nursery) -> None:
    with Processes(WORLD, lent=nursery) as crew, layer(crew) as ranks:
        harm(ranks, DISPATCH[3], signal.SIGSTOP, deadline=2.0)
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=REST), gone=[VICTIM])
        former = ranks.replace(VICTIM)
        ranks.tell(VICTIM, "moe_faults:join_round", ranks.names, {"name": "layer", "deadline": 20.0, **OPTIONS})
        for rank in REST:
            ranks.tell(rank, "moe_faults:one_round", "layer", VICTIM)
        for rank in range(WORLD):
            check([ranks.hear(rank)[-1:]])
        check(ranks.call("moe_faults:steps", "layer", 2))
        assert any(ranks.call("moe_faults:quarantined", "layer", ranks=REST))
        former.kill()
        check(ranks.call("moe_faults:steps", "layer", 2))
        assert ranks.call("moe_faults:quarantined", "layer") == [[]] * WORLD


@pytest.mark.parametrize("backend", ["shm", "ucx"])
def test_lines_that_a_replaced_process_writes_when_it_wakes_change_none_of_its_successors(
    nursery: Nursery, backend: str
) -> None:
    if backend == "ucx":
        pytest.importorskip("ucxx")
    with Processes(WORLD, backends=(backend,), lent=nursery) as crew, layer(crew) as ranks:
        phase = harm(ranks, DISPATCH[0], signal.SIGSTOP, deadline=2.0)[0].phase
        check(ranks.call("moe_faults:steps", "layer", 3, ranks=REST), gone=[VICTIM])
        former = ranks.replace(VICTIM)
        ranks.tell(VICTIM, "moe_faults:join_round", ranks.names, {"name": "layer", "deadline": 20.0, **OPTIONS})
        for rank in REST:
            ranks.tell(rank, "moe_faults:one_round", "layer", VICTIM)
        coming = [ranks.hear(rank)[-1].phase for rank in range(WORLD)].pop() + 3
        while coming % 2 != phase % 2:  # their lines go to the same cells
            coming = ranks.call("moe_faults:steps", "layer", 1)[0][0].phase + 3
        for rank in (0, 1, VICTIM):
            ranks.tell(rank, "moe_faults:step", "layer")
        ranks.call("moe_faults:line_is_here", "layer", VICTIM, ranks=[3])
        former.signal(signal.SIGCONT)
        former.hear()  # it has written its lines, and found that it is masked, or that its way is cut
        ranks.tell(3, "moe_faults:step", "layer", 2.0)
        check([[ranks.hear(rank)] for rank in range(WORLD)])
        check(ranks.call("moe_faults:steps", "layer", 3))
        former.kill()

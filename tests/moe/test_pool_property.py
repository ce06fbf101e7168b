"""Whatever is taken, told, answered, leased and dropped in whatever order: no slot is given out that is in use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agent_tools import make_agent
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from raynixl.moe import pool as pools
from raynixl.moe.pool import Pool

NBYTES = 4096
RANKS = 4
RANK = st.integers(0, RANKS - 1)


class Use:
    """What the model knows of one slot in use."""

    def __init__(self, slot, mark):
        self.slot = slot
        self.mark = mark
        self.is_kept = True
        self.writers = set()
        self.tensors = []

    @property
    def is_over(self):
        return not (self.is_kept or self.writers or self.tensors)


class Machine(RuleBasedStateMachine):
    """A pool beside a model of it that is easy to believe."""

    kept = Bundle("kept")
    agent = None

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.pool = Pool(self.agent, NBYTES, clock=lambda: self.now)
        self.uses = {}
        self.marks = iter(range(1, 1 << 30))

    def settle(self):
        self.uses = {number: use for number, use in self.uses.items() if not use.is_over}

    @rule(target=kept, nbytes=st.sampled_from([0, NBYTES, 2 * NBYTES, 5 * NBYTES]))
    def take(self, nbytes):
        slot = self.pool.take(nbytes)
        assert slot.number not in self.uses
        assert slot.nbytes >= max(nbytes, NBYTES)
        assert slot.region.is_registered
        mark = next(self.marks)
        slot.bytes.view(np.int64)[:] = mark
        self.uses[slot.number] = Use(slot, mark)
        return slot.number

    @rule(number=kept, ranks=st.sets(RANK))
    def announce(self, number, ranks):
        use = self.uses.get(number)
        if use is not None and use.is_kept:
            self.pool.announce(use.slot, sum(1 << rank for rank in ranks))
            use.writers |= ranks

    @rule(number=kept, rank=RANK)
    def answer(self, number, rank):
        use = self.uses.get(number)
        if use is not None:
            self.pool.answered(use.slot, 1 << rank)
            use.writers.discard(rank)
            self.settle()

    @rule(rank=RANK)
    def go(self, rank):
        self.pool.gone(rank)
        for use in self.uses.values():
            use.writers.discard(rank)
        self.settle()

    @rule(number=kept, parts=st.integers(1, 3))
    def lease(self, number, parts):
        use = self.uses.get(number)
        if use is not None and use.is_kept:
            lease = self.pool.lease(use.slot)
            use.tensors = [lease.tensor(torch.int64, (8,), 64 * part) for part in range(parts)]
            use.is_kept = False

    @rule(number=kept, index=st.integers(0, 2))
    def view(self, number, index):
        use = self.uses.get(number)
        if use is not None and use.tensors:
            one = use.tensors.pop(index % len(use.tensors))
            use.tensors.append(torch.as_tensor(one)[1:-1].numpy() if len(one) > 2 else one)

    @rule(number=kept)
    def drop(self, number):
        use = self.uses.get(number)
        if use is not None and use.tensors:
            use.tensors.pop(0)
            self.settle()

    @rule(number=consumes(kept))
    def put_back(self, number):
        use = self.uses.get(number)
        if use is not None and use.is_kept:
            self.pool.put_back(use.slot)
            use.is_kept = False
            self.settle()

    @rule(seconds=st.sampled_from([1.0, 2 * pools.KEEP_SECONDS]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def what_is_in_use_is_as_it_was(self):
        slots = {slot.number: slot for slot in self.pool.slots}
        assert {number for number, slot in slots.items() if not slot.is_free} == set(self.uses)
        for number, use in self.uses.items():
            assert slots[number] is use.slot
            assert all((np.asarray(one) == use.mark).all() for one in use.tensors)
        waiting = {number for number, use in self.uses.items() if not use.is_kept and not use.tensors}
        assert {slot.number for slot in self.pool.quarantined} == waiting

    def teardown(self):
        for use in self.uses.values():
            use.tensors.clear()
            self.pool.put_back(use.slot)
        for rank in range(RANKS):
            self.pool.gone(rank)
        assert all(slot.is_free for slot in self.pool.slots)
        self.pool.close()


@pytest.mark.pure
def test_a_pool_does_what_a_simple_model_of_it_does(nothing_left, monkeypatch):
    monkeypatch.setattr(pools, "KEEP_TURNS", 6)
    with make_agent("owner", backends=("loopback",)) as agent:
        monkeypatch.setattr(Machine, "agent", agent)
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            ),
        )

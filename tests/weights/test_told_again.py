"""A target that has forgotten the plan is told it again, and who pushes waits for that without a busy loop."""

import time

import pytest
import torch

from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.conversation import Asking
from raynixl.weights.pulls import Pulls

pytestmark = pytest.mark.pure


def test_who_pushes_sleeps_while_a_target_is_told_again(fleet, monkeypatch):
    trainer, source, target = fleet("trainer"), {"w": torch.ones(100)}, {"w": torch.zeros(100)}
    publish(trainer, "p", source)
    subscription = subscribe(fleet("rollout"), "p", target)
    sync = WeightSync(trainer, "p", ["trainer"], ["rollout"], timeout=20.0)
    sync.push(1).raise_for_excluded()
    subscription._follower._cargos.clear()  # as if it had been told of many plans since
    looks, tell, collect = [], Pulls._tell, Asking.collect

    def slow(self, name):
        looks.clear()
        time.sleep(0.5)
        tell(self, name)

    def counted(self):
        looks.append(self)
        return collect(self)

    monkeypatch.setattr(Pulls, "_tell", slow)
    monkeypatch.setattr(Asking, "collect", counted)
    source["w"].fill_(2.0)
    sync.push(2).raise_for_excluded()
    assert target["w"].unique().tolist() == [2.0]
    assert len(looks) < 200

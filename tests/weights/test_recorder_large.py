"""Recording a loader of many experts: what each copy costs does not grow with how many came before it."""

import pytest
import torch

from raynixl.weights.ledger import Memory
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.recorder import record

pytestmark = pytest.mark.pure

EXPERTS = 200


def test_copies_of_experts_look_at_their_own_expert_only(monkeypatch):
    stacked = torch.nn.ParameterDict({"w13": torch.nn.Parameter(torch.empty(EXPERTS, 8, 4, device="meta"))})
    infos = [TensorInfo(f"{e}.{kind}", "float32", (4, 4)) for e in range(EXPERTS) for kind in ("gate", "up")]
    looked, kept = [], Memory._kept

    def counting(memory, contents, gone):
        looked.append(len(contents))
        return kept(memory, contents, gone)

    def load(weights):
        for name, full in weights:
            expert, kind = name.split(".")
            stacked["w13"].data[int(expert)].narrow(0, 4 * (kind == "up"), 4).copy_(full)

    monkeypatch.setattr(Memory, "_kept", counting)
    recording = record(load, infos, stacked)
    assert sum(looked) <= 2 * len(infos)
    assert len(recording.shards.pieces.tensor) == len(infos)
    assert not recording.full
    assert not recording.partial
